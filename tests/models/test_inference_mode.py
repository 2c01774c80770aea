"""One cache across torch's three modes: what was read under `inference_mode` is read on outside of it."""

import itertools

import pytest
import torch
from tiny import FULL, LINEAR, tiny_model, tokens
from transformers import DynamicCache, StaticCache


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
LAYERS = {"all_linear": [LINEAR] * 2, "hybrid": [LINEAR, FULL]}
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
}


@pytest.mark.parametrize("cache_class", CACHES)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("modes", itertools.permutations(MODES, 2), ids="-".join)
def test_a_cache_outlives_the_mode_it_was_made_in(modes, layers, cache_class):
    """Reading on under `no_grad` would end in "Inplace update to inference tensor", from within the model."""
    if cache_class == "static" and "grad" in modes and layers == "hybrid":
        pytest.skip("Transformers' static layers are written in place, which no gradient goes through")
    model, x = tiny_model(layer_types=LAYERS[layers]), tokens(2, 12)
    with torch.no_grad():
        expected = model(x).logits
    cache, logits = CACHES[cache_class](model.config), []
    for i, piece in enumerate(x.split([5, 1, 1, 1, 1, 3], dim=1)):
        with MODES[modes[i // 3]]():
            logits.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat([x.detach() for x in logits], dim=1), expected)
    cache.reset()
    with MODES[modes[1]]():
        torch.testing.assert_close(model(x[:, :4], past_key_values=cache).logits, expected[:, :4])


def test_a_prompt_that_was_read_before_training():
    """A prompt's cache from `inference_mode` could not be trained on."""
    model, x = tiny_model(), tokens(2, 12)
    gradients = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = DynamicCache(config=model.config)
        with mode():
            model(x[:, :6], past_key_values=cache)
        model.zero_grad()
        model(x[:, 6:], past_key_values=cache).logits.square().sum().backward()
        gradients.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layers", LAYERS)
def test_training_after_generating(layers):
    """A model that has generated under `inference_mode` would carry tensors that training cannot use."""
    model, x = tiny_model(layer_types=LAYERS[layers]), tokens(2, 12)
    with torch.inference_mode():
        model.generate(x, max_new_tokens=3, do_sample=False)
    model.train()(x, labels=x).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
