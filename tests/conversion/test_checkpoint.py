"""Broken input and a full disk: an error that names what is wrong, and no output left behind."""

import json
import os
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LINEAR, tiny_llama, tiny_model

from deltanet_conversion import convert_checkpoint, generate_text, inspect_checkpoint
from deltanet_conversion.checkpoint import Checkpoint, fetch, new_folder


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


@pytest.fixture
def outside(tmp_path):
    """A checkpoint beside the folder, whose files a name or a link in the folder may lead to."""
    tiny_model(layer_types=[LINEAR] * 2).save_pretrained(tmp_path / "outside")
    (tmp_path / "outside" / "tokenizer.1.0.json").write_text("{}")
    return tmp_path / "outside"


def names(folder, file, key, *values):
    """Write the shards of `weight_map`, or whatever `key` holds, into one of the folder's files."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    content[key] = dict.fromkeys(content[key], *values) if key == "weight_map" else list(values)
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["../outside/model.safetensors", "ABSOLUTE", "./model.safetensors", "a/../x.safetensors",
    "link.safetensors",
             "linked/model.safetensors", "..", "", 3, None, ["model.safetensors"], "config.json"]
)  # fmt: skip
def test_an_index_that_leads_out_of_the_folder(sharded, outside, name):
    """A folder from elsewhere would have any file of this machine converted, or loaded and compared."""
    (sharded / "link.safetensors").symlink_to(outside / "model.safetensors")
    (sharded / "linked").symlink_to(outside)
    name = str(outside / "model.safetensors") if name == "ABSOLUTE" else name
    names(sharded, "model.safetensors.index.json", "weight_map", name)
    refused(sharded, "model.safetensors.index.json" if name != "link.safetensors" else "outside the folder", str(name))
    for read in (inspect_checkpoint, fetch, lambda folder: generate_text(folder, "w1")):
        with pytest.raises(ValueError, match="names|outside the folder"):
            read(sharded)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "{"])
def test_an_index_of_another_form(sharded, content):
    """A damaged index would end in a KeyError."""
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer_config.json", "generation_config.json"]
)
def test_a_link_out_of_the_folder(ours, outside, name):
    """The file it leads to would be read, or copied into the converted folder, and published with that."""
    (outside / "tokenizer_config.json").write_text("{}")
    (ours / name).unlink(missing_ok=True)
    (ours / name).symlink_to(outside / name)
    refused(ours, str(ours / name), f"a link to {outside / name}, outside the folder")


def test_the_hubs_cache_is_no_link_out_of_the_folder(ours, tmp_path):
    """Whatever was downloaded is a link into the cache's blobs: nothing could be converted from the Hub."""
    snapshot, blobs = tmp_path / "models--me--x" / "snapshots" / "1", tmp_path / "models--me--x" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (ours / "tokenizer.json").write_text("{}")
    for i, file in enumerate(sorted(ours.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    convert_checkpoint(snapshot, tmp_path / "out", to="fla")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_other_names_that_lead_out_of_the_folder(ours, outside):
    """A tokenizer would be read from elsewhere, and other weights than those that Transformers loads be converted."""
    names(ours, "tokenizer_config.json", "fast_tokenizer_files", "../outside/tokenizer.1.0.json")
    refused(ours, "tokenizer_config.json", "../outside/tokenizer.1.0.json")
    with pytest.raises(ValueError, match="tokenizer_config.json names"):
        generate_text(ours, "w1")
    (ours / "tokenizer_config.json").unlink()
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"transformers_weights": "../outside/model.safetensors"}))
    refused(ours, "transformers_weights", "../outside/model.safetensors")


def test_a_pipe_is_not_waited_for(ours):
    """The command would hang for ever."""
    (ours / "config.json").unlink()
    os.mkfifo(ours / "config.json")
    refused(ours, "config.json", "neither a file nor a link to one")


def test_a_folder_beside_the_tokenizer_is_left_alone(ours):
    """A subfolder that is named like a tokenizer's file would stop the conversion."""
    (ours / "tokenizer").mkdir()
    convert_checkpoint(ours, ours.parent / "out", to="fla")


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
    refused(tmp_path / "empty", "model.safetensors", "pytorch_model.bin", to="deltanet")


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
