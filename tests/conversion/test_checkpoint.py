"""Broken input and a full disk: an error that names what is wrong, and no output left behind."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LINEAR, tiny_llama, tiny_model

from deltanet_conversion import convert_checkpoint
from deltanet_conversion.checkpoint import Checkpoint, new_folder


@pytest.fixture
def ours(tmp_path):
    folder = tmp_path / "ours"
    tiny_model(layer_types=[LINEAR] * 2).save_pretrained(folder)
    return folder


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "ours"
    tiny_model(layer_types=[LINEAR] * 2).save_pretrained(folder, max_shard_size="20KB")
    return folder


def refused(folder, *words, to="fla"):
    """Converting fails with all words in the message and leaves nothing, under no name."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ValueError) as error:
        convert_checkpoint(folder, folder.parent / "out", to=to)
    assert all(word in str(error.value) for word in words), error.value
    assert sorted(folder.parent.iterdir()) == before


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_a_truncated_file(ours, kept):
    """A download that broke off would be converted into a model with holes."""
    file = ours / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(ours, "model.safetensors", "truncated", f"{file.stat().st_size:,} bytes")


def test_a_missing_shard(sharded):
    """One file that was not downloaded would be noticed only after the others were converted."""
    victim = sorted(sharded.glob("model-*"))[1]
    victim.unlink()
    refused(sharded, victim.name, "index")


def test_an_index_that_names_more_than_the_files_hold(sharded):
    """Shards of two checkpoints mixed in one folder would go unnoticed."""
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    refused(sharded, "model.extra.weight")


@pytest.mark.parametrize("change", ["missing", "unknown", "another shape"])
def test_tensors_that_the_config_does_not_explain(ours, change):
    """The output would have random weights in place of a missing tensor, or drop one that mattered."""
    file, name = ours / "model.safetensors", "model.layers.1.linear_attn.k_proj.weight"
    tensors = load_file(file)
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        name = "model.layers.1.linear_attn.z_proj.weight"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(32, 31)
    save_file(tensors, file)
    refused(ours, name, *(["[32, 31]", "[32, 32]"] if change == "another shape" else []))


def test_no_checkpoint_at_all(tmp_path):
    """A path with a typing error would give a traceback about the Hub."""
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(tmp_path / "empty", "config.json", "JSON")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "delta_net"}')
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    refused(tmp_path / "empty", "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("to", ["fla", "deltanet"])
def test_a_wrong_architecture(tmp_path, to):
    """A Llama would be written as something that loads and talks nonsense."""
    tiny_llama().save_pretrained(tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"gpt_neox"'))
    refused(tmp_path / "llama", "gpt_neox", "deltanet" if to == "fla" else "delta_net", to=to)


def test_an_output_that_is_there_already(ours):
    """A second run would mix its files with those of the first, or replace a checkpoint that somebody needs."""
    (ours.parent / "out").mkdir()
    (ours.parent / "out" / "precious").touch()
    refused(ours, "out", "already")


def test_a_full_disk(ours):
    """Half a checkpoint would be left, which the next command takes for a whole one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # no file may be larger, as on a disk that is full
    try:
        with pytest.raises(OSError, match=r"could not write [\d,]+ bytes of weights .*File too large"):
            convert_checkpoint(ours, ours.parent / "deep" / "out", to="fla")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((ours.parent / "deep").iterdir())


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    """Ctrl-C in the middle would leave a folder that looks like a checkpoint."""
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "config.json").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_was_written_is_read_back(ours, monkeypatch):
    """A bit that the disk got wrong would be found by the user of the model."""
    from deltanet_conversion import checkpoint

    def wrong(tensors, file, **kwargs):
        save_file({name: x + (name == "model.norm.weight") for name, x in tensors.items()}, file, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", wrong)
    refused(ours, "model.norm.weight")


def test_tokenizer_and_generation_config_travel(ours):
    """The converted folder could not be used without copying files by hand."""
    (ours / "tokenizer.json").write_text("{}")
    convert_checkpoint(ours, ours.parent / "out", to="fla")
    assert (ours.parent / "out" / "tokenizer.json").read_text() == "{}"
    assert (ours.parent / "out" / "generation_config.json").exists()
    assert Checkpoint(ours.parent / "out").config["model_type"] == "delta_net"
