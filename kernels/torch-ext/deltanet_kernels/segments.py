"""Long sequences with few heads: the scan cut into segments that run side by side.

A scan has one program a sequence, head and block of value columns: 32 of them for 16 heads of 128 at batch 1, on a
chip of 132 multiprocessors. Over a segment the state goes S_out = Phi S_in + N, so:

    N     = the segment's final state from S_in = 0                         (scan, no output)
    Phi   = the same for v = 0 and S_in = I: K more value columns           (in the same launch)
    S_in  of every segment, one after the other                             (chain, one launch)
    the ordinary scan from each segment's true entry state                  (scan)

Backward is its adjoint, dS_in = Phi^T dS_out + dN, and reuses Phi. Phi is exact, nothing is truncated: the rule does
not decay. Each factor has norm at most 1 for normalised keys and beta <= 2, so products cannot grow.

Where T is a multiple of the segments, they are batch entries: every tensor is viewed as [B * S, T / S, ...], which costs no
copy. Else they are packed sequences of one batch entry, the last one the shortest.
"""

import torch
import triton
import triton.language as tl

from . import chunk_backward, chunk_forward, configs
from ._launch import launch
from .chunk_forward import Scratch, Tables
from .configs import CHUNK, Plan


# Chunks of a sequence from which on it is cut. Cut, a call has twice the launches, which at batch 1 an eager one waits for:
# forward + backward of 2048 tokens, 16 heads of 128, took 0.22 ms uncut and 0.37 to 0.39 cut (three H100s), though the GPU was
# done sooner (in CUDA graphs 0.162 and 0.149); 3072 tokens 0.42 and 0.35; so between the two
MIN_TOTAL = 40
# The same for backward: 16 heads of 128 gained 0.016 ms by it at 4096 tokens, in a CUDA graph, and 0.057 at 8192 (H100); its two
# launches more cost a host 0.02 to 0.05
MIN_BACKWARD = 128
# Chunks a segment (one head of 128, H100, CUDA graphs: 4096 tokens in eight 0.105 ms, in four 0.125)
MIN_CHUNKS = 8
# where a program holds all columns of a head. 20 heads of 128, 32768 tokens, forward alone: 0.77 ms, uncut 0.95
MIN_CHUNKS_WHOLE = 128


