"""Long sequences with few heads: the scan cut into segments that run side by side.

A scan has one program a sequence, head and block of value columns: 32 of them for 16 heads of 128 at batch 1, on a
chip of 132 multiprocessors. Over a segment the state goes S_out = Phi S_in + N, so:

    N     = the segment's final state from S_in = 0                         (scan, no output)
    Phi   = the same for v = 0 and S_in = I: K more value columns           (in the same launch)
    S_in  of every segment, one after the other                             (chain, one launch)
    the ordinary scan from each segment's true entry state                  (scan)

Backward is its adjoint, dS_in = Phi^T dS_out + dN, and reuses Phi. Phi is exact, nothing is truncated: the rule does
not decay. Each factor has norm at most 1 for normalised keys and beta <= 2, so products cannot grow.

Segments are batch entries: every tensor is viewed as [B * S, T / S, ...], which costs no copy.
"""

import torch
import triton
import triton.language as tl

from . import chunk_backward, chunk_forward
from ._launch import launch
from .chunk_forward import Tables
from .configs import CHUNK, Plan


# Chunks a segment (H100, forward + backward of 16 heads of 128). 4096 tokens in four: 0.255 ms, in eight 0.300, uncut 0.312
MIN_CHUNKS = 16
# where a program holds all columns of a head. 16384 tokens in four: 0.834 ms, in eight 0.873; 32768: 1.595 and 1.634; but
# 131072, forward alone: 1.90 to 2.01 and 1.82
MIN_CHUNKS_WHOLE = 64


def count(B: int, T: int, HV: int, K: int, blocks: int, sms: int) -> int:
    """Segments a sequence: the largest power of two that divides T into whole chunks and gives each multiprocessor one
    program at most: of a block of columns or, in long segments, of a whole head, which loads once what its blocks share.
    """
    if K > 128:
        return 1
    s = 1
    while T % (2 * s * CHUNK) == 0:
        chunks, heads = T // (2 * s * CHUNK), 2 * s * B * HV
        few = heads * blocks <= sms and chunks >= MIN_CHUNKS
        whole = heads <= sms and heads * blocks <= 2 * sms and chunks >= MIN_CHUNKS_WHOLE
        if not (few or whole):
            break
        s *= 2
    # two extra passes: worth it from four segments on
    return s if s >= 4 else 1


def cut(x: torch.Tensor, s: int) -> torch.Tensor | None:
    """[B, T, ...] seen as [B * s, T / s, ...]; None where strides do not allow it."""
    B, T = x.shape[:2]
    if B > 1 and x.stride(0) != T * x.stride(1):
        return None
    return x.as_strided((B * s, T // s, *x.shape[2:]), (T // s * x.stride(1), *x.stride()[1:]), x.storage_offset())


@triton.jit
def chain_kernel(
    n, phi, first, out,
    HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, S: tl.constexpr,
    HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """state <- Phi state + N from segment to segment (backward: Phi^T, last to first); out is each one's entry."""
    i_v = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64) // HV
    i_hv = tl.program_id(1) % HV
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m = (o_k < K)[:, None] & (o_v < V)[None, :]
    o = o_k[:, None] * V + o_v[None, :]
    if HAS_FIRST:
        b_s = tl.load(first + (i_b * HV + i_hv) * K * V + o, mask=m, other=0.0)
    else:
        b_s = tl.zeros([BK, BV], tl.float32)
    STEP: tl.constexpr = -1 if REVERSE else 1
    p = ((i_b * S + (S - 1 if REVERSE else 0)) * HV + i_hv) * K
    tl.store(out + p * V + o, b_s, mask=m)
    for _ in range(S - 1):
        if REVERSE:
            p_phi = phi + p * K + o_k[:, None] + o_k[None, :] * K
        else:
            p_phi = phi + p * K + o_k[:, None] * K + o_k[None, :]
        b_phi = tl.load(p_phi, mask=(o_k < K)[:, None] & (o_k < K)[None, :], other=0.0)
        b_n = tl.load(n + p * V + o, mask=m, other=0.0)
        b_s = tl.dot(b_phi, b_s, b_n, input_precision="tf32x3")
        p += STEP * HV * K
        tl.store(out + p * V + o, b_s, mask=m)


def _chain(n, phi, first, s: int, reverse: bool) -> torch.Tensor:
    N, HV, K, V = n.shape
    out = torch.empty_like(n)
    launch(
        chain_kernel, (-(-V // 16), N // s * HV),
        (n, phi, n if first is None else first, out),
        (HV,),
        {
            "K": K, "V": V, "BK": max(16, triton.next_power_of_2(K)), "BV": 16, "S": s, "HAS_FIRST": first is not None,
            "REVERSE": reverse,
        },
        {"num_warps": 8, "num_stages": 3},  # Phi does not wait for the state: 27 us, not 51, for 8 segments at 32768 tokens
    )  # fmt: skip
    return out


def entry_states(k, v, prepared, h0, scale: float, t: Tables, plan: Plan, s: int):
    """S_in of every segment, [B * s, HV, K, V], and Phi [B * s, HV, K, K]."""
    K, HV = k.shape[3], v.shape[2]
    phi = k.new_empty(t.n, HV, K, K, dtype=torch.float32)
    entry = plan._replace(scan=plan.entry or plan.scan)
    *_, n = chunk_forward.scan(k, k, v, prepared, None, scale, t, None, entry, save=False, final=True, phi=phi)
    return _chain(n, phi, h0, s, False), phi


def exit_gradients(q, k, do, prepared, phi, dht, scale: float, t: Tables, plan: Plan, s: int) -> torch.Tensor:
    """dS_out of every segment, [B * s, HV, K, V]."""
    n = k.new_empty(t.n, do.shape[2], k.shape[3], do.shape[3], dtype=torch.float32)
    chunk_backward.reverse(q, k, do, prepared, None, n, n, scale, t, None, plan, save=False)
    return _chain(n, phi, dht, s, True)
