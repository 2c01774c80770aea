"""`examples/pretrain.py` and `examples/finetune_lora.py` at a size of seconds."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = "--preset none --hidden_size 64 --layers 2 --hybrid sliding --vocab_size 300 --length 32 --held_out 4"
TRAIN = "--per_device_train_batch_size 4 --max_steps 6 --logging_steps 1 --save_steps 3 --use_cpu True"


def run(script: str, *arguments, launcher: str = "") -> str:
    """What the script prints; as a user would start it, without a network."""
    command = [sys.executable, *launcher.split(), EXAMPLES / script, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def losses(checkpoint: Path) -> list[float]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A text and a run of six steps over it."""
    folder = tmp_path_factory.mktemp("pretrain")
    text = folder / "text.txt"
    text.write_text("\n".join(f"{i} is a number and {i + 1} is the next number after {i}" for i in range(2000)))
    arguments = ["--text", text, *SMALL.split(), *TRAIN.split()]
    output = run("pretrain.py", *arguments, "--output_dir", folder / "whole")
    return folder, arguments, output


def test_pretraining_leaves_a_model_that_has_learned(pretrained):
    """The way from text to a model would fail, or end without figures."""
    folder, _, output = pretrained
    assert "held out: loss" in output and "1 linear_attention, 1 sliding_attention" in output
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_deltanet.py"} <= {
        path.name for path in (folder / "whole" / "model").iterdir()
    }
    history = losses(folder / "whole" / "checkpoint-6")
    assert len(history) == 6 and history[-1] < history[0]


def test_an_interrupted_run_ends_in_the_same_bits(pretrained):
    """A run that was stopped would read other text than one that was not, and become another model."""
    folder, arguments, _ = pretrained
    (folder / "resumed").mkdir()
    shutil.copytree(folder / "whole" / "tokenizer", folder / "resumed" / "tokenizer")
    shutil.copytree(folder / "whole" / "checkpoint-3", folder / "resumed" / "checkpoint-3")
    run("pretrain.py", *arguments, "--output_dir", folder / "resumed")
    assert losses(folder / "resumed" / "checkpoint-6") == losses(folder / "whole" / "checkpoint-6")
    whole, resumed = (load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "resumed"))
    assert all((weight == resumed[name]).all() for name, weight in whole.items())


def test_two_processes_learn_what_one_does(pretrained):
    """`accelerate launch` with the same flags would train on other text, or twice on the same."""
    folder, arguments, _ = pretrained
    arguments = [
        "2" if before == "--per_device_train_batch_size" else x for before, x in zip(["", *arguments], arguments)
    ]
    shutil.copytree(folder / "whole" / "tokenizer", folder / "two" / "tokenizer")
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launcher += " --dynamo_backend no"
    output = run("pretrain.py", *arguments, "--output_dir", folder / "two", launcher=launcher)
    assert "2 process(es)" in output
    # the same rows, summed in another order
    assert losses(folder / "two" / "checkpoint-6") == pytest.approx(
        losses(folder / "whole" / "checkpoint-6"), rel=1e-4
    )


def test_lora_fine_tuning(pretrained, tmp_path):
    """The example for one's own data would fail on the kinds of data that TRL takes."""
    folder, _, _ = pretrained
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i} and", "completion": f" {i + 1}"}) for i in range(100)))
    arguments = ["--model", folder / "whole" / "model", "--data", data, *TRAIN.split(), "--merge", "True"]
    output = run("finetune_lora.py", *arguments, "--max_length", "32", "--output_dir", tmp_path / "lora")
    assert "saved" in output
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "lora" / "merged" / "model.safetensors").exists()


def test_help_shows_how_to_start(monkeypatch, capsys):
    """A newcomer would have to read the source."""
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(EXAMPLES / "pretrain.py"), run_name="__main__")
    assert done.value.code == 0
    assert "    accelerate launch --num_processes 8 examples/pretrain.py" in capsys.readouterr().out
