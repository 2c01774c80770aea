"""torch.export: a program of the model, for any batch, and for any length where that is asked for."""

import pytest
import torch
from tiny import FULL, LINEAR, SLIDING, tiny_model, tokens


LAYERS = {
    "all_linear": {"layer_types": [LINEAR] * 2},
    "hybrid": {"layer_types": [LINEAR, SLIDING, FULL]},
    "decay": {"layer_types": [LINEAR], "linear_use_decay": True},
}
layers = pytest.mark.parametrize("layers, has_mask", [("all_linear", False), ("hybrid", True), ("decay", True)])
BATCH, TIME = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("time", min=3, max=512)


def export(model, x, has_mask, dynamic):
    inputs, shapes = {"use_cache": False}, {"input_ids": dynamic, "use_cache": None}
    if has_mask:
        inputs["attention_mask"] = torch.ones_like(x)
        shapes["attention_mask"] = dynamic
    return torch.export.export(model, (x,), inputs, dynamic_shapes=shapes).module()


def assert_same(program, model, x, has_mask):
    if not has_mask:
        torch.testing.assert_close(program(x, use_cache=False).logits, model(x).logits)
        return
    mask = torch.ones_like(x)
    mask[0, : x.shape[1] // 2] = 0
    logits = (program(x, attention_mask=mask, use_cache=False).logits, model(x, attention_mask=mask).logits)
    torch.testing.assert_close(*(y[mask.bool()] for y in logits), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@layers
def test_a_program_for_any_batch(layers, has_mask):
    """A deployed program would serve only as many requests at once as it was traced with."""
    model = tiny_model(**LAYERS[layers])
    program = export(model, tokens(3, 70), has_mask, {0: BATCH})
    for batch in (1, 4):
        assert_same(program, model, tokens(batch, 70, seed=batch), has_mask)


@torch.no_grad()
@layers
def test_a_program_for_any_length(layers, has_mask):
    """Every prompt would have to be padded to one length."""
    model = tiny_model(**LAYERS[layers])
    program = export(model, tokens(3, 20), has_mask, {0: BATCH, 1: TIME})
    for batch, length in ((1, 3), (2, 200)):
        assert_same(program, model, tokens(batch, length, seed=batch), has_mask)
