"""The kernels under torch.func: refused in words, whichever function and whichever transformation."""

import pytest
import torch
from torch.func import grad, vmap


pytest.importorskip("triton")

from deltanet_kernels import (  # noqa: E402
    chunk_delta_rule,
    delta_rule_step,
    fused_recurrent_delta_rule,
    short_conv,
    short_conv_step,
)


def rule(function):
    return lambda x: function(x, x, x, x[..., 0])[0].sum()


CALLS = {
    "chunk_delta_rule": rule(chunk_delta_rule),
    "fused_recurrent_delta_rule": rule(fused_recurrent_delta_rule),
    "delta_rule_step": lambda x: delta_rule_step(x, x, x, x[..., 0], x.new_zeros(1, 1, 16, 16)).sum(),
    "short_conv": lambda x: short_conv([x.flatten(2)], [x.new_ones(16, 4)])[0][0].sum(),
    "short_conv_step": lambda x: short_conv_step([x.flatten(2)], [x.new_ones(16, 4)], x.new_zeros(1, 16, 3))[0].sum(),
}


@pytest.mark.parametrize("transform", [grad, lambda f: vmap(torch.no_grad()(f))], ids=["grad", "vmap"])
@pytest.mark.parametrize("function", CALLS)
def test_transformations_are_refused(function, transform):
    """A kernel would be handed a tensor without memory, or torch would ask for a `setup_context` of our internals."""
    x = torch.ones((2, 1, 1, 1, 16) if transform is not grad else (1, 1, 1, 16))
    with pytest.raises(ValueError, match=f"^{function} cannot be transformed by torch.func"):
        transform(CALLS[function])(x)
