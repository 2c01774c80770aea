"""Every measured figure of the documentation is what a file under `benchmarks/results/` says.

For a writer: a table of figures is a block that `benchmarks/figures.py` writes. A figure in a sentence (a number with
a unit of time, memory or speed, or one below 1) names its file in the same paragraph, as a link; one in a table that
is written by hand, in the paragraph above it. A model card's files lie beside it.
"""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import figures  # noqa: E402


UNITS = {"ms": 1, "us": 1e3, "s": 1, "MB": 1, "GB": 1, "TB/s": 1, "tokens/s": 1, "K tokens/s": 1e-3}
FIGURE = re.compile(
    r"(?<![\w.^,/-])(?:(\d[\d,]*(?:\.\d+)?) ?(K tokens/s|tokens/s|TB/s|ms|us|s|MB|GB)\b|(0\.\d+)(?![\w.]))"
)
# What looks like a figure and is none: code, equations, versions, addresses, names of GPUs.
NO_FIGURE = re.compile(
    r"```.*?```|^ {4,}\S.*?$|`[^`]*`|\]\([^)]*\)"
    r"|H\d00 \d+GB|(?:attention|bitsandbytes|fla|kernels|liger|torch|Transformers|Triton) v?\d+(?:\.\d+)+",
    re.DOTALL | re.MULTILINE,
)


