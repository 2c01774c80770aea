"""`examples/convert_llama.py` at a size of seconds. What it is for, a teacher that recalls, needs minutes."""

import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import pytest


EXAMPLE = Path(__file__).parents[2] / "examples" / "convert_llama.py"
SMALL = (
    "--recall-steps 1 --steps 2 --batch-size 4 --length 96 --hidden-size 64 --head-dim 32 --layers 4 --vocab-size "
    "400 --megabytes 0.1 --symbols 9 --align-tokens 1024 --distill-tokens 1024 --eval-blocks 4"
).split()


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLE.parent)  # as Python does for a script
    spec = importlib.util.spec_from_file_location("convert_llama", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["convert_llama.py", "--output-dir", str(tmp_path / "run"), *SMALL])
    return module


def test_the_example_leaves_a_student_and_the_figures_of_its_card(example, tmp_path):
    """The one script that shows a conversion would not run, or leave figures that the card cannot read."""
    example.main()
    student = tmp_path / "run" / "distilled"
    evaluation = json.loads((student / "evaluation.json").read_text())
    assert (
        evaluation["command"].startswith("python examples/convert_llama.py --recall-steps 1 --steps 2")
        and evaluation["hardware"]
    )
    models = {"teacher", "before alignment", "after alignment", ""}
    for metric in ("perplexity", "overwriting recall"):
        found = {row.get("of", ""): row["value"] for row in evaluation["results"] if row["metric"] == metric}
        assert found.keys() == models and all(value >= 0 for value in found.values())
    facts = json.loads((student / "conversion.json").read_text())
    assert facts["teacher"] == "teacher" and facts["kept_layers"] == [3] and {"align", "distill"} <= facts.keys()
    assert str(tmp_path) not in json.dumps(evaluation) + json.dumps(facts)


def test_recall_asks_for_the_last_value(example):
    """The recall figure would measure another task than the one that it is named after."""
    for make in (example.recall_episode, lambda draw, symbols: example.recall_stream(draw, symbols, 200)):
        tokens = re.findall(r"<[^>]+>", make(random.Random(0), 16))
        memory, asked, writes = {}, 0, 0
        while len(tokens) > 2:  # a stream ends anywhere
            question = tokens[0] == "<q>"
            key, value = tokens[question], tokens[question + 1]
            if question:
                assert memory[key] == value
                asked += 1
            else:
                memory[key] = value
                writes += 1
            tokens = tokens[question + 2 :]
        assert len(memory) == 8 and asked >= 8
    assert writes < 200
