"""What a benchmark found, as JSON that a person can read: one row per line."""

import json
import shutil
import subprocess
from pathlib import Path

from modeling_deltanet.cache_deltanet import new_file


def write(path: Path, record: dict) -> None:
    """Under a temporary name first: benchmarks write after every figure, and one that is cut off keeps what it has. A
    folder that is missing is made.

    The commit that was measured is written too, where there is a repository ("-dirty": with changes).
    """
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--exclude=*"]
    if shutil.which("git") is not None:
        found = subprocess.run(describe, capture_output=True, text=True)
        if found.returncode == 0:
            record.setdefault("commit", found.stdout.strip())
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        unfinished.write_text(_expanded(record, "") + "\n")


def _expanded(record: dict, indent: str) -> str:
    """One entry per line; of a list of dicts, one row per line."""
    lines = [f"{indent} {json.dumps(key)}: {_text(value, indent + ' ')}" for key, value in record.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _text(value, indent: str) -> str:
    if isinstance(value, dict) and any(map(_is_rows, value.values())):
        return _expanded(value, indent)
    if _is_rows(value):
        return "[\n" + ",\n".join(f"{indent} {_text(row, indent + ' ')}" for row in value) + f"\n{indent}]"
    return json.dumps(value)


def _is_rows(value) -> bool:
    return isinstance(value, list) and any(isinstance(row, dict) for row in value)
