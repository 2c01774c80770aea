"""The commands `deltanet evaluate`, `deltanet card`, `deltanet push` and `deltanet kernels build`.

Exit codes: 0 done, 1 refused (the message says what and where), 2 wrong usage, 3 the Hub failed, 4 what came back from
the Hub is not what was sent. With --json the result is one JSON object on stdout; all else goes to stderr.
"""

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .cli_evaluate import evaluate


console = Console(stderr=True, emoji=False)  # README.md:100: is a place, not an emoji
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the publishing commands to a command line."""
    app.command()(evaluate)
    app.command()(card)
    app.command()(push)
    kernels = typer.Typer(help="Build the Triton kernels as a kernel of the Hub.", no_args_is_help=True)
    kernels.command("build")(kernels_build)
    app.add_typer(kernels, name="kernels")


def card(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with a checkpoint or an adapter.")],
    repo_id: Annotated[str, typer.Option(help="Repository that it will be published to, owner/name.")],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="Evaluation file, repeatable; evaluation*.json of the folder by default.")
    ] = None,
    trainer_state: Annotated[
        Path | None, typer.Option(help="trainer_state.json; the folder's own by default.")
    ] = None,
    conversion: Annotated[Path | None, typer.Option(help="conversion.json; the folder's own by default.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of an adapter's base, or of what it was made from.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title; the repository's name by default.")] = None,
    summary: Annotated[str | None, typer.Option(help="What it is, in a sentence or two.")] = None,
    training: Annotated[
        str | None, typer.Option(help="How it was trained, beside what trainer_state.json tells.")
    ] = None,
    limits: Annotated[str | None, typer.Option(help="What it is not good for.")] = None,
    license: Annotated[str | None, typer.Option(help="The Hub's name of the licence, such as apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language code, repeatable.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Dataset trained on, repeatable.")] = None,
    template: Annotated[Path | None, typer.Option(help="Another Jinja template.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; README.md in the folder by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that exists, edits included.")] = False,
    as_json: Json = False,
) -> None:
    """Write the model card of a checkpoint or adapter, from its files.

    Figures come from evaluation files (lm-evaluation-harness's, or JSON with "command" and "results"): one without the
    command that made it is refused, and what was not measured is said to be so. Texts that are not given are marked
    [More Information Needed], which `deltanet push` refuses: edit the card, it is yours. PEFT's empty card beside an
    adapter is replaced.

    \b
    deltanet card runs/mine --repo-id me/mine --license apache-2.0 --summary "A small DeltaNet."
    deltanet card runs/mine --repo-id me/mine --evaluation results.json --trainer-state
    runs/checkpoint-900/trainer_state.json deltanet card runs/lora --repo-id me/mine-lora --base-model me/mine
    --license apache-2.0 --force
    """
    from .card import MISSING, make_card, write_card
    from .card_check import is_stub

    file = output or checkpoint / "README.md"
    with _refusals(as_json):
        if file.exists() and not force and not is_stub(file.read_text(encoding="utf-8")):
            raise ValueError(f"{file} exists and may have been edited: --force replaces it")
        made = make_card(
            checkpoint,
            repo_id,
            title=title,
            summary=summary,
            license=license,
            language=language,
            datasets=dataset,
            base_model=base_model,
            training=training,
            limits=limits,
            evaluations=evaluation,
            trainer_state=trainer_state,
            conversion=conversion,
            template=template,
        )
        write_card(made, file)
    to_fill = [i for i, line in enumerate(made.content.splitlines(), start=1) if MISSING in line]
    figures = len(made.data.eval_results or [])
    if as_json:
        _print_json({"card": str(file), "figures": figures, "lines_to_fill_in": to_fill})
        return
    console.print(f"{file}: {figures} figures in its metadata", highlight=False)
    if to_fill:
        console.print(f"To be filled in by you: line {', '.join(map(str, to_fill))}", highlight=False)
    if not any("recall" in f"{x.dataset_name} {x.metric_type}".lower() for x in made.data.eval_results or []):
        console.print(f"Recall was not measured: `deltanet evaluate {checkpoint}` does", highlight=False)


def push(
    folder: Annotated[Path, typer.Argument(help="Folder with a checkpoint or an adapter, and its README.md.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, owner/name; made if it does not exist.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate and show what would be sent; send nothing.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; a public one is refused.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="An adapter's base on the Hub, instead of a local folder.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Send what would be left out or asked about: 'wandb', '*.csv'; may be given several times."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave it out: 'notes', '*.gguf'; may be given several times.")
    ] = None,
    message: Annotated[str, typer.Option(help="The commit's message.")] = "Upload by `deltanet push`",
    as_json: Json = False,
) -> None:
    """Publish a checkpoint or an adapter on the Hub, in one commit.

    First the folder is validated: it loads by its own code and generates a token, the card is complete, no file holds
    a secret or a path of this machine. What is wrong is listed by file and line. Logs and checkpoints of a training
    are left out; data and big files that no model needs are asked about: --include, --exclude. Then what has changed
    is sent in one commit, pulled back, and compared by hash. A push that fails leaves the branch as it was; give the
    command again. Content that was uploaded already is not sent twice.

    \b
    deltanet push runs/mine me/mine --dry-run
    deltanet push runs/mine me/mine --private
    deltanet push runs/mine me/mine --revision step-2000
    deltanet push runs/mine somebody/theirs --create-pr
    deltanet push runs/lora me/mine-lora --base-model me/mine
    deltanet push runs/mine me/mine --include examples.csv --exclude notes
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    from .push import prepare, preview, publish

    if as_json:
        disable_progress_bars()
    with _refusals(as_json):
        with console.status("Loading it and generating a token ..."):
            plan = prepare(folder, repo_id, base_model=base_model, include=include or (), exclude=exclude or ())
        if dry_run:
            changes = None if constants.HF_HUB_OFFLINE else preview(plan, revision=revision)
            _show_plan(plan, changes, as_json)
            return
        done = publish(plan, private=private, revision=revision, create_pr=create_pr, message=message)
    if as_json:
        _print_json(dataclasses.asdict(done))
    elif not done.sent:
        console.print(f"{done.url} holds all of it already, at {done.commit}: nothing was sent", highlight=False)
    else:
        sent = len(done.changes.new) + len(done.changes.changed)
        console.print(
            f"{done.url} at {done.commit}: {sent} files sent, {done.verified} pulled back and equal", highlight=False
        )
        for name in done.changes.removed:
            console.print(f"  removed there: {name}, weights of an earlier push", highlight=False)
        if done.pull_request:
            console.print(f"  {done.pull_request}", highlight=False)


def kernels_build(
    source: Annotated[Path, typer.Option(help="The kernel project, with build.toml and torch-ext/.")] = Path(
        "kernels"
    ),
    output: Annotated[Path | None, typer.Option(help="Folder to make; SOURCE/build by default.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Repository for the card, instead of build.toml's.")] = None,
    as_json: Json = False,
) -> None:
    """Assemble the kernel project into the form that the `kernels` package loads.

    \b
    deltanet kernels build
    python -c "from kernels import get_local_kernel; from pathlib import Path;
    print(get_local_kernel(Path('kernels')))"
    """
    from .hub_kernel import build

    with _refusals(as_json):
        built = build(source, output, repo_id=repo_id)
    if as_json:
        _print_json({"variants": [str(variant) for variant in built]})
        return
    for variant in built:
        console.print(str(variant), highlight=False)


def _show_plan(plan, changes, as_json: bool) -> None:
    what = {} if changes is None else {name: k for k, names in vars(changes).items() for name in names}
    if as_json:
        _print_json(
            {
                "repo_id": plan.repo_id,
                "kind": plan.kind,
                "bytes": plan.size,
                "files": {name: {"bytes": c.size, "sha256": c.sha256} for name, c in plan.files.items()},
                "left_out": plan.left_out,
                "changes": None if changes is None else dataclasses.asdict(changes),
                "loaded": plan.loaded,
            }
        )
        return
    table = Table(
        "file", "size", "on the Hub", title=f"{plan.kind} for {plan.repo_id}: {decimal(plan.size)}, nothing sent"
    )
    for name, content in plan.files.items():
        table.add_row(name, decimal(content.size), what.get(name, "not compared"))
    for name in [] if changes is None else changes.removed:
        table.add_row(name, "", "to be removed: weights of an earlier push")
    for name, reason in plan.left_out.items():
        table.add_row(name, "", f"left out: {reason}", style="dim")
    console.print(table)
    console.print(f"It loads as {plan.loaded['class']}, {plan.loaded['parameters']:,} parameters.", highlight=False)


@contextmanager
def _refusals(as_json: bool):
    """Turns the errors that a user can cause or meet into a message and an exit code."""
    from .push import HubFailure, VerificationFailed

    try:
        yield
    except (ValueError, HubFailure) as error:
        code = 4 if isinstance(error, VerificationFailed) else 3 if isinstance(error, HubFailure) else 1
        if as_json:
            problems = [dataclasses.asdict(problem) for problem in getattr(error, "problems", [])]
            _print_json({"error": str(error), "problems": problems, "exit_code": code})
        else:
            console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(code) from error


def _print_json(content) -> None:
    typer.echo(json.dumps(content, indent=2))