def numbers(value) -> list[float]:
    """All numbers in a file of results, those in its notes too."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for each in value for x in numbers(each)]
    if isinstance(value, str):
        return [float(x) for x in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w]|\.\d)", value)]
    return [value] if isinstance(value, int | float) else []


def paragraphs(text: str) -> list[tuple[str, str]]:
    """Paragraphs and items of lists, without the blocks that `figures.py` writes, each with the text that may name its
    files: its own, for a table also the paragraph above it.
    """
    found = [
        part for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]\s|\d+\.\s))", figures.BLOCK.sub("", text)) if part.strip()
    ]
    return [(part, above + part if part.startswith("|") else part) for above, part in zip(["", *found], found)]


def unproved(paragraph: str, naming: str, beside: list[Path]) -> list[str]:
    """The figures of a paragraph that none of the files that `naming` names has, to the digits that are written."""
    named = [figures.RESULTS / name for name in re.findall(r"results/([\w-]+\.json)", naming)]
    found = [x for path in [*named, *beside] for x in numbers(json.loads(path.read_text()))]
    wrong = []
    for number, unit, fraction in FIGURE.findall(NO_FIGURE.sub(" ", paragraph)):
        written = (number or fraction).replace(",", "")
        places, scale = len(written.partition(".")[2]), UNITS.get(unit, 1)
        if not any(f"{scale * x:.{places}f}" == written for x in found):
            wrong.append(f"{written} {unit}".strip())
    return wrong


@pytest.mark.parametrize("path", figures.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_figure_is_what_its_file_says(path):
    """A reader would decide by a figure that nobody measured, or that another version had."""
    text = path.read_text()
    assert figures.written(text) == text, "`make docs` writes the tables anew"
    beside = sorted(path.parent.glob("*.json")) if "model_cards" in path.parts else []
    wrong = {part: found for part, naming in paragraphs(text) if (found := unproved(part, naming, beside))}
    assert not wrong, "\n\n".join(f"no file has {', '.join(found)}: {text}" for text, found in wrong.items())


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("It takes 3.3 us.", ["3.3 us"]),
        ("It takes 3.3 us ([file](results/h200_step.json)), and 4.4 us.", ["4.4 us"]),
        ("An error of 0.0048, beside fla 0.6.0, `x = 0.5`, 24 tokens.", ["0.0048"]),
        ("68.9 K tokens/s and 66 GB ([file](results/h200_train.json)), not 65 GB.", ["65 GB"]),
        (
            "Step ([file](results/h200_step.json)):\n\n| batch | us |\n|---|---|\n| 1 | 29 us |\n| 2 | 28 us |",
            ["28 us"],
        ),
    ],
)
def test_a_figure_without_a_file_is_found(text, wrong):
    """The test above would pass because it sees nothing."""
    assert [figure for part, naming in paragraphs(text) for figure in unproved(part, naming, [])] == wrong


def test_every_file_of_results_is_named_and_says_where_it_comes_from():
    """A figure could not be repeated, or a measurement would lie there unread."""
    files = {path.stem for path in figures.RESULTS.glob("*.json")}
    assert files == figures.FILES.keys() and {name for runs in figures.RUNS.values() for name in runs} <= files
    for name in files:
        record = figures.load(name)
        assert {"date", "commit"} <= record.keys() and {"command", "what"} & record.keys(), f"{name}.json lacks one"


FORWARD_AND_BOTH = [
    ("fwd_ms", "fwdbwd_ms"),
    ("forward_ms", "forward_backward_ms"),
    ("other_forward_ms", "other_forward_backward_ms"),
]


def pairs(value) -> list[tuple[float, float]]:
    """The times in a file of results: of a forward pass, and of the same with backward."""
    if isinstance(value, list):
        return [pair for each in value for pair in pairs(each)]
    if not isinstance(value, dict):
        return []
    here = [(value[x], value[y]) for x, y in FORWARD_AND_BOTH if isinstance(value.get(x), float)]
    return here + pairs([each for key, each in value.items() if not key.startswith("ratio")])


def test_no_row_comes_from_a_busy_machine():
    """A forward pass that takes longer than with its backward says that the row was not measured in quiet."""
    found = {name: pairs(figures.load(name)) for name in figures.FILES}
    assert len(found["cpu"]) > 8 and len(found["h200_ops"]) > 10
    assert not [(name, forward, both) for name in found for forward, both in found[name] if forward > both]


def test_every_picture_says_what_was_measured():
    """A curve without shape, hardware and date says nothing, and cannot be told from an older one."""
    pictures = {path.name for path in figures.RESULTS.iterdir() if path.suffix in (".png", ".svg")}
    assert pictures == set(figures.PLOTS.values())
    for name, picture in figures.PLOTS.items():
        title = Image.open(figures.RESULTS / picture).text["Title"]
        assert title == figures.title_of(figures.load(name)), "python benchmarks/figures.py --plot draws it anew"


def test_what_a_run_lacks_is_a_dash(monkeypatch):
    """A peer that failed, or did not run at a shape, would end the writing of all tables."""
    times = {"fwd_ms": 1.0, "fwdbwd_ms": 2.0}
    rows = [
        {
            "shape": [1, 64, 1, 1, 16, 16],
            "results": {"ours": times, "fla": times, "flash_qla": {"error": "ValueError"}},
        },
        {"shape": [1, 64, 1, 2, 16, 16], "results": {"ours": times, "flash_qla": times}},
    ]
    error = dict.fromkeys(["o", "dq", "dk", "dv", "dbeta", "dg"], 0.004)
    errors = [{"shape": [1, 512, 1, 1, 16, 16], "gate": "mild", "ours": error, "fla": error}]
    train = [
        {"model": "m", "way": "ours", "tokens_per_second": 1234.0},
        {"model": "m", "way": "fla", "error": "ImportError"},
    ]
    monkeypatch.setitem(figures.RUNS, "gated", ["one"])
    monkeypatch.setitem(figures.RUNS, "accelerate", ["one"])
    monkeypatch.setitem(figures.RUNS, "rule_h100", [])
    monkeypatch.setattr(figures, "load", lambda name: {"rows": rows, "errors": errors, "train": train})
    assert "| 1, 64, 1, 1, 16, 16 | 1.00 (-; 1.00; -) | 2.00 (-; 2.00; -) |" in figures.gated()
    assert "| 1, 64, 1, 2, 16, 16 | 1.00 (-; -; 1.00) | 2.00 (-; -; 2.00) |" in figures.gated()
    assert "| 1, 1, 16, 16 | mild | 0.0040 (0.0040) |" in figures.gated_errors()
    assert "| m | 1234 | - |" in figures.accelerate()
