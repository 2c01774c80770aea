"""The command `deltanet`: what it prints, and its exit codes."""

import json
import sys
from importlib import import_module
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_llama import make_teacher
from test_stages import pair, tokenizer  # noqa: F401  fixtures
from tiny import FULL, LINEAR, SLIDING, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from deltanet_conversion import cli, convert_checkpoint, inspect_checkpoint
from deltanet_conversion.cli_output import HUB_ERRORS


convert_module = import_module("deltanet_conversion.convert")


@pytest.fixture
def deltanet(monkeypatch, capsys):
    """Run the command line as a shell would: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["deltanet", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "command", ["convert", "sample", "align", "distill", "inspect", "export", "generate", "evaluate", "check", "env"]
)
def test_every_command_has_help_with_an_example(deltanet, command):
    """A user would have to read the source to make a first call."""
    code, out, _ = deltanet(command, "--help")
    assert code == 0 and f"deltanet {command} " in out and "Example" in out
    assert command in deltanet("--help")[1]
    assert deltanet(command, "-h")[1] == out


def test_version_and_environment(deltanet):
    """A bug report could not say what it is about."""
    assert deltanet("--version")[:2] == (0, f"deltanet {version('modeling-deltanet')}\n")
    code, out, _ = deltanet("env", "--json")
    found = json.loads(out)
    assert code == 0 and found["torch"] == version("torch") and found["device"] and found["peft"]
    assert f"torch: {version('torch')}\n" in deltanet("env")[1]


def test_the_way_from_a_teacher_to_text(deltanet, pair, tmp_path):  # noqa: F811
    """The documented sequence of commands would break between two of them."""
    teacher, data, sizes = pair["teacher"], pair["data"][0], ("--tokens", 128, "--length", 16, "--batch-size", 4)
    code, out, _ = deltanet("convert", teacher, tmp_path / "hybrid", "--keep", "25%", "--json")
    assert code == 0 and json.loads(out)["layer_types"] == [LINEAR, LINEAR, LINEAR, FULL]
    code, out, _ = deltanet(
        "align", teacher, tmp_path / "hybrid", tmp_path / "aligned", "--data", data, *sizes, "--json"
    )
    assert code == 0 and json.loads(out)["steps"] == 2
    code, out, _ = deltanet(
        "distill", teacher, tmp_path / "aligned", tmp_path / "done", "--data", data, *sizes,
        "--lora-rank", 2, "--mixer-learning-rate", 1e-3, "--json",
    )  # fmt: skip
    settings = json.loads(out)
    assert code == 0 and (settings["lora_rank"], settings["mixer_learning_rate"]) == (2, 1e-3)
    code, out, _ = deltanet(
        "generate", tmp_path / "done", "w1 w2", "--max-new-tokens", 3, "--temperature", 0, "--json"
    )
    assert code == 0 and json.loads(out)["tokens"] <= 3 and json.loads(out)["prompt"] == "w1 w2"
    code, out, _ = deltanet("inspect", tmp_path / "done")
    assert code == 0 and "linear_attention" in out and "{" not in out and "[" not in out
    assert "Required for a" in deltanet("convert", "--help")[1]


def test_errors_are_one_line_and_exit_code_one(deltanet, tmp_path):
    """A script could not tell a failure, or a user would be given a traceback."""
    make_teacher("llama", tmp_path / "teacher")
    code, out, err = deltanet("convert", tmp_path / "teacher", tmp_path / "out")
    assert (code, out) == (1, "") and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ") and "--keep" in err.splitlines()[-1]
    code, _, err = deltanet("convert", tmp_path / "teacher", tmp_path / "out", "--keep", "none", "--to", "fla")
    assert code == 1 and "'llama', not 'deltanet'" in err
    assert deltanet("convert", tmp_path / "teacher")[0] == 2
    assert deltanet("convert", tmp_path / "teacher", tmp_path / "out", "--kepe", "1")[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        "convert ./typo out", "convert ./typo out --keep 25%", "inspect ./typo", "generate ./typo w1",
        "align ./typo ./typo out --data ./typo", "distill ./typo ./typo out --data ./typo", "inspect a/b/c",
        "convert typo out", "inspect typo", "generate own/typo w1", "align typo own/typo out --data typo",
        "export typo out --to mlx", "card typo --repo-id own/typo", "push typo own/typo",
        "kernels build --source typo",
    ],
)  # fmt: skip
def test_every_command_fails_in_one_way(deltanet, arguments, tmp_path, monkeypatch):
    """A program would have to know for each command where its errors are, and people would read of the Hub's rules for
    names where they have mistyped a folder.
    """
    monkeypatch.chdir(tmp_path)
    code, out, err = deltanet(*arguments.split())
    assert (code, out) == (1, "") and err.startswith("error: ") and "Traceback" not in err
    folder = next(word for word in arguments.split() if "typo" in word or "/" in word)
    assert err.startswith(f"error: no such folder: {folder}") and len(err.splitlines()) == 1
    code, out, _ = deltanet(*arguments.split(), "--json")
    failure = json.loads(out)
    assert code == failure["exit_code"] == 1 and f"error: {failure['error']}\n" == err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_and_the_hub_have_exit_codes(deltanet, monkeypatch):
    """A script could not tell that it should try again."""
    for error, code in (
        (KeyboardInterrupt("stopped at step 3"), 130),
        (HUB_ERRORS[1]("connection lost"), 3),
        (ConnectionError("no route"), 1),
    ):
        monkeypatch.setattr("deltanet_conversion.inspect.inspect_checkpoint", _raiser(error))
        got, out, err = deltanet("inspect", "x", "--json")
        assert got == json.loads(out)["exit_code"] == code and str(error) in json.loads(out)["error"], err
        assert deltanet("inspect", "x")[0] == code
    monkeypatch.setattr(
        "deltanet_conversion.inspect.inspect_checkpoint", _raiser(ZeroDivisionError("a fault of ours"))
    )
    monkeypatch.setattr(sys, "argv", ["deltanet", "inspect", "x"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def _raiser(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_figures_that_are_none_are_valid_json(deltanet, monkeypatch):
    """A stage that diverged would print what no JSON parser reads."""
    monkeypatch.setattr("deltanet_conversion.inspect.inspect_checkpoint", lambda *args: {"loss": [float("nan"), 1.5]})
    assert deltanet("inspect", "x", "--json")[:2] == (0, '{"loss": [null, 1.5]}\n')


def test_names_with_brackets_are_shown_as_they_are(deltanet, monkeypatch):
    """A folder `runs[/b]` would end the command with a traceback about markup."""
    monkeypatch.setattr("deltanet_conversion.inspect.inspect_checkpoint", lambda *args: {"output": "runs[/b] :100:"})
    assert "runs[/b] :100:" in deltanet("inspect", "x")[1]


def test_one_of_several_processes_tells_the_result(deltanet, monkeypatch):
    """`accelerate launch` would print the result of each process, which together is no JSON."""
    monkeypatch.setenv("RANK", "1")
    assert deltanet("env", "--json")[:2] == (0, "")
    code, out, err = deltanet("inspect", "./typo", "--json")
    assert (code, out) == (1, "") and "no such folder" in err


@pytest.mark.parametrize(
    "options", ["", "--keep 25%", "--keep none --linear-decay", "--to fla", "--verify --dtype float16"]
)
@pytest.mark.parametrize("model_type", ["gpt_neox", "olmo_hybrid", None, 7])
def test_an_architecture_that_cannot_be_converted_says_so(deltanet, options, model_type, tmp_path):
    """A user would mend one option after the other, or download all weights, to learn that it was for nothing."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": model_type}))
    code, _, err = deltanet("convert", tmp_path / "source", tmp_path / "out", *options.split())
    assert code == 1 and f"is {model_type!r}, which cannot be converted" in err


