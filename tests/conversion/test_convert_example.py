"""`examples/convert_llama.py` and `convert_smollm2.py` at a size of seconds. What they are for needs minutes."""

import copy
import importlib.util
import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
from test_evaluate import tokenizer  # noqa: F401  a fixture
from tiny import tiny_llama

from deltanet_conversion.interrupt import Stopped


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


CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


def test_a_chat_model_goes_the_whole_way(monkeypatch, tmp_path, tokenizer, capsys):  # noqa: F811
    """The command that the README names for one's own chat model would break between two of its steps, do a step
    twice, or leave a card without its figures.
    """
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chatty")
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=1).save_pretrained(tmp_path / "chatty")
    (tmp_path / "text.txt").write_text("The delta rule writes what is new. " * 20)
    said = [{"role": role, "content": "The delta rule writes."} for role in ("user", "assistant")]
    (tmp_path / "more.jsonl").write_text(json.dumps({"messages": said}))
    monkeypatch.setattr("pydoc_data.topics.topics", {str(i): f"{i} is what a document says. " * 12 for i in range(12)})
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setattr("deltanet_conversion.evaluate.AGREEMENT_TOKENS", 4)
    out, student = tmp_path / "run", tmp_path / "run" / "distilled"
    arguments = (
        f"--smoke --teacher {tmp_path / 'chatty'} --output-dir {out} --compare --keep auto:25% "
        "--chat-tokens 300 --held-out-tokens 60 --max-new-tokens 12 --calibration-tokens 64 --align-tokens 64 "
        "--distill-tokens 64 --long-tokens 0 --length 16 --batch-size 2 --recall-lengths 512 --episodes 1 "
        f"--speed-lengths 8 --eval-length 16 --text {tmp_path / 'text.txt'} --chats {tmp_path / 'more.jsonl'}"
    ).split()
    monkeypatch.setattr(sys, "argv", ["convert_smollm2.py", *arguments])
    stopped = [Stopped("the machine is somebody else's")]
    module = runpy.run_path(str(EXAMPLE.with_name("convert_smollm2.py")))
    evaluate = module["main"].__globals__["evaluate"]

    def stops_once(*args):
        if stopped:
            raise stopped.pop()
        return evaluate(*args)

    monkeypatch.setitem(module["main"].__globals__, "evaluate", stops_once)
    with pytest.raises(Stopped):
        module["main"]()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    module["main"]()
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    facts = json.loads((student / "conversion.json").read_text())
    assert len(facts["layer_scores"]["scores"]) == 4 and {"align", "distill"} <= facts.keys()
    assert facts["distill"]["data"] == ["chats.jsonl", "more.jsonl", "docs.jsonl"]
    figures = json.loads((student / "evaluation.json").read_text())
    columns = {row.get("of", "") for row in figures["results"] if row["metric"] == "perplexity"}
    stages = {"hybrid", "aligned"}
    assert columns == {"", "teacher", "even distilled", *stages, *(f"even {name}" for name in stages)}
    card = (student / "README.md").read_text()
    assert "KL to the teacher" in card and "greedy agreement" in card and "the next token after 8, teacher" in card
    transcript = (student / "transcript.md").read_text()
    assert (
        transcript.count("**Teacher:**") == transcript.count("**Student:**") == transcript.count("**Prompt:**") == 10
    )
    assert str(tmp_path) not in card + transcript
    assert "even distilled" in capsys.readouterr().out
