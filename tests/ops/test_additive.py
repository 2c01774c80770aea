"""`additive`: the delta rule's own routes, kernels included, as the plain linear transformer."""

import pytest
import torch
from _reference import DEVICE, error, make

from modeling_deltanet.delta_rule import additive, torch_chunk_delta_rule, torch_recurrent_delta_rule


deltanet_kernels = pytest.importorskip("deltanet_kernels")

RULES = {
    "torch": torch_chunk_delta_rule,
    "torch, token by token": torch_recurrent_delta_rule,
    "kernels": deltanet_kernels.chunk_delta_rule,
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def sum_of_writes(q, k, v, beta, state):
    """O = lower(Q K^T) diag(beta) V + Q S for the plain linear transformer, and the state that it leaves."""
    scores = torch.einsum("bthk, bshk -> bhts", q, k).tril()
    written = v * beta.unsqueeze(-1)
    o = torch.einsum("bhts, bshv -> bthv", scores, written) + torch.einsum("bthk, bhkv -> bthv", q, state)
    return o * q.shape[-1] ** -0.5, state + torch.einsum("bthk, bthv -> bhkv", k, written)


CASES = [("torch", torch.float64, 16), *((rule, torch.float32, 16) for rule in RULES), ("torch", torch.float16, 16),
         ("kernels", torch.bfloat16, 16)]  # fmt: skip
LARGE = [("kernels", torch.bfloat16, K) for K in (64, 128, 256)]  # for which Hopper has kernels of its own


@pytest.mark.parametrize("rule, dtype, K", [*CASES, *(pytest.param(*x, marks=pytest.mark.gpu) for x in LARGE)])
def test_the_additive_update_is_the_sum_of_the_writes(rule, dtype, K):
    """The baseline would forget a little of what it holds, or scale it, and the comparison would mean nothing."""
    if K > 16 and DEVICE == "cpu":
        pytest.skip("minutes in the interpreter")
    *inputs, state = make(1, 130, 2, K, dtype=torch.float64, keys="unit", beta_max=1.0)
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    state = (state * 3).to(DEVICE, torch.promote_types(dtype, torch.float32)).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (*inputs, state)]
    found = RULES[rule](*additive(*inputs), initial_state=state, output_final_state=True)
    wanted = sum_of_writes(*exact)
    weights = [torch.randn_like(x) for x in wanted]
    gradients = torch.autograd.grad([*found], [*inputs, state], [w.to(x.dtype) for w, x in zip(weights, found)])
    errors = [
        error(x, y) for x, y in zip((*found, *gradients), (*wanted, *torch.autograd.grad(wanted, exact, weights)))
    ]
    assert max(errors) < TOLERANCE[dtype], errors
