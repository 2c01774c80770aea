"""The command `deltanet`: what it prints, and its exit codes."""

import json
import sys

import pytest
from test_llama import make_teacher
from test_stages import pair, tokenizer  # noqa: F401  fixtures
from tiny import FULL, LINEAR, SLIDING, tiny_model
from transformers import DynamicCache

from deltanet_conversion import cli, convert_checkpoint, inspect_checkpoint


@pytest.fixture
def deltanet(monkeypatch, capsys):
    """Run the command line as a shell would: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["deltanet", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("command", ["convert", "align", "distill", "inspect", "generate", "check"])
def test_every_command_has_help_with_an_example(deltanet, command):
    """A user would have to read the source to make a first call."""
    code, out, _ = deltanet(command, "--help")
    assert code == 0 and f"deltanet {command} " in out and "Example" in out
    assert command in deltanet("--help")[1]


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
    assert code == 0 and "linear_attention" in out


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
