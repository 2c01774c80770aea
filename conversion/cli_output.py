"""One way of showing a result and one way of failing, for every command of `deltanet`.

With --json, stdout holds one JSON object and nothing else: what libraries print goes to stderr, and an error is
`{"error": ..., "problems": [...], "exit_code": ...}`. Without, a result is a table or text, and an error is one line
on stderr.

Exit codes: 0 done; 1 refused, failed, or found wrong; 2 wrong usage; 3 the Hub failed; 4 what came back from the Hub
is not what was sent; 130 interrupted.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, StrictDataclassError
from rich.console import Console
from rich.table import Table


# A result holds names and texts of others: README.md:100: is a place and not an emoji, [/b] a folder and not an end.
console, errors = Console(emoji=False, markup=False), Console(stderr=True, emoji=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

# Bases of HfHubHTTPError: httpx's errors, which are no OSErrors. The library's name changes with huggingface_hub's.
HUB_ERRORS = (HfHubHTTPError, HfHubHTTPError.__bases__[0], OfflineModeIsEnabled)
USER_ERRORS = (ValueError, OSError, ImportError, StrictDataclassError)


@dataclass(frozen=True)
class Result:
    """What a command has to say: `content` for programs, `show()` for people (a table of the content by default)."""

    content: dict
    show: Callable[[], None] | None = None
    code: int = 0


def command(app: typer.Typer, name: str | None = None) -> Callable:
    """Register a function that returns a `Result` as a command, with the option --json.

    A function that behaves differently with --json declares `as_json: AsJson = False` itself.
    """

    def register(function: Callable[..., Result]) -> Callable:
        signature = inspect.signature(function)
        declares = "as_json" in signature.parameters

        @functools.wraps(function)
        def run(as_json: bool, **arguments) -> None:
            try:
                with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                    result = function(**arguments, **({"as_json": as_json} if declares else {}))
            except Exception as error:
                code = _exit_code(error)
                if code is None:
                    raise
                _fail(error, code, as_json)
            except KeyboardInterrupt as interrupt:
                _fail(interrupt, 130, as_json)
            if _is_first_process():
                _print_json(result.content) if as_json else (result.show or (lambda: _table(result.content)))()
            if result.code:
                raise typer.Exit(result.code)

        if not declares:
            option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson)
            run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
            run.__annotations__ = function.__annotations__ | {"as_json": AsJson}
        app.command(name)(run)
        return function

    return register


def say(text: str) -> None:
    """A line of a result as it stands: no markup, no colours, not wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _is_first_process() -> bool:
    """Of those that `accelerate launch` starts, one prints to stdout."""
    return int(os.environ.get("RANK", 0)) == 0


def _exit_code(error: Exception) -> int | None:
    """None for what is a fault of this program, and shows a traceback."""
    from .push import HubFailure, VerificationFailed  # not at the top: `deltanet --help` need not wait for it

    if isinstance(error, VerificationFailed):
        return 4
    if isinstance(error, (HubFailure, *HUB_ERRORS)):
        return 3
    return 1 if isinstance(error, USER_ERRORS) else None


def _fail(error: BaseException, code: int, as_json: bool) -> None:
    """Say what went wrong and end the command."""
    interrupted = isinstance(error, KeyboardInterrupt)
    message = str(error) or ("" if interrupted else type(error).__name__)
    if interrupted:
        message = f"interrupted: {message}" if message else "interrupted"
    if as_json and _is_first_process():
        problems = [dataclasses.asdict(problem) for problem in getattr(error, "problems", [])]
        _print_json({"error": message, "problems": problems, "exit_code": code})
    else:
        if not interrupted:
            errors.print("[bold red]error:[/] ", end="")
        errors.print(message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code) from error


def _table(content: dict) -> None:
    table = Table("", "", show_header=False)
    for key, value in content.items():
        rows = {f"{key}: {name}": x for name, x in value.items()} if isinstance(value, dict) else {key: value}
        for name, x in rows.items():
            table.add_row(name.replace("_", " "), _shown(x))
    console.print(table)


def _shown(value) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _print_json(content: dict) -> None:
    print(json.dumps(_finite(content), allow_nan=False))


def _finite(x):
    """JSON has no number for what is not finite: null."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
