"""`examples/pretrain.py` and `finetune_lora.py` at a size of seconds."""

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainerControl, TrainingArguments

from deltanet_conversion import interrupt


EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = "--preset none --hidden_size 64 --layers 2 --hybrid sliding --vocab_size 300 --length 32 --held_out 4"
TRAIN = "--per_device_train_batch_size 4 --max_steps 6 --logging_steps 1 --save_steps 3 --use_cpu True"


def run(script: str, *arguments, launcher: str = "") -> str:
    """What the script prints and complains of; as a user would start it, without a network."""
    command = [sys.executable, *launcher.split(), EXAMPLES / script, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs a script in this process: exit code, what it printed, and what it complained about."""
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script

    def run_here(script: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as done:
            code = done.code
        return code, *capsys.readouterr()

    return run_here


def write_rows(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


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
    assert "find_unused_parameters" not in output  # DDP's warning of a search that costs time and finds nothing
    # the same rows, summed in another order
    assert losses(folder / "two" / "checkpoint-6") == pytest.approx(
        losses(folder / "whole" / "checkpoint-6"), rel=1e-4
    )


def test_lora_fine_tuning(pretrained, here, tmp_path):
    """The example for one's own data would fail on the kinds of data that TRL takes."""
    folder, _, _ = pretrained
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"{i} and", "completion": f" {i + 1}"} for i in range(100)])
    arguments = ["--model", folder / "whole" / "model", "--data", data, *TRAIN.split(), "--merge", "True"]
    code, output, _ = here("finetune_lora.py", *arguments, "--max_length", 32, "--output_dir", tmp_path / "lora")
    assert code == 0 and "saved" in output and "are of prompts" in output
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "lora" / "merged" / "model.safetensors").exists()


def test_no_text_is_lost_to_packing(pretrained, here, tmp_path):
    """A fine-tuning would learn the first row of each document and drop the rest, as TRL's packing does by default."""
    folder, _, _ = pretrained
    data = write_rows(
        tmp_path / "data.jsonl", [{"text": " ".join(f"word{i % 50}" for i in range(500))}, {"text": "b"}]
    )
    arguments = ["--model", folder / "whole" / "model", "--data", data, *TRAIN.split(), "--max_steps", 1]
    arguments += ["--max_length", 64]
    code, output, _ = here("finetune_lora.py", *arguments, "--output_dir", tmp_path / "all")
    tokens = len(
        AutoTokenizer.from_pretrained(folder / "whole" / "model")(
            json.loads(data.read_text().split("\n")[0])["text"]
        ).input_ids
    )
    assert code == 0 and f"{tokens + 3:,} of {tokens + 3:,} tokens are trained on" in output, output
    _, output, _ = here("finetune_lora.py", *arguments, "--output_dir", tmp_path / "cut", "--packing_strategy", "bfd")
    assert f"66 of {tokens + 3:,} tokens are trained on" in output and "cut off at --max_length 64" in output, output


def test_pretraining_reads_all_text(pretrained, here, monkeypatch):
    """Short documents, a thousand of which fill a few rows, would lose a part of each thousand."""
    monkeypatch.syspath_prepend(EXAMPLES)
    pretrain = runpy.run_path(str(EXAMPLES / "pretrain.py"))
    tokenizer = AutoTokenizer.from_pretrained(pretrained[0] / "whole" / "model")
    texts = [f"{i} and so on" for i in range(1100)]
    stream = pretrain["IterableDataset"].from_generator(lambda: ({"text": text} for text in texts))
    rows = list(pretrain["packed"](stream, tokenizer, 96))
    assert all(len(row[name]) == 96 for row in rows for name in ("input_ids", "position_ids", "labels"))
    learned = [label for row in rows for label in row["labels"] if label != -100]
    wanted = [token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id][1:]]
    assert learned == wanted


