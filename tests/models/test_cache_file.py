"""What a model has read, kept in a file: resumed in another process as if it had never stopped."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
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
    """case -> logits after a document: of the process that has read it, and of another that has its cache from a file."""
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