def test_options_that_a_conversion_does_not_have_are_refused(deltanet, tmp_path):
    """`--no-linear-rope` would be accepted for a DeltaNet and do nothing."""
    tiny_model(layer_types=[LINEAR]).save_pretrained(tmp_path / "ours")
    for option in (("--no-linear-rope",), ("--linear-decay",), ("--keep", "all")):
        code, _, err = deltanet("convert", tmp_path / "ours", tmp_path / "out", "--to", "fla", *option)
        assert code == 1 and option[0] in err and "'deltanet'" in err
    code, _, err = deltanet("convert", tmp_path / "ours", tmp_path / "out")
    assert code == 1 and "--to fla" in err


def test_outputs_that_cannot_be_made_are_refused_first(deltanet, tmp_path):
    """Hours of training would end in `File exists`."""
    make_teacher("llama", tmp_path / "teacher")
    (tmp_path / "file").touch()
    teacher, out = tmp_path / "teacher", tmp_path / "file" / "deep" / "out"
    for command in (
        ("convert", teacher, out, "--keep", "all"),
        ("align", teacher, teacher, out, "--data", "x"),
        ("distill", teacher, teacher, out, "--data", "x"),
    ):
        code, _, err = deltanet(*command)
        assert code == 1 and err.endswith(
            f"error: {out} cannot be made: {tmp_path / 'file'} is a file, not a folder\n"
        )


