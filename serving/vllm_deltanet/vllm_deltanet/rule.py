"""The delta rule and the short convolution in torch, on vLLM's pools of states, in fp32.

vLLM's kernels for the CPU take bf16 and heads of one size (a multiple of 32), those for a GPU half precision: this is
for everything else. A batch is flat: decoding requests first, one token each, then the prompts' parts, one after
another. `slots` names the place of each request's state in the pool.

Letters: N tokens of all requests, D channels, W taps, HV value heads, K and V head sizes, C chunk.
"""

import torch
import torch.nn.functional as F


CHUNK_SIZE = 64
L2_NORM_EPS = 1e-6  # added to the squared norm, as in training


class Batch:
    """Which rows of a batch belong to which request, and whether a request goes on from a state."""

    def __init__(self, metadata):
        self.num_decodes = metadata.num_decodes
        requests = metadata.num_decodes + metadata.num_prefills
        self.slots = metadata.non_spec_state_indices_tensor[:requests].long()
        self.prompts = []
        if metadata.num_prefills:
            borders = metadata.non_spec_query_start_loc[: requests + 1].tolist()
            goes_on = metadata.has_initial_state[:requests].tolist()
            slots = self.slots.tolist()
            self.prompts = [
                (slots[i], slice(borders[i], borders[i + 1]), goes_on[i]) for i in range(self.num_decodes, requests)
            ]


def short_conv(x: torch.Tensor, weight: torch.Tensor, pool: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Convolve `[N, D]` by `[D, W]` along time.

    Each request goes on from its last W - 1 inputs in `pool` `[slots, W - 1, D]`, which this call moves on.
    """
    y, W, weight = torch.empty_like(x), weight.shape[-1], weight.float()
    if n := batch.num_decodes:
        slots = batch.slots[:n]
        window = torch.cat((pool[slots], x[:n, None]), dim=1)
        y[:n] = (window.float() * weight.mT).sum(1).to(y.dtype)
        pool[slots] = window[:, 1:]
    for slot, rows, goes_on in batch.prompts:
        before = pool[slot] if goes_on else x.new_zeros(W - 1, x.shape[1])
        window = torch.cat((before, x[rows]))
        T = window.shape[0] - W + 1
        y[rows] = sum(window[j : j + T].float() * weight[:, j] for j in range(W)).to(y.dtype)
        pool[slot] = window[T:]
    return y


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    pool: torch.Tensor,
    batch: Batch,
    l2_norm: bool,
) -> torch.Tensor:
    """The rule for q and k `[N, H, K]`, v `[N, HV, V]`, g (log decay) and beta `[N, HV]`: returns `[N, HV, V]` in fp32
    and moves the states in `pool` `[slots, HV, V, K]` on.
    """
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    if l2_norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q, k))
    o = torch.empty_like(v)
    if n := batch.num_decodes:
        slots = batch.slots[:n]
        state = pool[slots].float() * g[:n, :, None, None].exp()
        error = beta[:n, :, None] * (v[:n] - (state @ k[:n, :, :, None]).squeeze(-1))
        state = state + error[..., None] * k[:n, :, None, :]
        o[:n] = (state @ q[:n, :, :, None]).squeeze(-1)
        pool[slots] = state.to(pool.dtype)
    for slot, rows, goes_on in batch.prompts:
        state = pool[slot].float() if goes_on else torch.zeros_like(pool[slot], dtype=torch.float32)
        for start in range(rows.start, rows.stop, CHUNK_SIZE):
            part = slice(start, min(start + CHUNK_SIZE, rows.stop))
            chunk = (x[part].transpose(0, 1) for x in (q, k, v, g, beta))
            out, state = _chunk(*chunk, state)
            o[part] = out.transpose(0, 1)
        pool[slot] = state.to(pool.dtype)
    return o


def _chunk(q, k, v, g, beta, state):
    """At most 64 tokens at once: q and k `[HV, C, K]`, v `[HV, C, V]`, g and beta `[HV, C]`, state `[HV, V, K]`."""
    # 1. Decay from each token to each later one, and from the state before to each token.
    b = g.cumsum(-1)
    decay = (b[:, :, None] - b[:, None, :]).tril().exp().tril()
    since_start = b.exp()[..., None]
    # 2. What each token writes, by one triangular system for the whole chunk.
    eye = torch.eye(q.shape[1], device=q.device)
    system = eye + (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    error = beta[..., None] * (v - since_start * (k @ state.mT))
    written = torch.linalg.solve_triangular(system, error, upper=False, unitriangular=True)
    # 3. What each token reads: of the state before, and of the chunk.
    o = since_start * (q @ state.mT) + (q @ k.mT * decay) @ written
    # 4. The state after the chunk.
    state = state * b[:, -1, None, None].exp() + written.mT @ (k * (b[:, -1:] - b).exp()[..., None])
    return o, state


def features(x: torch.Tensor, activation: str, norm: str) -> torch.Tensor:
    """The feature map of queries and keys and the sum norm (the rule divides by the L2 norm itself)."""
    if activation == "silu":
        x = F.silu(x)
    elif activation == "relu":
        x = F.relu(x)
    elif activation == "elu":
        x = F.elu(x) + 1
    if norm == "sum":
        x = (x.float() / (x.float().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return x
