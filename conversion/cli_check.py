"""What `deltanet check` shows: progress on stderr, a table, a line for each wrong result, and the whole as JSON."""

import json
import math
import time
from pathlib import Path

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from modeling_deltanet.cache_deltanet import new_file

from . import check, check_run
from .cli_output import Result, console, errors, say


SAVE_EVERY = 30  # seconds: a report that is cut off is continued by the same command
# The table is for 80 columns; the report holds every quantity.
COLUMNS = {
    "output": ("output", "output without gradients"),
    "state": ("final state",),
    "gradients": ("dq", "dk", "dv", "dbeta", "dg", "dh0", "dx", "dw"),
}


def run_check(
    everything: bool, sizes: str | None, dtypes: list[str] | None, peer: str | None, device: str | None, seed: int,
    jobs: int, file: Path | None,
) -> Result:  # fmt: skip
    """The report, which also goes to `file`; exit code 1 if something was wrong."""
    where = check_run.choose_device(device)
    pairs = check_run.parse_sizes(sizes, check.ALL_SIZES)
    choose = check.full if everything else check.quick
    options = {name: value for name, value in (("sizes", pairs), ("dtypes", dtypes)) if value is not None}
    cases = list(choose(**options))
    missing = check_run.missing_peer(where) if peer else None
    if missing:
        errors.print(f"skipped: {missing}", markup=False)

    call = {
        "cases": len(cases),
        "seed": seed,
        "environment": check_run.environment(where),
        "skipped": [missing] if missing else [],
        "peer": peer,
    }
    kept = None if file is None else _kept(file, call)
    done, earlier, rows = kept or (0, 0.0, [check_run.reference_row(where, seed)])
    started = saved = time.perf_counter()
    factors = {
        "factor for repeated keys": check.REPEATED,
        f"factor for small beta, K < {check.FEW_KEYS}": check.OF_FEW_KEYS,
    }

    def report() -> dict:
        count = len(_wrong(rows))
        return call | {
            "ok": count == 0,
            "done": done,
            "wrong": count,
            "seconds": round(earlier + time.perf_counter() - started, 1),
            "tolerances": check.TOLERANCES | check.OF_QUANTITY | factors,
            "summary": check_run.summary(rows),
            "rows": rows,
        }

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("", total=len(cases), completed=done)
        for case, some in zip(cases[done:], check_run.run(cases, where, peer, seed, jobs, first=done)):
            rows += some
            done += 1
            progress.update(task, advance=1, description=str(case))
            if file is not None and time.perf_counter() - saved > SAVE_EVERY:
                _write(_finite(report()), file)
                saved = time.perf_counter()
    found = report() | {"plans": check_run.plans(cases, where, seed)}
    finite = _finite(found)
    if file is not None:
        _write(finite, file)
    return Result(finite, lambda: _show(found, _wrong(rows)), code=0 if found["ok"] else 1)


def _wrong(rows: list[dict]) -> list[dict]:
    return [row for row in rows if check_run.is_wrong(row) and not row["is_peer"]]


def _write(report: dict, file: Path) -> None:
    with new_file(file) as unfinished:
        unfinished.write_text(_to_json(report) + "\n")


def _kept(file: Path, call: dict) -> tuple[int, float, list[dict]] | None:
    """Cases done, seconds and rows of an unfinished report of the same call; None of anything else, which is written
    anew.
    """
    try:
        report = json.loads(file.read_text())
        if report["done"] == report["cases"] or any(report[key] != value for key, value in call.items()):
            return None
        numbers = ("errors", "too_large")  # "inf" among them
        rows = [row | {key: {n: float(x) for n, x in row[key].items()} for key in numbers} for row in report["rows"]]
        return report["done"], report["seconds"], rows
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _to_json(report: dict) -> str:
    """A row a line: there are thousands."""
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in report["rows"])
    head, tail = json.dumps(report | {"rows": []}, indent=1, allow_nan=False).split('"rows": []')
    return f'{head}"rows": [\n{rows}\n ]{tail}'


def _finite(x):
    """Three digits of each number; what is not finite has no number in JSON."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.3g}") if math.isfinite(x) else str(x)
    return x


def _show(report: dict, wrong: list[dict]) -> None:
    for name, value in report["environment"].items():
        if value is not None:
            say(f"{name}: {value}")
    table = Table("route", "dtype", "cases", *COLUMNS, "ran", title="Largest error against fp64", box=box.SIMPLE)
    for line in report["summary"]:
        worst = [[line["worst"][name] for name in names if name in line["worst"]] for names in COLUMNS.values()]
        shown = [f"{max(values):.0e}" if values else "" for values in worst]
        table.add_row(
            line["route"], line["dtype"], str(line["cases"]), *shown, check_run.describe_kernels(line["kernels"])
        )
    console.print(table)
    for text in report["plans"]:
        say(text)
    for row in wrong:
        case = check.Case(**row["case"]) if row["case"] else "reference"
        found = row["failure"] or ", ".join(f"{name} {value:.1e}" for name, value in row["too_large"].items())
        kernels = f" ({', '.join(row['kernels'])})" if row["kernels"] else ""
        say(f"wrong: {row['route']}: {case}: {found}{kernels}")
    verdict = "all right" if report["ok"] else f"{report['wrong']} wrong"
    say(f"{verdict}: {report['cases']} cases in {report['seconds']} s, seed {report['seed']}")