@pytest.mark.parametrize("script", ["pretrain.py", "finetune_lora.py"])
def test_an_interrupted_run_ends_in_the_same_bits(pretrained, here, tmp_path, monkeypatch, script):
    """Stopping a run would lose it; or it would go on to another model, read other text, or warn of its settings."""
    folder, arguments, _ = pretrained
    if script == "pretrain.py":
        shutil.copytree(folder / "whole" / "tokenizer", tmp_path / "stopped" / "tokenizer")
    else:
        data = write_rows(tmp_path / "data.jsonl", [{"text": f"{i} and {i + 1}"} for i in range(100)])
        arguments = ["--model", folder / "whole" / "model", "--data", data, *TRAIN.split(), "--max_length", 32]
        arguments += ["--save_steps", 0.5]
        assert here(script, *arguments, "--output_dir", tmp_path / "whole")[0] == 0
    arguments += ["--output_dir", tmp_path / "stopped"]
    step = Trainer.training_step
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    code, output, _ = here(script, *arguments)
    assert code == 130 and "Stopped at step 2" in output
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-2"]
    (tmp_path / "stopped" / "checkpoint-3").mkdir()  # one that a second Ctrl-C has left half written
    code, output, complaints = here(script, *arguments)
    assert code == 0 and calls[2] == 2, output
    assert "do not match" not in complaints
    whole = folder / "whole" / "model" if script == "pretrain.py" else tmp_path / "whole" / "adapter"
    [file] = whole.glob("*.safetensors")
    there, here_ = load_file(file), load_file(tmp_path / "stopped" / whole.name / file.name)
    assert all((weight == here_[name]).all() for name, weight in there.items())

    steps = len(calls)
    assert here(script, *arguments)[0] == 0
    after = load_file(tmp_path / "stopped" / whole.name / file.name)
    assert len(calls) == steps and all((weight == after[name]).all() for name, weight in there.items())

    [flag] = [name for name in ("--text", "--data") if name in arguments]
    other = write_rows(tmp_path / "other.jsonl", [{"text": "other"}])
    arguments[arguments.index(flag) + 1] = other
    code, _, complaints = here(script, *arguments)  # its result would be the old run's, under the new data's name
    assert code == 2 and "other settings" in complaints and "other.jsonl" in complaints


