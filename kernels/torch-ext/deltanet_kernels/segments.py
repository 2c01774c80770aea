"""Long sequences with few heads: the scan cut into segments that run side by side.

A scan has one program per sequence, head and block of value columns: 32 of them for 16 heads of 128 at batch 1, on a
chip of 132 multiprocessors. Over a segment the state goes S_out = Phi S_in + N, so:

    N     = the segment's final state from S_in = 0                         (scan, no output)
    Phi   = the same for v = 0 and S_in = I: K more value columns           (in the same launch)
    S_in  of every segment, one after the other                             (chain, one launch)
    the ordinary scan from each segment's true entry state                  (scan)

Backward is its adjoint, dS_in = Phi^T dS_out + dN, and reuses Phi. Each factor of Phi has norm at most 1 for
normalised keys and beta <= 2, so products cannot grow. Without a gate they do not decay, either, and nothing is left
out. With one, and the L2 norm in the kernel, the first pass leaves out chunks of which less than 2^-40 is left at the
end of their segment, and a Phi of which less is: of heads that forget fast it reads a few chunks.

Where T is a multiple of the segments, they are batch entries: every tensor is viewed as [B * S, T / S, ...], which
costs no copy. Otherwise they are packed sequences of one batch entry, the last one the shortest.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch
from .layout import Inputs, Scratch, Tables, divides, static
from .plan import Plan
from .reverse import reverse
from .scan import scan


def cut(x: torch.Tensor, s: int) -> torch.Tensor:
    """[B, T, ...] seen as [B * s, T / s, ...], or as [1, B * T, ...]."""
    B, T = x.shape[:2]
    shape = (B * s, T // s) if divides(T, s) else (1, B * T)
    return x.as_strided((*shape, *x.shape[2:]), (shape[1] * x.stride(1), *x.stride()[1:]), x.storage_offset())


@triton.jit
def _load_block(p, o_r, o_c, K, REVERSE: tl.constexpr):
    """A block of Phi [K, K], or of its transpose."""
    o = o_r[:, None] + o_c[None, :] * K if REVERSE else o_r[:, None] * K + o_c[None, :]
    return tl.load(p + o, mask=(o_r < K)[:, None] & (o_c < K)[None, :], other=0.0)


@triton.jit
def chain_kernel(
    n, phi, first, out,
    HV, K, V,
    BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """state <- Phi state + N from segment to segment (backward: Phi^T, last to first); out is each one's entry.

    Keys wider than BK = 128 are held as two halves, as in the scans.
    """
    i_v = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64) // HV
    i_hv = tl.program_id(1) % HV
    o_k1 = tl.arange(0, BK)
    o_k2 = BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_1 = (o_k1 < K)[:, None] & (o_v < V)[None, :]
    m_2 = (o_k2 < K)[:, None] & (o_v < V)[None, :]
    o_1 = o_k1[:, None] * V + o_v[None, :]
    o_2 = o_k2[:, None] * V + o_v[None, :]
    b_s1 = tl.zeros([BK, BV], tl.float32)
    b_s2 = tl.zeros([BK, BV], tl.float32)
    if first is not None:
        first += (i_b * HV + i_hv) * K * V
        b_s1 = tl.load(first + o_1, mask=m_1, other=0.0)
        if NK > 1:
            b_s2 = tl.load(first + o_2, mask=m_2, other=0.0)
    STEP: tl.constexpr = -1 if REVERSE else 1
    p = ((i_b * S + (S - 1 if REVERSE else 0)) * HV + i_hv) * K
    tl.store(out + p * V + o_1, b_s1, mask=m_1)
    if NK > 1:
        tl.store(out + p * V + o_2, b_s2, mask=m_2)
    for _ in range(S - 1):
        b_n1 = tl.load(n + p * V + o_1, mask=m_1, other=0.0)
        b_phi = _load_block(phi + p * K, o_k1, o_k1, K, REVERSE)
        b_n1 = tl.dot(b_phi, b_s1, b_n1, input_precision="tf32x3")
        if NK > 1:
            b_n2 = tl.load(n + p * V + o_2, mask=m_2, other=0.0)
            b_phi = _load_block(phi + p * K, o_k2, o_k1, K, REVERSE)
            b_n2 = tl.dot(b_phi, b_s1, b_n2, input_precision="tf32x3")
            b_phi = _load_block(phi + p * K, o_k1, o_k2, K, REVERSE)
            b_n1 = tl.dot(b_phi, b_s2, b_n1, input_precision="tf32x3")
            b_phi = _load_block(phi + p * K, o_k2, o_k2, K, REVERSE)
            b_s2 = tl.dot(b_phi, b_s2, b_n2, input_precision="tf32x3")
        b_s1 = b_n1
        p += STEP * HV * K
        tl.store(out + p * V + o_1, b_s1, mask=m_1)
        if NK > 1:
            tl.store(out + p * V + o_2, b_s2, mask=m_2)


def _new_states(plan: Plan, t: Tables, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the first pass writes N, and where the chain writes what enters each segment."""
    call = plan.call
    both = torch.empty(2, t.n, call.HV, call.K, call.V, dtype=torch.float32, device=device)
    return both[0], both[1]


def chain_block(K: int) -> int:
    """Keys of a half of the chain's state."""
    return min(128, max(16, triton.next_power_of_2(K)))


def _chain(plan: Plan, n, phi, first, out, s: int, backwards: bool) -> torch.Tensor:
    (N, HV, K, V), choice = n.shape, plan.chain
    launch(
        chain_kernel, (-(-V // choice.columns), N // s * HV),
        (n, phi, first, out),
        (HV, static(K), static(V)),
        {"BK": chain_block(K), "NK": -(-K // 128), "BV": choice.columns, "S": s, "REVERSE": backwards},
        {"num_warps": choice.num_warps, "num_stages": choice.num_stages},
    )  # fmt: skip
    return out


def entry_states(x: Inputs, scratch: Scratch, t: Tables, plan: Plan, scale: float, phi: torch.Tensor) -> torch.Tensor:
    """S_in of every segment, [B * s, HV, K, V]; writes Phi [B * s, HV, K, K]. `x` is cut, but for h0."""
    n, out = _new_states(plan, t, phi.device)
    first = x._replace(q=x.k, h0=None)
    scan(first, scratch._replace(u=None, s=None), t, plan, scale, plan.entry, ht=n, phi=phi)
    return _chain(plan, n, phi, x.h0, out, plan.segments, False)


def exit_gradients(
    x: Inputs, do: torch.Tensor, scratch: Scratch, t: Tables, plan: Plan, scale: float, phi: torch.Tensor, dht
) -> torch.Tensor:
    """dS_out of every segment, [B * s, HV, K, V]."""
    n, out = _new_states(plan, t, phi.device)
    reverse(x, do, scratch, t, plan, scale, plan.exit, dht=None, dv=None, ds=None, dh0=n)
    return _chain(plan, n, phi, dht, out, plan.segments_backward, True)