def count(B: int, T: int, HV: int, K: int, blocks: int, sms: int, backward: bool) -> int:
    """Segments of a sequence: the largest power of two that gives each multiprocessor one program at most, of a block
    of columns. `backward` says whether gradients may be asked for.

    Not more than the chunks of a segment: the chain takes 3.4 us a segment and both scans 1.8 us a chunk, so that their sum
    is least at about the root of all chunks, as was measured (`kernels/README.md`, "Segments").

    Without gradients, long segments may also fill the chip with programs of a whole head, which load once what its blocks of
    columns share; with them, that lost an eighth (32 heads of 128).
    """
    s, chunks = 1, -(-T // CHUNK)
    while chunks >= MIN_TOTAL:
        length, heads = chunks // (2 * s), 2 * s * B * HV
        # for Phi the first pass has as many programs again. Two share a multiprocessor, but of wide keys: they take turns
        # (8 heads of 256, 4096 tokens, forward: eight segments 0.219 ms, four 0.192)
        turns = 2 if K > 128 and 2 * heads * blocks > sms else 1
        few = heads * blocks <= sms and length >= turns * MIN_CHUNKS
        whole = not backward and heads <= sms and heads * blocks <= 2 * sms and length >= MIN_CHUNKS_WHOLE
        if length < 2 * s or not (few or whole):
            break
        s *= 2
    # two extra passes: worth it from four segments on
    return s if s >= 4 else 1


def cuts_backward(T: int, K: int, programs: int, sms: int, beside: bool) -> bool:
    """Whether backward of a sequence that forward cut is cut, too. `programs` are those of the uncut reverse scan.

    Its two extra launches come when the host is behind. Where the gradients run `beside` the scan (Plan), they fill the chip,
    and only a scan of fewer programs still gains; wide keys gain most.
    """
    return K > 128 or (-(-T // CHUNK) >= MIN_BACKWARD and (not beside or 6 * programs <= sms))


def _divides(T: int, s: int) -> bool:
    return T % (s * CHUNK) == 0


def can_cut(*tensors: torch.Tensor) -> bool:
    """Whether the rows of each [B, T, ...] follow each other in memory as one sequence's tokens do."""
    return all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)


def cut(x: torch.Tensor, s: int) -> torch.Tensor:
    """[B, T, ...] seen as [B * s, T / s, ...], or as [1, B * T, ...]."""
    B, T = x.shape[:2]
    shape = (B * s, T // s) if _divides(T, s) else (1, B * T)
    return x.as_strided((*shape, *x.shape[2:]), (shape[1] * x.stride(1), *x.stride()[1:]), x.storage_offset())


@triton.jit
def borders_kernel(
    # outputs, as `chunk_forward.index_kernel` writes them, and the segments' borders in [B * T]
    borders, chunk_offsets, chunks,
    T, NT, LENGTH, N, N_CHUNKS,
    S: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Entries of BLOCK chunks and of as many segments. NT chunks a sequence, LENGTH a segment, the last ones maybe less."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(chunks + o * 2, o // NT * S + o % NT // LENGTH, mask=o < N_CHUNKS)
    tl.store(chunks + o * 2 + 1, o % NT % LENGTH, mask=o < N_CHUNKS)
    first = tl.minimum(o % S * LENGTH, NT)
    tl.store(chunk_offsets + o, o // S * NT + first, mask=o <= N)
    tl.store(borders + o, o // S * T + tl.minimum(first * C, T), mask=o <= N)


def tables(B: int, T: int, s: int, device: torch.device) -> Tables:
    """Where the segments and their chunks lie. Packed, their borders come from the numbers, in the launch that indexes them."""
    if _divides(T, s):
        return chunk_forward.tables(B * s, T // s, None)
    nt = -(-T // CHUNK)
    sizes = B * s + 1, B * s + 1, 2 * B * nt
    borders, offsets, chunks = (torch.empty(x, dtype=torch.int32, device=device) for x in sizes)
    launch(
        borders_kernel, (-(-max(sizes[0], B * nt) // 128),),
        (borders, offsets, chunks),
        (T, nt, -(-nt // s), B * s, B * nt),
        {"S": s, "C": CHUNK, "BLOCK": 128},
        {"num_warps": 1},
    )  # fmt: skip
    return Tables(B * s, B * nt, 0, T % CHUNK == 0, borders, offsets, chunks)


@triton.jit
def _load_block(p, o_r, o_c, K, REVERSE: tl.constexpr):
    """A block of Phi [K, K], or of its transpose."""
    o = o_r[:, None] + o_c[None, :] * K if REVERSE else o_r[:, None] * K + o_c[None, :]
    return tl.load(p + o, mask=(o_r < K)[:, None] & (o_c < K)[None, :], other=0.0)


@triton.jit
def chain_kernel(
    n, phi, first, out,
    HV, K, V,
    BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, S: tl.constexpr,
    HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr,
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
    if HAS_FIRST:
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


def _new_states(x: torch.Tensor, N: int, HV: int, K: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the first pass writes N, and where the chain writes what enters each segment."""
    both = x.new_empty(2, N, HV, K, V, dtype=torch.float32)
    return both[0], both[1]


def chain_block(K: int) -> int:
    """Keys of a half of the chain's state."""
    return min(128, max(16, triton.next_power_of_2(K)))


def _chain(n, phi, first, out, s: int, reverse: bool) -> torch.Tensor:
    N, HV, K, V = n.shape
    choice = configs.chain(configs.arch_of(n.device.index), K)
    launch(
        chain_kernel, (-(-V // choice.block_v), N // s * HV),
        (n, phi, n if first is None else first, out),
        (HV, chunk_forward.static(K), chunk_forward.static(V)),
        {
            "BK": chain_block(K), "NK": -(-K // 128), "BV": choice.block_v, "S": s,
            "HAS_FIRST": first is not None, "REVERSE": reverse,
        },
        {"num_warps": choice.num_warps, "num_stages": choice.num_stages},
    )  # fmt: skip
    return out


def entry_states(k, v, x: Scratch, h0, phi, scale: float, t: Tables, plan: Plan, s: int) -> torch.Tensor:
    """S_in of every segment, [B * s, HV, K, V]; writes Phi [B * s, HV, K, K]."""
    n, out = _new_states(k, t.n, v.shape[2], k.shape[3], v.shape[3])
    entry = plan._replace(scan=plan.entry or plan.scan)
    chunk_forward.scan(k, k, v, x._replace(u=None, s=None), None, scale, t, entry, ht=n, phi=phi)
    return _chain(n, phi, h0, out, s, False)


def exit_gradients(q, k, do, x: Scratch, phi, dht, scale: float, t: Tables, plan: Plan, s: int) -> torch.Tensor:
    """dS_out of every segment, [B * s, HV, K, V]."""
    n, out = _new_states(k, t.n, do.shape[2], k.shape[3], do.shape[3])
    chunk_backward.reverse(q, k, do, x, None, n, n, scale, t, plan, save=False)
    return _chain(n, phi, dht, out, s, True)