def test_verify_gives_a_verdict(deltanet, tmp_path, monkeypatch):
    """A user would be given two numbers, and a script an exit code that says nothing."""
    make_teacher("llama", tmp_path / "teacher")

    def verdict(name, *options):
        code, out, _ = deltanet("convert", tmp_path / "teacher", tmp_path / name, *options, "--verify", "--json")
        return code, json.loads(out)["logits"]["verdict"]

    assert verdict("all", "--keep", "all") == (0, "equal")
    assert verdict("cast", "--keep", "all", "--dtype", "bfloat16") == (0, "equal")
    code, text = verdict("half", "--keep", "50%")
    assert code == 0 and text.startswith("not comparable: the mixers of 2 of 4 layers are new")

    read = convert_module.logit_difference

    def spoiled(source, target):
        file = target / "model.safetensors"
        weights = load_file(file)
        weights["model.norm.weight"][3] += 1
        save_file(weights, file, {"format": "pt"})
        return read(source, target)

    monkeypatch.setattr(convert_module, "logit_difference", spoiled)
    assert verdict("spoiled", "--keep", "all") == (1, "different")
    assert verdict("spoiled and cast", "--keep", "all", "--dtype", "float16") == (1, "different")


def test_adapters_and_folders_without_a_tokenizer(deltanet, tokenizer, tmp_path):  # noqa: F811
    """What is missing would be told as a file of some library, or an adapter would be taken for a broken model."""
    tiny_model(layer_types=[LINEAR]).save_pretrained(tmp_path / "base")
    code, _, err = deltanet("generate", tmp_path / "base", "w1")
    assert code == 1 and f"{tmp_path / 'base'} has no tokenizer (tokenizer.json)" in err
    assert json.loads(deltanet("inspect", tmp_path / "base", "--json")[1])["tokenizer"] is False
    tokenizer.save_pretrained(tmp_path / "base")
    assert json.loads(deltanet("inspect", tmp_path / "base", "--json")[1])["tokenizer"] is True

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    options = ("w1 w2", "--max-new-tokens", 8, "--temperature", 0, "--json")
    code, out, err = deltanet("generate", tmp_path / "adapter", *options)
    assert code == 0, err
    ids = adapter.eval().generate(torch.tensor([[1, 2]]), max_new_tokens=8, do_sample=False)
    assert json.loads(out)["text"] == tokenizer.decode(ids[0, 2:], skip_special_tokens=True)
    assert json.loads(out)["text"] != json.loads(deltanet("generate", tmp_path / "base", *options)[1])["text"]
    code, _, err = deltanet("inspect", tmp_path / "adapter")
    assert code == 1 and f"is an adapter and no model of its own: take its base, '{tmp_path / 'base'}'" in err
    (tmp_path / "base").rename(tmp_path / "moved")
    code, _, err = deltanet("generate", tmp_path / "adapter", "w1")
    assert code == 1 and f"is an adapter, and its base is missing: no such folder: {tmp_path / 'base'}" in err

    convert_checkpoint(tmp_path / "moved", tmp_path / "fla", to="fla")
    code, _, err = deltanet("generate", tmp_path / "fla", "w1")
    assert code == 1 and "is in fla's form: convert it first" in err


def test_inspect_counts_what_the_model_has(tmp_path):
    """Parameters and memory are what users choose a model by."""
    model = tiny_model(layer_types=[LINEAR, SLIDING, LINEAR, FULL], sliding_window=5)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert found["parameters"] == model.num_parameters()
    assert found["weight_bytes"] == 4 * model.num_parameters()
    assert found["layers"] == {LINEAR: 2, SLIDING: 1, FULL: 1}

    cache = model(input_ids=_ids(20), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    state = per_token = 0
    for layer in cache.layers:
        if layer.is_sliding if hasattr(layer, "is_sliding") else False:
            state += layer.keys.nbytes + layer.values.nbytes
        elif getattr(layer, "keys", None) is not None:
            per_token += (layer.keys.nbytes + layer.values.nbytes) // 20
        else:
            state += sum(x.nbytes for x in (*_tensors(layer.recurrent_states), *_tensors(layer.conv_states)))
    assert (found["state_bytes"], found["kv_bytes_per_token"]) == (state, per_token)


def _ids(n):
    from tiny import tokens

    return tokens(1, n)


def _tensors(states):
    return states.values() if isinstance(states, dict) else states if isinstance(states, (list, tuple)) else [states]


def test_inspect_reads_teachers_and_flas_form(tmp_path):
    """A user would have to convert before he knows what he converts."""
    teacher = make_teacher("qwen2 with windows", tmp_path / "teacher")
    found = inspect_checkpoint(tmp_path / "teacher")
    assert found["layers"] == {FULL: 2, SLIDING: 2} and found["parameters"] == teacher.num_parameters()
    gated = tiny_model(layer_types=[LINEAR], linear_use_decay=True)
    gated.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "fla", to="fla")
    for folder in ("ours", "fla"):
        found = inspect_checkpoint(tmp_path / folder)
        assert found["parameters"] == gated.num_parameters() and found["linear_heads"]["decay"]
    config = tmp_path / "teacher" / "config.json"
    config.write_text(config.read_text().replace('"qwen2"', '"bert"'))
    with pytest.raises(ValueError, match="'bert'"):
        inspect_checkpoint(tmp_path / "teacher")
