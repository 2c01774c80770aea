"""`make quickstart` at a size of seconds: the whole way, and Ctrl-C in the middle of it."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltanet_conversion.cli import app


QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.py"
# (shorter or fewer sequences cost more: the held-out text is of one size, and is read six times)
SMALL = "--steps 12 --lora-steps 4 --batch-size 16 --length 128 --hidden-size 64 --vocab-size 300".split()


def start(folder, *options):
    return subprocess.Popen(
        [sys.executable, QUICKSTART, "--output-dir", folder, *SMALL, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def finish(process):
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def test_leaves_folders_that_could_be_pushed(tmp_path, monkeypatch, capsys):
    """The first thing a user runs has to work, without a warning, and leave a model, an adapter and a merged model
    that the commands it prints find fit for the Hub."""
    code, output = finish(start(tmp_path, "--recall-steps", "60"))
    assert code == 0, output
    for word in ("warn", "deprecat", "traceback", "failed", "skipping", "{'"):
        assert word not in output.lower(), output

    shares = dict(re.findall(r"overwriting recall, (with|without) .*│ +(\d+)% +│\n", output))
    assert int(shares["with"]) > 80 and int(shares["without"]) < 60, output

    folder = tmp_path / "deltanet-quickstart"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "README.md", "loss.png", "evaluation.json", "config.json", "model.safetensors", "tokenizer.json",
        "chat_template.jinja", "modeling_deltanet.py", "configuration_deltanet.py", "delta_rule.py",
        "kernel_switch.py", "cache_deltanet.py", "short_conv.py", "linear_attention_deltanet.py", "norm_deltanet.py",
        "rotary_deltanet.py",
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "| documentation, held out | perplexity |" in card
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    [trained] = [r["value"] for r in results if r["dataset"].startswith("documentation") and "of" not in r]
    assert f"value: {trained}" in card  # the trained model's figure, not that of before, is what the Hub reads
    assert "From `trainer_state.json`: 12 steps" in card
    assert str(tmp_path) not in card
    assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]

    commands = [shlex.split(line) for line in output.splitlines() if " push " in line]
    assert len(commands) == 3 and output.splitlines()[-1].split() == commands[-1]
    for command in commands:
        done = CliRunner().invoke(app, command[command.index("push") :])
        assert done.exit_code == 0 and command[-1] == "--dry-run", done.output

    monkeypatch.syspath_prepend(QUICKSTART.parent)  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [str(QUICKSTART), "--output-dir", str(tmp_path), *SMALL])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(QUICKSTART), run_name="__main__")
    assert refused.value.code == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="SIGINT")
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path):
    """Stopping a long run must not cost it."""
    more = ["--steps", "3000", "--recall-steps", "1"]
    training = tmp_path / "training"
    steps = [0]
    for trainings in (3, 1):  # the last is the language model's; the first two are done when it goes on
        process = start(tmp_path, *more)
        for _ in range(trainings):
            while "Ctrl-C saves" not in process.stdout.readline():
                assert process.poll() is None
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        code, output = finish(process)
        assert code == 130 and "[transformers]" not in output, output
        steps.append(max(int(path.name.split("-")[1]) for path in training.glob("checkpoint-*")))
    assert 0 < steps[1] < steps[2] < 3000
