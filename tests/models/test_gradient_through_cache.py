"""Training a long text in segments, the cache carrying what came before: truncated nowhere, the gradient is that of
one go.
"""

import pytest
import torch
from tiny import LINEAR, tiny_model, tokens
from transformers import DynamicCache


VARIANTS = {
    "hybrid": {},
    "all_linear": {"layer_types": [LINEAR] * 2},
    "wide_convolution": {"layer_types": [LINEAR] * 2, "linear_conv_kernel_dim": 7},
    "no_convolution": {"linear_conv_kernel_dim": None},
    "decay": {"layer_types": [LINEAR] * 2, "linear_use_decay": True},
}
# The second have pieces shorter than the convolution looks back, down to a single token.
SEGMENTS = [[8, 12], [9, 1, 2, 8]]


def gradients(model, logits):
    model.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    (logits * weights.to(logits.device)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("padding", [0, 3], ids=["", "padded"])
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_segments_teach_what_one_go_teaches(variant, segments, padding):
    """Training on a long text piece by piece would silently follow another gradient: half of it was wrong."""
    model, x = tiny_model(**VARIANTS[variant]).double().train(), tokens(2, sum(segments))
    mask = torch.ones_like(x)
    mask[0, :padding] = 0
    expected = gradients(model, model(x, attention_mask=mask, use_cache=False).logits[:, padding:])

    cache, logits, seen = DynamicCache(config=model.config), [], 0
    for segment in x.split(segments, dim=1):
        seen += segment.shape[1]
        logits.append(model(segment, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    for name, gradient in gradients(model, torch.cat(logits, dim=1)[:, padding:]).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-10, f"{name}: {error}"


def test_segments_on_the_kernels(monkeypatch, short_segments):
    """On a GPU the gradient would end at the convolution's tail, which a kernel copies, without a word."""
    kernels = pytest.importorskip("deltanet_kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # Triton's interpreter, for the convolution alone: the rule takes minutes
        monkeypatch.setattr("modeling_deltanet.short_conv.kernels_for", lambda *args: kernels)
    model, x = tiny_model(layer_types=[LINEAR]).to(device), tokens(1, 8).to(device)
    expected = gradients(model, model(x, use_cache=False).logits)
    cache = DynamicCache(config=model.config)
    logits = [model(segment, past_key_values=cache).logits for segment in x.split([4, 1, 3], dim=1)]
    for name, gradient in gradients(model, torch.cat(logits, dim=1)).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-3, f"{name}: {error}"


def test_reading_on_without_gradients_leaves_the_gradient():
    """A text read further by the same cache, to look at a sample say, would break the backward of what was read
    before.
    """
    model, x = tiny_model().double().train(), tokens(1, 16)
    expected = gradients(model, model(x, use_cache=False).logits)
    cache = DynamicCache(config=model.config)
    logits = [model(x[:, :12], past_key_values=cache).logits, model(x[:, 12:], past_key_values=cache).logits]
    with torch.no_grad():
        for token in tokens(1, 3, seed=1).split(1, dim=1):
            model(token, past_key_values=cache)
    for name, gradient in gradients(model, torch.cat(logits, dim=1)).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_cache_beside_gradient_checkpointing_is_refused():
    """Checkpointed layers drop the cache with a line in the log: the text's earlier segments would be forgotten."""
    model, x = tiny_model().train(), tokens(1, 16)
    cache = model(x[:, :8], use_cache=True).past_key_values
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing.*cache"):
        model(x[:, 8:], past_key_values=cache)
