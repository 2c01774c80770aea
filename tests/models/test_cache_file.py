"""What a model has read, kept in a file: resumed in another process as if it had never stopped."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FULL, LINEAR, SLIDING, VOCAB, tiny_config, tiny_model
from transformers import DynamicCache, StaticCache

from modeling_deltanet import load_cache, save_cache


CASES = {
    "hybrid": {},
    "all_linear": {"layer_types": [LINEAR] * 2},
    "no_convolution": {"layer_types": [LINEAR] * 2, "linear_conv_kernel_dim": None},
    "all_softmax": {"layer_types": [SLIDING, FULL]},
}

RESUME = """
import sys, torch
from modeling_deltanet import load_cache
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder + "/model")
    cache = load_cache(folder + "/document.safetensors", model.config)
    with torch.no_grad():
        torch.save(model(torch.load(folder + "/ids.pt"), past_key_values=cache).logits, folder + "/logits.pt")
"""


def read(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """case -> logits after a document: of the process that has read it, and of another that has its cache from a
    file.
    """
    root, wanted = tmp_path_factory.mktemp("answers"), {}
    for case, fields in CASES.items():
        model, folder = tiny_model(**fields), root / case
        ids = torch.randint(1, VOCAB, (2, 40))
        model.save_pretrained(folder / "model")
        cache = read(model, ids[:, :30]).past_key_values
        save_cache(cache, folder / "document.safetensors", model.config)
        wanted[case] = read(model, ids[:, 30:], cache).logits
        torch.save(ids[:, 30:], folder / "ids.pt")
    subprocess.run([sys.executable, "-c", RESUME, *(str(root / case) for case in CASES)], check=True)
    return {case: (torch.load(root / case / "logits.pt"), logits) for case, logits in wanted.items()}


@pytest.mark.parametrize("case", CASES)
def test_another_process_goes_on_where_this_one_stopped(answers, case):
    """A document is read once; a question about it may come tomorrow, and must get the same answer."""
    assert torch.equal(*answers[case])


@pytest.mark.parametrize("layer_types", [[LINEAR] * 2, [LINEAR, SLIDING]], ids=["linear", "sliding"])
def test_the_file_does_not_grow_with_the_document(layer_types, tmp_path):
    """A fixed-size memory: a book's file is a page's file."""
    model = tiny_model(layer_types=layer_types)
    sizes = set()
    for length in (100, 400):
        file = tmp_path / f"{length}.safetensors"
        save_cache(read(model, torch.randint(1, VOCAB, (1, length))).past_key_values, file, model.config)
        sizes.add(file.stat().st_size)
    assert len(sizes) == 1


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    """A truncated, foreign or mismatched file must not become a model that answers nonsense."""
    model = tiny_model()
    file = tmp_path / "cache.safetensors"
    save_cache(read(model, torch.randint(1, VOCAB, (1, 10))).past_key_values, file, model.config)
    with pytest.raises(ValueError, match="another model"):
        load_cache(file, tiny_config(linear_num_key_heads=1))
    (tmp_path / "truncated").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated is not a complete safetensors file"):
        load_cache(tmp_path / "truncated", model.config)
    save_file({"0.keys": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign is not a DeltaNet cache"):
        load_cache(tmp_path / "foreign", model.config)


def tampered(file, change):
    """The file with other tensors or metadata, of which `change` is given both to alter in place."""
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def resized(name, index):
    """A change that cuts or doubles a tensor."""

    def change(tensors, metadata):
        tensors[name] = tensors[name][index].contiguous()

    return change


def of_dtype(name, dtype):
    return lambda tensors, metadata: tensors.update({name: tensors[name].to(dtype)})


def holding(name, value):
    return lambda tensors, metadata: tensors[name].view(-1)[3:4].fill_(value)


def with_metadata(**fields):
    return lambda tensors, metadata: metadata.update(fields)


def without(name):
    return lambda tensors, metadata: (metadata if name in metadata else tensors).pop(name)


def with_tensor(name):
    return lambda tensors, metadata: tensors.update({name: torch.zeros(2, 2, 4, 8)})


# A hybrid of linear, sliding (window 5), linear and full layers that has read 10 tokens of 2 sequences.
LIES = {
    "a state of fewer heads": (
        resized("0.recurrent_state", (slice(None), slice(1))), ["0.recurrent_state", "[2, 1, "]
    ),
    "a state with keys of another size": (
        resized("2.recurrent_state", (slice(None), slice(None), slice(9))), ["2.recurrent_state", "[2, 2, 9, 16]"]
    ),
    "a state without dimensions": (lambda t, _: t.update({"0.recurrent_state": torch.tensor(1.0)}), ["shape []"]),
    "a state of int8": (of_dtype("0.recurrent_state", torch.int8), ["0.recurrent_state", "I8", "F32"]),
    "a state of bfloat16": (of_dtype("0.recurrent_state", torch.bfloat16), ["0.recurrent_state", "BF16", "F32"]),
    "keys of int64": (of_dtype("3.keys", torch.int64), ["3.keys", "I64"]),
    "values of complex numbers": (of_dtype("3.values", torch.complex64), ["3.values", "C64"]),
    "NaN in a state": (holding("2.recurrent_state", math.nan), ["2.recurrent_state", "not finite"]),
    "infinity in a convolution": (holding("0.conv_state", math.inf), ["0.conv_state", "not finite"]),
    "infinity in values": (holding("1.values", -math.inf), ["1.values", "not finite"]),
    "a convolution of other taps": (resized("0.conv_state", (..., slice(2))), ["0.conv_state", "[2, 96, 2]"]),
    "a tensor too many": (with_tensor("0.keys"), ["unknown: 0.keys"]),
    "a layer too many": (with_tensor("4.keys"), ["unknown: 4.keys"]),
    "a name with a layer in front": (with_tensor("0.recurrent_state.0"), ["unknown: 0.recurrent_state.0"]),
    "a layer too few": (without("2.recurrent_state"), ["missing: 2.recurrent_state"]),
    "no convolution": (without("2.conv_state"), ["missing: 2.conv_state"]),
    "keys without values": (without("3.values"), ["missing: 3.values"]),
    "keys and values of unequal length": (resized("3.values", (..., slice(9), slice(None))), ["3.values", "9, 8]"]),
    "fewer keys than tokens": (with_metadata(tokens="11"), ["3.keys", "[2, 2, 10, 8]", "[2, 2, 11, 8]", "11 tokens"]),
    "more keys than the window": (
        lambda t, _: t.update({n: torch.zeros(2, 2, 5, 8) for n in ("1.keys", "1.values")}), ["1.keys", "[2, 2, 4, 8]"]
    ),
    "layers of different batches": (resized("1.keys", (slice(1),)), ["1.keys", "[1, 2, 4, 8]", "[2, 2, 4, 8]"]),
    "no sequence at all": (
        lambda t, _: t.update({n: x[:0].contiguous() for n, x in t.items()}), ["[0, ", "1 sequences"]
    ),
    "no config": (without("config"), ["another model: None"]),
    "a config that is no JSON": (with_metadata(config="{"), ["another model: {"]),
    "no tokens": (without("tokens"), ["tokens must be a number", "''"]),
    "tokens that are no number": (with_metadata(tokens="ten"), ["tokens must be a number", "'ten'"]),
    "negative tokens": (with_metadata(tokens="-10"), ["tokens must be a number", "'-10'"]),
    "no tokens read": (with_metadata(tokens="0"), ["tokens must be a number", "'0'"]),
    "tokens beyond any position": (with_metadata(tokens="9" * 5000), ["tokens must be a number", "'999"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    model = tiny_model()
    file = tmp_path_factory.mktemp("honest") / "cache.safetensors"
    save_cache(read(model, torch.randint(1, VOCAB, (2, 10))).past_key_values, file, model.config)
    return file


@pytest.mark.parametrize("change, words", LIES.values(), ids=LIES)
def test_a_file_that_lies_is_refused_by_name(honest, tmp_path, change, words):
    """A file from elsewhere would become an error deep in a kernel, or a model that answers nonsense."""
    file = Path(shutil.copy(honest, tmp_path))
    tampered(file, change)
    with pytest.raises(ValueError) as error:
        load_cache(file, tiny_config())
    assert all(word in str(error.value) for word in [str(file), *words]), error.value


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 6])
def test_a_short_prompt_is_no_lie(tokens, tmp_path):
    """A cache of a few tokens has not filled its window, and a model in half precision has a state in fp32."""
    model = tiny_model().to(torch.bfloat16)
    file = tmp_path / "cache.safetensors"
    cache = read(model, torch.randint(1, VOCAB, (3, tokens))).past_key_values
    save_cache(cache, file, model.config)
    loaded = load_cache(file, model.config)
    assert loaded.get_seq_length() == tokens
    assert torch.equal(loaded.layers[1].keys, cache.layers[1].keys)


def test_what_cannot_be_saved_leaves_the_old_file_alone(tmp_path):
    """An error while saving must not cost what was saved before."""
    model = tiny_model()
    file = tmp_path / "cache.safetensors"
    file.write_bytes(b"old")
    with pytest.raises(ValueError, match="empty"):
        save_cache(DynamicCache(config=model.config), file, model.config)
    with pytest.raises(ValueError, match="StaticCache"):
        save_cache(StaticCache(config=model.config, max_cache_len=8), file, model.config)
    half = read(tiny_model(linear_num_key_heads=1), torch.randint(1, VOCAB, (1, 4))).past_key_values
    with pytest.raises(ValueError, match="holds 1 of 2 heads"):
        save_cache(half, file, model.config)
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]
