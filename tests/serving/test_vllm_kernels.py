"""The plugin's way over our kernels, without vLLM: on its pools and its batches they compute what the plugin's torch
functions do, which `make test-vllm` compares with `generate`.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLUGIN = Path(__file__).parents[2] / "serving" / "vllm_deltanet" / "vllm_deltanet"


def module(name: str):
    """Of the plugin, whose package is for another environment."""
    spec = importlib.util.spec_from_file_location(f"plugin_{name}", PLUGIN / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


ours, in_torch = module("our_kernels"), module("rule")
# decoding requests, one token each, then parts of prompts: (slot, tokens, goes on); 0 is vLLM's null block
BATCHES = {
    "mixed": [(5, 1, True), (2, 1, True), (4, 7, True), (1, 3, False)],
    "decode, padded": [(3, 1, True), (0, 1, True)],
    "prompts": [(2, 2, False), (6, 9, True)],
}


def describe(requests, num_decodes):
    """What vLLM's GDNAttentionMetadata says of a batch."""
    slots = torch.tensor([slot for slot, _, _ in requests], device=DEVICE, dtype=torch.int32)
    borders = torch.tensor([0, *(n for _, n, _ in requests)], device=DEVICE, dtype=torch.int32).cumsum(0).int()
    goes_on = torch.tensor([x for _, _, x in requests], device=DEVICE)
    return SimpleNamespace(
        num_decodes=num_decodes,
        num_prefills=len(requests) - num_decodes,
        non_spec_state_indices_tensor=slots,
        non_spec_query_start_loc=borders,
        has_initial_state=goes_on,
        prefill_query_start_loc=borders[num_decodes:] - num_decodes,
        prefill_state_indices=slots[num_decodes:],
        prefill_has_initial_state=goes_on[num_decodes:],
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_our_kernels_compute_what_torch_does(batch, gated):
    """A server on a GPU would answer from another request's memory, or start a request from what one left behind."""
    requests = BATCHES[batch]
    num_decodes = sum(n == 1 for _, n, _ in requests)
    N, H, HV, K, V, W = sum(n for _, n, _ in requests), 1, 2, 16, 24, 4
    torch.manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, device=DEVICE)

    x, weight, conv_pool = randn(N, 40), randn(40, W), randn(7, W - 1, 40)
    q, k, v = randn(N, H, K), randn(N, H, K), randn(N, HV, V)
    beta, g = torch.rand(N, HV, device=DEVICE), -torch.rand(N, HV, device=DEVICE) if gated else None
    pool = randn(7, HV, V, K)
    results = []
    for kernels in (ours, in_torch):
        pools = conv_pool.clone(), pool.clone()
        described = kernels.Batch(describe(requests, num_decodes))
        y = kernels.short_conv(x, weight, pools[0], described)
        decay = torch.zeros_like(beta) if g is None and kernels is in_torch else g
        o = kernels.delta_rule(q, k, v, decay, beta, pools[1], described, True)
        real = torch.cat([torch.full((n,), slot > 0) for slot, n, _ in requests])
        results.append((y[real], o[real], *(p[1:] for p in pools)))
        if kernels is ours:  # the null block
            assert torch.equal(pools[0][0], conv_pool[0]) and torch.equal(pools[1][0], pool[0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_without_a_gpu_they_are_not_taken():
    """vLLM on a CPU would start Triton."""
    config = SimpleNamespace(linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4)
    assert not ours.take(torch.zeros(1), torch.zeros(1), torch.zeros(1), config)
