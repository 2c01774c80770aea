"""Chunked delta rule, forward: index -> prepare -> scores -> scan.

Legend. B batch, T time, H key heads, HV value heads, K and V head sizes, C chunk (64), N sequences.
i_ index, o_ offset, p_ pointer, m_ mask, b_ block held by a program. rk, rq: reciprocal norms of k and q (1 without
the L2 norm), folded in as row scalars so that normalised copies are never stored.

    M = strictly_lower(beta rk rk' K K^T)    A = rk (I + M)^-1 diag(beta)          prepare, one program a chunk
    P = scale rq lower(Q K^T)                                                         scores, or scan (Plan.stored)
    U = A V - A (rk K S)    O = scale rq (Q S) + P U    S' = S + K^T U                                         scan

The scan keeps the state transposed, S^T [V, K], as an accumulator: each product of the chain S -> K S -> U -> S then
takes its left operand from registers and its right one from shared memory, and nothing on the critical path makes a
round trip through shared memory (`kernels/README.md`, "Transposed scan").
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import launch
from .configs import CHUNK, EPS, GLUON, Plan


if GLUON:
    from . import hopper_scan, hopper_tiles


ZERO_PROGRAMS = 128  # at most; about one a multiprocessor
BETA_MIN = 2.0**-28  # beta is kept this far from zero inside the kernels: its root is the smallest normal fp16 number

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _zero_rows(x, W, first, end, T, i_p, n_p):
    """Rows [0, first) and [end, T) of [T, W], by n_p programs."""
    if x is not None:
        BLOCK: tl.constexpr = 1024
        o = tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], x.dtype.element_ty)
        for i in range(i_p * BLOCK, first * W, n_p * BLOCK):
            tl.store(x + i + o, zeros, mask=i + o < first * W)
        size = (end * 0 + T) * W  # in int64
        for i in range(end * W + i_p * BLOCK, size, n_p * BLOCK):
            tl.store(x + i + o, zeros, mask=i + o < size)


@triton.jit
def index_kernel(
    cu_seqlens,
    # outputs: first chunk of each sequence, and (sequence, position) of each chunk, -1 where unused
    chunk_offsets, chunks,
    # outputs of the kernels to come, rows of [T, W], or None
    x0, x1, x2, x3,
    N, MAX_CHUNKS, T, W0, W1, W2, W3,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i_n writes the table entries of sequence i_n; program N closes the table. No host synchronisation.

    The programs after these fill the rows outside of all sequences with zeros, in this launch, which is needed anyway: where
    there are none, that costs nothing to speak of.
    """
    i_n = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    if i_n > N:
        first = tl.load(cu_seqlens).to(tl.int64)
        end = tl.load(cu_seqlens + N).to(tl.int64)
        i_p = i_n - N - 1
        n_p = tl.num_programs(0) - N - 1
        _zero_rows(x0, W0, first, end, T, i_p, n_p)
        _zero_rows(x1, W1, first, end, T, i_p, n_p)
        _zero_rows(x2, W2, first, end, T, i_p, n_p)
        _zero_rows(x3, W3, first, end, T, i_p, n_p)
        return
    chunk = 0
    for i in range(0, i_n, BLOCK):
        m = i + o < i_n
        length = tl.load(cu_seqlens + i + o + 1, mask=m, other=0) - tl.load(cu_seqlens + i + o, mask=m, other=0)
        chunk += tl.sum((length.to(tl.int32) + C - 1) // C, 0)
    tl.store(chunk_offsets + i_n, chunk)
    if i_n < N:
        length = (tl.load(cu_seqlens + i_n + 1) - tl.load(cu_seqlens + i_n)).to(tl.int32)
        n_chunks = (length + C - 1) // C
        for i in range(0, n_chunks, BLOCK):
            tl.store(chunks + (chunk + i + o) * 2, i_n, mask=i + o < n_chunks)
            tl.store(chunks + (chunk + i + o) * 2 + 1, i + o, mask=i + o < n_chunks)
    else:
        for i in range(chunk, MAX_CHUNKS, BLOCK):
            tl.store(chunks + (i + o) * 2, -1, mask=i + o < MAX_CHUNKS)


@triton.jit
def _below(o, n, ALWAYS: tl.constexpr):
    """o < n; where that always holds, as a constant, so that no load or store carries a predicate: a tenth of a scan's
    instructions, and registers that it spilled."""
    return tl.full(o.shape, True, tl.int1) if ALWAYS else o < n


@triton.jit
def _load_tile(p, o_r, stride, o_c, m_r, m_c):
    """Tile [rows, columns], zero outside the masks."""
    return tl.load(p + o_r[:, None] * stride + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)


@triton.jit
def _load_tile_t(p, o_r, stride, o_c, m_r, m_c):
    """The same tile read transposed: [columns, rows]."""
    return tl.load(p + o_r[None, :] * stride + o_c[:, None], mask=m_r[None, :] & m_c[:, None], other=0.0)


@triton.jit
def _store_fragments(p, b, R: tl.constexpr, N: tl.constexpr):
    """Scratch tile [R, N] in the order in which warps hold it as a left operand: 16 bytes a thread, no moves.

    Row-major order would need a pass through shared memory and two barriers for every 2 KB. Row bits are (warp, half,
    8 rows), column bits (block of 16, half, 4, pair); only the speed depends on the layout, the result never does.
    """
    b = tl.reshape(b, [R // 16, 2, 8, N // 16, 2, 4, 2])
    b = tl.reshape(tl.permute(b, [3, 0, 2, 5, 4, 1, 6]), [R * N // 256, 256])
    o = tl.arange(0, R * N // 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    tl.store(p + o, b.to(p.dtype.element_ty))


@triton.jit
def _load_rows(p, i_r, NC: tl.constexpr, W: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Rows i_r to i_r + W of NC neighbouring tiles [R, N] that `_store_fragments` wrote, as [W, NC * N]."""
    o = tl.arange(0, NC * W * N // 256)
    o = i_r * 16 + o // (W // 16) * (R * 16) + o % (W // 16) * 256
    b = tl.load(p + o[:, None] + tl.arange(0, 256)[None, :])
    b = tl.reshape(b, [NC, N // 16, W // 16, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(b, [2, 6, 3, 0, 1, 5, 4, 7]), [W, NC * N])


@triton.jit
def _dot_t(a, b, c, FP16: tl.constexpr, PRECISION: tl.constexpr):
    """C + A B^T of 16x16 blocks: fp16 operands where the entries are known to be bounded, else fp32 ones.

    A warp holds a product as it must hold the left operand of the next, and its transpose as the right one. So where both
    factors of every product come as left operands, nothing is moved between threads. The bit cast keeps Triton from
    turning B in shared memory.
    """
    if FP16:
        b = tl.trans(b.to(tl.int16, bitcast=True)).to(tl.float16, bitcast=True)
        c = tl.dot(a, b, c, out_dtype=tl.float16)  # the tensor core sums in more bits and rounds once
    else:
        c = tl.dot(a, tl.trans(b), c, input_precision=PRECISION)
    return c


@triton.jit
def _inverse_16(b_n, b_nt, FP16: tl.constexpr, PRECISION: tl.constexpr):
    """(I - N)^-1 of a strictly lower 16x16 block, and its transpose, by doubling: 2x2 blocks in closed form, then 4, 8, 16.

    Each step is T <- T + T (lower-left quarter of N) T. Unlike a Neumann series it never forms powers of N, which
    reach 1e6 for repeated keys and cancel (`kernels.md`, Numerics).
    """
    o_r = tl.arange(0, 16)[:, None]
    o_c = tl.arange(0, 16)[None, :]
    zero = tl.zeros_like(b_n)
    b_t = tl.where(o_r == o_c, 1.0, tl.where(o_r // 2 == o_c // 2, b_n, 0.0)).to(b_n.dtype)
    b_s = tl.where(o_r == o_c, 1.0, tl.where(o_r // 2 == o_c // 2, b_nt, 0.0)).to(b_n.dtype)
    for step in tl.static_range(2, 5):
        quarter = (o_r >> step == o_c >> step) & ((o_r >> (step - 1)) % 2 == 1) & ((o_c >> (step - 1)) % 2 == 0)
        b_y = _dot_t(b_s, tl.where(quarter, b_n, zero), zero, FP16, PRECISION)
        b_t_old = b_t
        b_t = _dot_t(b_t, b_y, b_t, FP16, PRECISION)
        b_s = _dot_t(b_y, b_t_old, b_s, FP16, PRECISION)
    return b_t, b_s


@triton.jit
def _squares(b):
    b = b.to(tl.float32)
    return tl.sum(b * b, 1)


@triton.jit
def _load_beta(p, i_b: tl.constexpr, o_t, t_0, stride, T, BETA_MIN: tl.constexpr):
    """beta, kept away from zero: its gradient divides by it (README, "Where beta is zero"). So is what lies beyond the end,
    where keys are zero."""
    o = i_b * 16 + o_t
    b = tl.load(p + o * stride, mask=t_0 + o < T, other=0.0).to(tl.float32)
    return tl.where(tl.abs(b) < BETA_MIN, BETA_MIN, b)


@triton.jit
def _split_beta(b_b, b_r):
    """rk p, q and -q rk, where p of beta's sign and q = |p| have the product beta."""
    b_p = b_b * tl.rsqrt(tl.abs(b_b))
    b_q = tl.abs(b_p)
    return b_p * b_r, b_q, -b_q * b_r


@triton.jit
def _norm_of(b_g, EPS: tl.constexpr):
    """Reciprocal norms from the diagonal of K K^T, or of a block of it."""
    o = tl.arange(0, b_g.shape[0])
    return tl.rsqrt(tl.sum(tl.where(o[:, None] == o[None, :], b_g, 0.0), 1) + EPS)


@triton.jit
def _norm_backward(b_d, b_x, b_r, L2NORM: tl.constexpr):
    """b_d is r times the gradient of x^ = r x; returns that of x."""
    if L2NORM:
        b_x = b_x.to(tl.float32)
        b_d -= b_x * (tl.sum(b_x * b_d, 1) * b_r * b_r)[:, None]
    return b_d


@triton.jit
def _strict(b_m):
    o = tl.arange(0, 16)
    return tl.where(o[:, None] > o[None, :], b_m, 0.0)


@triton.jit
def _strict_t(b_m):
    o = tl.arange(0, 16)
    return tl.where(o[:, None] < o[None, :], b_m, 0.0)


@triton.jit
def _store_block(p, i_r: tl.constexpr, i_c: tl.constexpr, b, C: tl.constexpr):
    o = tl.arange(0, 16)
    tl.store(p + (i_r * 16 + o)[:, None] * C + (i_c * 16 + o)[None, :], b.to(p.dtype.element_ty))


@triton.jit
def _store_lower(p, b, C: tl.constexpr):
    """Ten blocks and the zeros above them."""
    zero = tl.zeros([16, 16], tl.float32)
    _store_block(p, 0, 0, b[0], C)
    _store_block(p, 1, 0, b[1], C)
    _store_block(p, 1, 1, b[2], C)
    _store_block(p, 2, 0, b[3], C)
    _store_block(p, 2, 1, b[4], C)
    _store_block(p, 2, 2, b[5], C)
    _store_block(p, 3, 0, b[6], C)
    _store_block(p, 3, 1, b[7], C)
    _store_block(p, 3, 2, b[8], C)
    _store_block(p, 3, 3, b[9], C)
    _store_block(p, 0, 1, zero, C)
    _store_block(p, 0, 2, zero, C)
    _store_block(p, 0, 3, zero, C)
    _store_block(p, 1, 2, zero, C)
    _store_block(p, 1, 3, zero, C)
    _store_block(p, 2, 3, zero, C)


@triton.jit
def _gram(
    p, st, t_0, T, K, BK: tl.constexpr, EVEN: tl.constexpr, FULL_K: tl.constexpr, CT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """K K^T of one chunk: the ten 16x16 blocks on and below the diagonal, row by row.

    A loop over slices of the keys, not one load: Triton then copies them to shared memory ahead (num_stages), where they
    take no registers, so that more programs share a multiprocessor (8 x 4096 x 8 x 256: 0.076 -> 0.051 ms).
    """
    b00 = tl.zeros([16, 16], tl.float32)
    b10 = tl.zeros([16, 16], tl.float32)
    b11 = tl.zeros([16, 16], tl.float32)
    b20 = tl.zeros([16, 16], tl.float32)
    b21 = tl.zeros([16, 16], tl.float32)
    b22 = tl.zeros([16, 16], tl.float32)
    b30 = tl.zeros([16, 16], tl.float32)
    b31 = tl.zeros([16, 16], tl.float32)
    b32 = tl.zeros([16, 16], tl.float32)
    b33 = tl.zeros([16, 16], tl.float32)
    o_t = tl.arange(0, 16)
    for i_k in range((K + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = _below(o_k, K, FULL_K)
        x0 = _load_tile(p, o_t, st, o_k, _below(t_0 + o_t, T, EVEN), m_k).to(CT)
        x1 = _load_tile(p, o_t + 16, st, o_k, _below(t_0 + 16 + o_t, T, EVEN), m_k).to(CT)
        x2 = _load_tile(p, o_t + 32, st, o_k, _below(t_0 + 32 + o_t, T, EVEN), m_k).to(CT)
        x3 = _load_tile(p, o_t + 48, st, o_k, _below(t_0 + 48 + o_t, T, EVEN), m_k).to(CT)
        y0 = tl.trans(x0)
        y1 = tl.trans(x1)
        y2 = tl.trans(x2)
        y3 = tl.trans(x3)
        b00 = tl.dot(x0, y0, b00, input_precision=PRECISION)
        b10 = tl.dot(x1, y0, b10, input_precision=PRECISION)
        b11 = tl.dot(x1, y1, b11, input_precision=PRECISION)
        b20 = tl.dot(x2, y0, b20, input_precision=PRECISION)
        b21 = tl.dot(x2, y1, b21, input_precision=PRECISION)
        b22 = tl.dot(x2, y2, b22, input_precision=PRECISION)
        b30 = tl.dot(x3, y0, b30, input_precision=PRECISION)
        b31 = tl.dot(x3, y1, b31, input_precision=PRECISION)
        b32 = tl.dot(x3, y2, b32, input_precision=PRECISION)
        b33 = tl.dot(x3, y3, b33, input_precision=PRECISION)
    return b00, b10, b11, b20, b21, b22, b30, b31, b32, b33


@triton.jit
def _locate(i_t, chunks, cu_seqlens, T, NT, PACKED: tl.constexpr):
    """Batch entry, chunk within its sequence, first token and length of the sequence that chunk i_t belongs to.

    The length is 0 for a chunk beyond the last: the host knows only an upper bound of a packed batch's chunks.
    """
    if PACKED:
        i_n = tl.load(chunks + i_t * 2)
        i_c = tl.load(chunks + i_t * 2 + 1)
        i_b = tl.zeros([], tl.int64)
        bos = tl.load(cu_seqlens + tl.maximum(i_n, 0)).to(tl.int64)
        T = tl.where(i_n < 0, 0, (tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1) - bos).to(tl.int32))
    else:
        i_b = (i_t // NT).to(tl.int64)
        i_c = i_t % NT
        bos = tl.zeros([], tl.int64)
    return i_b, i_c, bos, T


@triton.jit
def scores_kernel(
    # inputs
    q, k,
    # outputs: p [chunks, H, C, C]; rq [chunks, H, C], only with L2NORM
    p, rq,
    # packed sequences
    cu_seqlens, chunks,
    # sizes and strides
    scale, T, NT, H, q_sb, q_st, q_sh, k_sb, k_st, k_sh, K,
    # constants
    BK: tl.constexpr, C: tl.constexpr, L2NORM: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
    FULL_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """P = scale rq lower(Q K^T) and the norms of q, of one chunk and key head."""
    i_h = tl.program_id(0)
    i_t = tl.program_id(1)
    i_b, i_c, bos, T = _locate(i_t, chunks, cu_seqlens, T, NT, PACKED)
    if T == 0:
        return
    CT: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    o_c = tl.arange(0, C)
    m_t = _below(i_c * C + o_c, T, EVEN)
    bos += i_c * C
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    b_p = tl.zeros([C, C], tl.float32)
    b_n = tl.zeros([C, C], tl.float32)
    for i_k in range((K + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = _below(o_k, K, FULL_K)
        b_q = _load_tile(q, o_c, q_st, o_k, m_t, m_k).to(CT)
        b_k = _load_tile(k, o_c, k_st, o_k, m_t, m_k).to(CT)
        b_p = tl.dot(b_q, tl.trans(b_k), b_p, input_precision=PRECISION)
        if L2NORM:
            # not as a sum of squares: a tile that registers read, too, is overwritten under a product (README, "What
            # Triton's pipeline gets wrong")
            b_n = tl.dot(b_q, tl.trans(b_q), b_n, input_precision=PRECISION)
    b_s = tl.full([C], scale, tl.float32)
    p_r = (i_t.to(tl.int64) * H + i_h) * C
    if L2NORM:
        b_r = _norm_of(b_n, EPS)
        tl.store(rq + p_r + o_c, b_r)
        b_s *= b_r
    b_p = tl.where(o_c[:, None] >= o_c[None, :], b_p * b_s[:, None], 0.0)
    tl.store(p + p_r * C + o_c[:, None] * C + o_c[None, :], b_p.to(p.dtype.element_ty))


@triton.jit
def prepare_kernel(
    # inputs
    k, beta,
    # outputs: a [chunks, HV, C, C]; rk [chunks, H, C], only with L2NORM
    a, rk,
    # packed sequences
    cu_seqlens, chunks,
    # sizes and strides
    T, NT, H, HV, k_sb, k_st, k_sh, b_sb, b_st, b_sh, K,
    # constants
    BK: tl.constexpr, C: tl.constexpr, L2NORM: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr,
    FULL_K: tl.constexpr, WIDE: tl.constexpr, FP16: tl.constexpr, PRECISION: tl.constexpr, EPS: tl.constexpr, BETA_MIN: tl.constexpr,
):  # fmt: skip
    """A = rk (I + strictly_lower(beta rk rk' K K^T))^-1 diag(beta) of one chunk and value head, on 16x16 blocks.

    One warp: the blocks are too small for more, and with one there are no barriers. The ten blocks on and below the
    diagonal are named by row and column: m21 is block row 2, block column 1.
    """
    i_hv = tl.program_id(0)
    i_t = tl.program_id(1)
    i_h = i_hv // (HV // H)
    i_b, i_c, bos, T = _locate(i_t, chunks, cu_seqlens, T, NT, PACKED)
    if T == 0:
        return
    t_0 = i_c * C
    p_k = k + i_b * k_sb + (bos + t_0) * k_st + i_h * k_sh
    p_b = beta + i_b * b_sb + (bos + t_0) * b_st + i_hv * b_sh
    p_a = a + (i_t.to(tl.int64) * HV + i_hv) * C * C
    p_r = (i_t.to(tl.int64) * H + i_h) * C
    o_t = tl.arange(0, 16)
    CT: tl.constexpr = tl.float32 if WIDE else tl.bfloat16

    b_b0 = _load_beta(p_b, 0, o_t, t_0, b_st, T, BETA_MIN)
    b_b1 = _load_beta(p_b, 1, o_t, t_0, b_st, T, BETA_MIN)
    b_b2 = _load_beta(p_b, 2, o_t, t_0, b_st, T, BETA_MIN)
    b_b3 = _load_beta(p_b, 3, o_t, t_0, b_st, T, BETA_MIN)
    g00, g10, g11, g20, g21, g22, g30, g31, g32, g33 = _gram(p_k, k_st, t_0, T, K, BK, EVEN, FULL_K, CT, PRECISION)
    r0 = tl.full([16], 1.0, tl.float32)
    r1 = r0
    r2 = r0
    r3 = r0
    if L2NORM:
        r0 = _norm_of(g00, EPS)
        r1 = _norm_of(g11, EPS)
        r2 = _norm_of(g22, EPS)
        r3 = _norm_of(g33, EPS)
        if i_hv % (HV // H) == 0:
            tl.store(rk + p_r + o_t, r0)
            tl.store(rk + p_r + 16 + o_t, r1)
            tl.store(rk + p_r + 32 + o_t, r2)
            tl.store(rk + p_r + 48 + o_t, r3)
    # |beta| is split evenly between rows (q) and columns (p, with the sign): N = -q rk K K^T rk' p, and A = rk p T q. So
    # where beta is tiny, its row and its column stay within fp16's range. Of the diagonal blocks the transpose too: K K^T
    # is symmetric
    p0, q0, w0 = _split_beta(b_b0, r0)
    p1, q1, w1 = _split_beta(b_b1, r1)
    p2, q2, w2 = _split_beta(b_b2, r2)
    p3, q3, w3 = _split_beta(b_b3, r3)
    n00 = g00 * w0[:, None] * p0[None, :]
    n10 = g10 * w1[:, None] * p0[None, :]
    n11 = g11 * w1[:, None] * p1[None, :]
    n20 = g20 * w2[:, None] * p0[None, :]
    n21 = g21 * w2[:, None] * p1[None, :]
    n22 = g22 * w2[:, None] * p2[None, :]
    n30 = g30 * w3[:, None] * p0[None, :]
    n31 = g31 * w3[:, None] * p1[None, :]
    n32 = g32 * w3[:, None] * p2[None, :]
    n33 = g33 * w3[:, None] * p3[None, :]
    s00 = g00 * p0[:, None] * w0[None, :]
    s11 = g11 * p1[:, None] * w1[None, :]
    s22 = g22 * p2[:, None] * w2[None, :]
    s33 = g33 * p3[:, None] * w3[None, :]

    # fp16 blocks take half the registers: twice as many programs fit a multiprocessor
    HT: tl.constexpr = tl.float16 if FP16 else tl.float32
    n10 = n10.to(HT)
    n20 = n20.to(HT)
    n21 = n21.to(HT)
    n30 = n30.to(HT)
    n31 = n31.to(HT)
    n32 = n32.to(HT)
    # s, y: transposed
    t00, s00 = _inverse_16(_strict(n00).to(HT), _strict_t(s00).to(HT), FP16, PRECISION)
    t11, s11 = _inverse_16(_strict(n11).to(HT), _strict_t(s11).to(HT), FP16, PRECISION)
    t22, s22 = _inverse_16(_strict(n22).to(HT), _strict_t(s22).to(HT), FP16, PRECISION)
    t33, _ = _inverse_16(_strict(n33).to(HT), _strict_t(s33).to(HT), FP16, PRECISION)
    # two merges to 32x32, then one to 64x64: [[P, 0], [-R, Q]]^-1 = [[P', 0], [Q' R P', Q']] with y = (R P')^T
    zero = tl.zeros([16, 16], HT)
    y10 = _dot_t(s00, n10, zero, FP16, PRECISION)
    y32 = _dot_t(s22, n32, zero, FP16, PRECISION)
    t10 = _dot_t(t11, y10, zero, FP16, PRECISION)
    s10 = _dot_t(y10, t11, zero, FP16, PRECISION)
    t32 = _dot_t(t33, y32, zero, FP16, PRECISION)
    y20 = _dot_t(s10, n21, _dot_t(s00, n20, zero, FP16, PRECISION), FP16, PRECISION)
    y30 = _dot_t(s10, n31, _dot_t(s00, n30, zero, FP16, PRECISION), FP16, PRECISION)
    y21 = _dot_t(s11, n21, zero, FP16, PRECISION)
    y31 = _dot_t(s11, n31, zero, FP16, PRECISION)
    t20 = _dot_t(t22, y20, zero, FP16, PRECISION)
    t21 = _dot_t(t22, y21, zero, FP16, PRECISION)
    t30 = _dot_t(t33, y30, _dot_t(t32, y20, zero, FP16, PRECISION), FP16, PRECISION)
    t31 = _dot_t(t33, y31, _dot_t(t32, y21, zero, FP16, PRECISION), FP16, PRECISION)

    t00 = t00.to(tl.float32) * p0[:, None] * q0[None, :]
    t10 = t10.to(tl.float32) * p1[:, None] * q0[None, :]
    t11 = t11.to(tl.float32) * p1[:, None] * q1[None, :]
    t20 = t20.to(tl.float32) * p2[:, None] * q0[None, :]
    t21 = t21.to(tl.float32) * p2[:, None] * q1[None, :]
    t22 = t22.to(tl.float32) * p2[:, None] * q2[None, :]
    t30 = t30.to(tl.float32) * p3[:, None] * q0[None, :]
    t31 = t31.to(tl.float32) * p3[:, None] * q1[None, :]
    t32 = t32.to(tl.float32) * p3[:, None] * q2[None, :]
    t33 = t33.to(tl.float32) * p3[:, None] * q3[None, :]
    _store_lower(p_a, (t00, t10, t11, t20, t21, t22, t30, t31, t32, t33), C)


@triton.jit
def scan_kernel(
    # inputs; a and rk as the prepare kernel wrote them; p only with STORED
    q, k, v, a, p, rk, h0,
    # outputs; u and s, in tiles (`_store_fragments`), only with SAVE; rq too, which with STORED is an input
    o, u, s, rq, ht,
    # packed sequences
    cu_seqlens, chunk_offsets,
    # sizes and strides
    scale, T, NT, H, HV, HV_ALL,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, K, V,
    # constants
    BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, L2NORM: tl.constexpr,
    PACKED: tl.constexpr, EVEN: tl.constexpr, FULL_K: tl.constexpr, FULL_V: tl.constexpr, HAS_H0: tl.constexpr, HAS_HT: tl.constexpr, OUTPUT: tl.constexpr,
    SAVE: tl.constexpr, PHI: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, EPS: tl.constexpr,
    STORED: tl.constexpr,
):  # fmt: skip
    """Runs one sequence, value head and block of BV value columns from the first chunk to the last.

    HV_ALL is the number of heads in h0 and ht, of which a call may hold a slice (`recompute`).
    PHI (segments): blocks of columns beyond V start from the identity with v = 0; their final state goes to o.
    Keys wider than BK = 128 are held as two halves, 1 and 2, so that only one bf16 copy of the state lives at a time.
    """
    i_v = tl.program_id(0)
    i_hv = tl.program_id(1)
    i_n = tl.program_id(2)
    i_h = i_hv // (HV // H)
    if PACKED:
        i_b = tl.zeros([], tl.int64)
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        T_all = T
        T = (tl.load(cu_seqlens + i_n + 1) - bos).to(tl.int32)
        NT = (T + C - 1) // C
        chunk_0 = tl.load(chunk_offsets + i_n).to(tl.int64)
    else:
        i_b = i_n.to(tl.int64)
        bos = tl.zeros([], tl.int64)
        T_all = T
        chunk_0 = i_b * NT
    CT: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    o_c = tl.arange(0, C)
    o_k1 = tl.arange(0, BK)
    o_k2 = BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k1 = _below(o_k1, K, FULL_K or NK > 1)
    m_k2 = _below(o_k2, K, FULL_K)
    m_v = _below(o_v, V, FULL_V and not PHI)

    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    v += i_b * v_sb + bos * v_st + i_hv * v_sh
    if OUTPUT:
        o += ((i_b * T_all + bos) * HV + i_hv) * V
    # scratch: u in tiles [BV, C], s in tiles [BV, BK], the halves of the keys side by side
    NV = (V + BV - 1) // BV
    V_LOAD = V
    V_HT = V
    if PHI and i_v >= NV:
        o_v -= NV * BV
        m_v = o_v < K
        V_LOAD = 0
        V_HT = K
        ht = o
    m_load = _below(o_v, V_LOAD, FULL_V and not PHI)
    u += ((chunk_0 * HV + i_hv) * NV + i_v) * BV * C
    a += (chunk_0 * HV + i_hv) * C * C
    p += (chunk_0 * H + i_h) * C * C
    rk += (chunk_0 * H + i_h) * C
    rq += (chunk_0 * H + i_h) * C
    s += ((chunk_0 * HV + i_hv) * NV + i_v) * NK * BV * BK
    p_h = (i_n.to(tl.int64) * HV_ALL + i_hv) * K * V

    b_s1 = tl.zeros([BV, BK], tl.float32)
    if NK > 1:
        b_s2 = tl.zeros([BV, BK], tl.float32)
    if PHI:
        b_s1 += ((o_v[:, None] == o_k1[None, :]) & (i_v >= NV)).to(tl.float32)
        if NK > 1:
            b_s2 += ((o_v[:, None] == o_k2[None, :]) & (i_v >= NV)).to(tl.float32)
    if HAS_H0:
        b_s1 += _load_tile_t(h0 + p_h, o_k1, V, o_v, m_k1, m_v)
        if NK > 1:
            b_s2 += _load_tile_t(h0 + p_h, o_k2, V, o_v, m_k2, m_v)

    for i_c in range(NT):
        m_t = _below(i_c * C + o_c, T, EVEN)
        b_k1 = _load_tile(k, o_c, k_st, o_k1, m_t, m_k1).to(CT)
        if NK > 1:
            b_k2 = _load_tile(k, o_c, k_st, o_k2, m_t, m_k2).to(CT)
        b_v = _load_tile_t(v, o_c, v_st, o_v, m_t, m_load).to(CT)
        b_a = tl.load(a + o_c[:, None] * C + o_c[None, :])
        if OUTPUT:
            b_q1 = _load_tile(q, o_c, q_st, o_k1, m_t, m_k1).to(CT)
            if NK > 1:
                b_q2 = _load_tile(q, o_c, q_st, o_k2, m_t, m_k2).to(CT)
            if STORED:
                if L2NORM:
                    b_rq = tl.load(rq + o_c)
            else:
                # P^T = upper(K Q^T), and the norms of q
                b_p = tl.dot(b_k1, tl.trans(b_q1), input_precision=PRECISION)
                if NK > 1:
                    b_p = tl.dot(b_k2, tl.trans(b_q2), b_p, input_precision=PRECISION)
                b_rq = tl.full([C], 1.0, tl.float32)
                if L2NORM:
                    b_rq = _squares(b_q1)
                    if NK > 1:
                        b_rq += _squares(b_q2)
                    b_rq = tl.rsqrt(b_rq + EPS)
                    if SAVE:
                        tl.store(rq + o_c, b_rq)
                b_p = tl.where(o_c[:, None] <= o_c[None, :], b_p, 0.0).to(CT)
        b_c1 = b_s1.to(CT)
        if SAVE:
            _store_fragments(s, b_c1, BV, BK)
            if NK > 1:
                _store_fragments(s + BV * BK, b_s2.to(CT), BV, BK)

        # (-rk K S)^T
        b_x = tl.dot(b_c1, tl.trans(b_k1), input_precision=PRECISION)
        if OUTPUT:
            b_o = tl.dot(b_c1, tl.trans(b_q1), input_precision=PRECISION)
        if NK > 1:
            b_c2 = b_s2.to(CT)
            b_x = tl.dot(b_c2, tl.trans(b_k2), b_x, input_precision=PRECISION)
            if OUTPUT:
                b_o = tl.dot(b_c2, tl.trans(b_q2), b_o, input_precision=PRECISION)
        b_x = b_x * -tl.load(rk + o_c)[None, :] if L2NORM else -b_x
        # U^T = V^T A^T + (-rk K S)^T A^T
        b_u = tl.dot(b_v, tl.trans(b_a), input_precision=PRECISION)
        b_u = tl.dot(b_x.to(CT), tl.trans(b_a), b_u, input_precision=PRECISION).to(CT)
        # S^T <- S^T + U^T K
        b_s1 = tl.dot(b_u, b_k1, b_s1, input_precision=PRECISION)
        if NK > 1:
            b_s2 = tl.dot(b_u, b_k2, b_s2, input_precision=PRECISION)
        if SAVE:
            _store_fragments(u, b_u, BV, C)

        # O^T = scale rq (S^T Q^T) + U^T P^T; a P of this kernel lacks the factor
        if OUTPUT:
            if STORED:
                b_o *= (b_rq * scale)[None, :] if L2NORM else scale
                b_p = tl.load(p + o_c[:, None] * C + o_c[None, :])
                b_o = tl.dot(b_u, tl.trans(b_p), b_o, input_precision=PRECISION)
            else:
                b_o = tl.dot(b_u, b_p, b_o, input_precision=PRECISION) * (b_rq * scale)[None, :]
            p_o = o + o_c[None, :] * (HV * V) + o_v[:, None]
            tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_t[None, :] & m_v[:, None])

        q += C * q_st
        k += C * k_st
        v += C * v_st
        if OUTPUT:
            o += C * HV * V
        u += HV * NV * BV * C
        s += HV * NV * NK * BV * BK
        a += C * C * HV
        p += C * C * H
        rk += C * H
        rq += C * H

    if HAS_HT:
        p_h = (i_n.to(tl.int64) * HV_ALL + i_hv) * K * V_HT
        tl.store(ht + p_h + o_k1[None, :] * V_HT + o_v[:, None], b_s1, mask=m_v[:, None] & m_k1[None, :])
        if NK > 1:
            tl.store(ht + p_h + o_k2[None, :] * V_HT + o_v[:, None], b_s2, mask=m_v[:, None] & m_k2[None, :])


# --------------------------------------------------------------------------------------------------------- launchers


class Tables(NamedTuple):
    """Where sequences and chunks lie. Tensors are None for a dense batch, where it is plain arithmetic."""

    n: int  # sequences
    n_chunks: int  # programs over chunks; an upper bound for packed sequences, whose lengths only the device knows
    nt: int  # chunks a sequence (dense)
    even: bool  # every chunk is known to be full
    cu_seqlens: torch.Tensor | None = None  # borders
    chunk_offsets: torch.Tensor | None = None
    chunks: torch.Tensor | None = None


def count_chunks(B: int, T: int, cu_seqlens: torch.Tensor | None) -> int:
    """`Tables.n_chunks`."""
    return B * ((T + CHUNK - 1) // CHUNK) if cu_seqlens is None else T // CHUNK + cu_seqlens.shape[0] - 1


def tables(B: int, T: int, cu_seqlens: torch.Tensor | None, outputs: tuple[torch.Tensor, ...] = ()) -> Tables:
    """`outputs`, contiguous, at most four, get zeros where no sequence is (packed sequences alone)."""
    n_chunks = count_chunks(B, T, cu_seqlens)
    if cu_seqlens is None:
        return Tables(B, n_chunks, -(-T // CHUNK), T % CHUNK == 0)
    n = cu_seqlens.shape[0] - 1
    offsets, chunks = (torch.empty(x, dtype=torch.int32, device=cu_seqlens.device) for x in (n + 1, 2 * n_chunks))
    missing = 4 - len(outputs)
    launch(
        index_kernel, (n + 1 + min(ZERO_PROGRAMS, -(-T // CHUNK)),),
        (cu_seqlens, offsets, chunks, *outputs, *[None] * missing),
        (n, n_chunks, T, *[x.stride(1) for x in outputs], *[0] * missing),
        {"C": CHUNK, "BLOCK": 128},
        {"num_warps": 1},
    )  # fmt: skip
    return Tables(n, n_chunks, 0, False, cu_seqlens, offsets, chunks)


def scratch_type(dtype: torch.dtype) -> torch.dtype:
    """fp16 goes through fp32: its exponent range cannot hold U and dV where beta is near zero."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def precision(dtype: torch.dtype) -> str:
    """tf32 holds an fp16 number exactly; fp32 inputs get three tf32 products, an error of fp32's class."""
    return "tf32" if dtype == torch.float16 else "tf32x3"


@functools.cache
def blocks(K: int, V: int, plan: Plan) -> tuple[int, int, int, int]:
    """Value columns of a scan program, number of such programs, key columns of a half, number of halves.

    Cached, because Triton's own cdiv and next_power_of_2 took a quarter of the host's time in a forward + backward.
    """
    block_v = min(plan.scan.block_v, max(16, triton.next_power_of_2(V)))
    block_k = max(32, min(128, triton.next_power_of_2(K)))
    return block_v, -(-V // block_v), block_k, -(-K // block_k)


def static(size: int, wide: bool = False) -> int | tl.constexpr:
    """A head size as kernels are given it: a constant where that was tuned, a number otherwise.

    So sizes of one kind (`blocks`, and whether these are full) share their machine code, and a test of all sizes compiles
    a tenth of what it would.
    """
    return size if wide or size & (size - 1) else tl.constexpr(size)


class Scratch(NamedTuple):
    """What the kernels leave to each other (`kernels/README.md`, "Symbols")."""

    a: torch.Tensor  # [chunks, HV, C, C]
    p: torch.Tensor | None  # [chunks, H, C, C], where the plan stores it
    rq: torch.Tensor | None  # [chunks, H, C], with the L2 norm
    rk: torch.Tensor | None
    u: torch.Tensor | None  # in tiles, and so is s; for backward alone
    s: torch.Tensor | None


ALIGNMENT = 128  # bytes, a line of the cache


def scratch_layout(k, v, l2norm: bool, save: bool, n_chunks: int, plan: Plan) -> tuple[Scratch, int]:
    """(first byte, shape, dtype) of each tensor in one piece of memory, and the bytes of that.

    One piece, since each allocation takes the host up to 6 us, and each tensor that backward is left some more.
    """
    H, K = k.shape[2:]
    HV, V = v.shape[2:]
    block_v, nv, _, _ = blocks(K, V, plan)
    norms = n_chunks, H, CHUNK
    wanted = Scratch(
        a=(n_chunks, HV, CHUNK, CHUNK),
        p=(n_chunks, H, CHUNK, CHUNK) if plan.stored else None,
        rq=norms if l2norm else None,
        rk=norms if l2norm else None,
        u=(n_chunks, HV, nv * block_v, CHUNK) if save else None,
        s=s_shape(k, v, n_chunks, plan) if save else None,
    )
    places, end = [], 0
    for name, shape in wanted._asdict().items():
        dtype = torch.float32 if name in ("rq", "rk") else scratch_type(k.dtype)
        places.append(None if shape is None else (end, shape, dtype))
        if shape is not None:
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return Scratch(*places), end


def scratch_in(memory: torch.Tensor, layout: Scratch) -> Scratch:
    """The tensors in `memory`, as many bytes as `scratch_layout` says."""

    def at(start, shape, dtype):
        return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    return Scratch(*(None if place is None else at(*place) for place in layout))


def new_scratch(k, v, l2norm: bool, save: bool, n_chunks: int, plan: Plan) -> tuple[torch.Tensor, Scratch]:
    """The memory, and the tensors in it."""
    layout, size = scratch_layout(k, v, l2norm, save, n_chunks, plan)
    memory = k.new_empty(size, dtype=torch.uint8)
    return memory, scratch_in(memory, layout)


def s_shape(k, v, n_chunks: int, plan: Plan) -> tuple[int, ...]:
    K, (HV, V) = k.shape[3], v.shape[2:]
    block_v, nv, block_k, nk = blocks(K, V, plan)
    return n_chunks, HV, nv * block_v, nk * block_k


def prepare(q, k, beta, scale: float, x: Scratch, t: Tables, plan: Plan) -> None:
    """Writes A, the norms of k and, where the plan stores P, that and the norms of q, which else the scan writes."""
    B, T, H, K = k.shape
    HV = beta.shape[2]
    a, p, rq, rk = x[:4]
    l2norm, wide = rk is not None, k.dtype != torch.bfloat16
    if t.n_chunks > 0 and T > 0:
        constants = {
            "C": CHUNK, "L2NORM": l2norm, "PACKED": t.cu_seqlens is not None, "EVEN": t.even, "WIDE": wide, "EPS": EPS,
        }  # fmt: skip
        block_k = min(plan.prepare.block_v, blocks(K, K, plan)[2])
        launch(
            prepare_kernel, (HV, t.n_chunks),
            (k, beta, a, a if rk is None else rk, t.cu_seqlens, t.chunks),
            (T, t.nt, H, HV, *k.stride()[:3], *beta.stride()[:3], static(K, wide)),
            {
                **constants, "BK": block_k, "FULL_K": K % block_k == 0, "FP16": l2norm and not wide,
                "PRECISION": "tf32x3" if wide else "tf32", "BETA_MIN": BETA_MIN,
            },
            {"num_warps": plan.prepare.num_warps, "num_stages": plan.prepare.num_stages, "maxnreg": plan.prepare.maxnreg},
        )  # fmt: skip
        if plan.stored:
            block_k = min(plan.scores.block_v, blocks(K, K, plan)[2])
            launch(
                scores_kernel, (H, t.n_chunks),
                (q, k, p, a if rq is None else rq, t.cu_seqlens, t.chunks),
                (scale, T, t.nt, H, *q.stride()[:3], *k.stride()[:3], static(K, wide)),
                {**constants, "BK": block_k, "FULL_K": K % block_k == 0, "PRECISION": precision(k.dtype)},
                {"num_warps": plan.scores.num_warps, "num_stages": plan.scores.num_stages},
            )  # fmt: skip


def scan(q, k, v, x: Scratch, h0, scale, t: Tables, plan: Plan, *, o=None, ht=None, phi=None) -> None:
    """Forward scan. Writes o and the final state ht where they are given, u and s where x has them, and, for segments,
    phi [N, HV, K, K].
    """
    a, p, rq, rk, u, s = x
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    wide = k.dtype != torch.bfloat16
    if t.n == 0:
        return
    choice = plan.scan
    block_v, nv, block_k, nk = blocks(K, V, plan)
    if plan.gluon_scans and o is not None and hopper_tiles.accepts(q, k, v):
        hopper_scan.scan(q, k, v, a, rk, h0, o, u, s, rq, ht, scale, t, plan.gluon_scans)
    else:
        columns = nv if phi is None else nv - (-K // block_v)
        launch(
            scan_kernel, (columns, HV, t.n),
            (
                q, k, v, a, a if p is None else p, a if rk is None else rk, a if h0 is None else h0,
                (a if phi is None else phi) if o is None else o, a if u is None else u, a if s is None else s,
                a if rq is None else rq, a if ht is None else ht,
                t.cu_seqlens, t.chunk_offsets,
            ),
            (
                scale, T, t.nt, H, HV, HV, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                static(K, wide), static(V, wide),
            ),
            {
                "BK": block_k, "NK": nk, "BV": block_v, "C": CHUNK,
                "L2NORM": rk is not None, "PACKED": t.cu_seqlens is not None, "EVEN": t.even,
                "FULL_K": K % block_k == 0, "FULL_V": V % block_v == 0, "HAS_H0": h0 is not None,
                "HAS_HT": ht is not None, "OUTPUT": o is not None, "SAVE": u is not None, "PHI": phi is not None, "WIDE": wide,
                "PRECISION": precision(k.dtype), "EPS": EPS, "STORED": plan.stored,
            },
            {"num_warps": choice.num_warps, "num_stages": choice.num_stages},
        )  # fmt: skip