def test_processes_stop_together(monkeypatch):
    """A process that hears of Ctrl-C a step later than the others would wait for their gradients for ever."""
    others = []
    monkeypatch.setattr(interrupt.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(interrupt.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(interrupt.dist, "new_group", lambda backend: backend)
    monkeypatch.setattr(interrupt.dist, "all_reduce", lambda flag, op, group: flag.fill_(max(int(flag), *others)))
    left = []
    monkeypatch.setattr(interrupt.dist, "destroy_process_group", left.append)
    handler = signal.getsignal(signal.SIGINT)
    callback, control = interrupt.SaveOnInterrupt(), TrainerControl()
    callback.on_train_begin(None, None, control)
    others[:] = [0, 0]
    callback.on_step_end(None, None, control)
    assert not control.should_training_stop
    others[:] = [0, 1]
    callback.on_step_end(None, None, control)
    callback.on_train_end(None, None, control)
    assert control.should_training_stop and control.should_save and callback.interrupted
    assert signal.getsignal(signal.SIGINT) is handler
    assert left == ["gloo"]  # at the interpreter's end, a group that is still there may abort the process


@pytest.mark.parametrize("met_before, end, parts", [(False, None, 1), (False, interrupt.Stopped, 1), (True, None, 0)])
def test_processes_part_at_the_end(monkeypatch, met_before, end, parts):
    """A run that had gone well would end in "terminate called", now and then; or a caller would lose its own group."""
    met, left = [met_before], []
    monkeypatch.setattr(interrupt.dist, "is_initialized", lambda: met[0])
    monkeypatch.setattr(interrupt.dist, "destroy_process_group", lambda: left.append(1))
    with contextlib.nullcontext() if end is None else pytest.raises(end), interrupt.parting_at_the_end():
        met[0] = True
        if end is not None:
            raise end
    assert len(left) == parts


WRONG = {
    "Alpaca's columns": ([{"instruction": "Add.", "input": "1", "output": "2"}], '"output" is its "completion"'),
    "an empty file": ([], "data.jsonl: the file is empty"),
    "broken JSON": ('{"text": "a"}\n{"text": "b\n', "data.jsonl, line 2: no JSON"),
    "no objects": ([[1], [2]], "data.jsonl, line 1: wanted an object"),
    "numbers": ([{"text": 1}], '"text" 1 in its first row, wanted text'),
    "a gap": ([{"text": "a"}, {"text": None}], 'no "text" in row 2'),
    "roles without a name": ([{"messages": [{"from": "human", "value": "a"}]}], 'wanted a list of {"role"'),
    "nothing to learn": ([{"text": ""}], "holds nothing to learn"),
    "no file": (None, "data.jsonl: no such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_data_of_another_kind_is_named(pretrained, here, tmp_path, name):
    """A user would get a traceback from the depths of `datasets` or TRL."""
    content, wanted = WRONG[name]
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
    arguments = ["--model", pretrained[0] / "whole" / "model", "--data", data, *TRAIN.split()]
    code, _, complaints = here("finetune_lora.py", *arguments, "--output_dir", tmp_path / "lora")
    assert code == 2 and wanted in complaints.splitlines()[-1], complaints
    assert not (tmp_path / "lora").exists()  # the corrected command would meet a folder in its way


def test_chats_need_a_chat_template(pretrained, here, tmp_path):
    """Chats could not be learned by what `pretrain.py` makes, or the error would not say what to do."""
    folder, _, _ = pretrained
    chat = [{"role": "user", "content": "1 and?"}, {"role": "assistant", "content": "2"}]
    data = write_rows(tmp_path / "data.jsonl", [{"messages": chat}] * 8)
    shutil.copytree(folder / "whole" / "model", tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--data", data, *TRAIN.split(), "--max_steps", 1]
    arguments += ["--assistant_only_loss", "True", "--output_dir", tmp_path / "lora"]
    code, output, complaints = here("finetune_lora.py", *arguments)
    assert code == 0 and "16 of " in output, output  # the answer and its end, eight times
    assert "template" not in complaints
    shutil.rmtree(tmp_path / "lora")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    code, _, complaints = here("finetune_lora.py", *arguments)
    assert code == 2 and "--chat_template_path" in complaints


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("--text {}/text.txt --max_step_s 3", "there is no --max_step_s: did you mean --max_steps?"),
        ("--text {}/none.txt", "none.txt: no such file"),
        ("--text {}/nothing", "the folder holds no text"),
        ("--text {}/empty.txt", "there is no text in it"),
        ("--text {}/short.txt --held_out 1", "the text is too short"),
        ("--text {}/text.txt --tokenizer {}/none", "none: no such folder"),
        ("--text {}/text.txt --preset 340m", "no preset '340m'"),
        ("--text {}/text.txt --sample_by lines", "invalid choice: 'lines'"),
        ("--text {}/text.txt --report_to tensorboard", "pip install '.[tensorboard]'"),
        ("--dataset {}/folder --text_column body", "has columns text"),
        ("", "give either --dataset or --text"),
    ],
)
def test_wrong_input_of_pretraining_is_named(here, tmp_path, monkeypatch, arguments, wanted):
    """A user would get a traceback; or the corrected command would use the tokenizer of the failed one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import shared

    monkeypatch.setattr(shared, "is_tensorboard_available", lambda: False)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "folder").mkdir()
    texts = {"text": "a b\n" * 99, "empty": "\n \n", "short": "a b", "folder/part": "a\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    out = tmp_path / "out"
    common = ["--preset", "none", "--vocab_size", 300, "--use_cpu", "True", "--output_dir", out]
    code, _, complaints = here("pretrain.py", *common, *arguments.replace("{}", str(tmp_path)).split())
    assert code == 2 and wanted in complaints.splitlines()[-1], complaints
    assert not (out / "settings.json").exists()


def test_a_folder_is_text_too(here, tmp_path):
    """`--text FOLDER` would be refused, while `deltanet align --data FOLDER` takes it."""
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "a.md").write_text("\n".join(f"{i} and {i + 1}" for i in range(200)))
    arguments = ["--text", tmp_path / "folder", *SMALL.split(), *TRAIN.split(), "--max_steps", 1]
    code, output, _ = here("pretrain.py", *arguments, "--output_dir", tmp_path / "out")
    assert code == 0 and "saved" in output


def test_a_launch_of_one_process_is_told(monkeypatch, tmp_path):
    """A user would believe that two processes work."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import shared

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    shared.check_setup(arguments)
    # What `accelerate launch --num_processes 2` sets on a CPU.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(UserWarning, match="torchrun --nproc_per_node"):
        shared.check_setup(arguments)


@pytest.mark.parametrize("script", ["pretrain.py", "finetune_lora.py"])
def test_help_shows_how_to_start(here, script):
    """A newcomer would have to read the source."""
    code, output, _ = here(script, "--help")
    assert code == 0
    for launcher in ("accelerate launch --num_processes 8", "torchrun --nproc_per_node 2"):
        assert f"    {launcher} examples/{script}" in output
