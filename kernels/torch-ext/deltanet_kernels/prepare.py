"""A chunk's own matrices: A and the norms of k (prepare_kernel), P and the norms of q (scores_kernel).

    M = strictly_lower(beta rk rk' K K^T)    A = rk (I + M)^-1 diag(beta)          P = scale rq lower(Q K^T)

rk and rq are reciprocal norms (1 without the L2 norm), folded in as row scalars so that normalised copies are never
stored. With a gate, entry i, j of A and of P fades by exp(g_{j+1} + ... + g_i): gs holds the sums of g from the
chunk's start on, whose differences these are.
"""

import triton
import triton.language as tl

from ._launch import launch
from .layout import Inputs, Scratch, Tables, precision, static
from .plan import Plan
from .tiles import C, below, decay, load_tile, locate_chunk, norm_of


LOG2_E = tl.constexpr(1.4426950408889634)  # a power of 2 is one instruction, of e five
BETA_MIN = tl.constexpr(2.0**-28)  # beta is kept this far from zero: its root is the smallest normal fp16 number


# ------------------------------------------------------------------------------------------------------------ A, norms


@triton.jit
def _dot_t(a, b, c, FP16: tl.constexpr, PRECISION: tl.constexpr):
    """C + A B^T of 16x16 blocks: fp16 operands where the entries are known to be bounded, else fp32 ones.

    A warp holds a product as it must hold the left operand of the next, and its transpose as the right one. So where
    both factors of every product come as left operands, nothing is moved between threads. The bit cast keeps Triton
    from turning B in shared memory.
    """
    if FP16:
        b = tl.trans(b.to(tl.int16, bitcast=True)).to(tl.float16, bitcast=True)
        c = tl.dot(a, b, c, out_dtype=tl.float16)  # the tensor core sums in more bits and rounds once
    else:
        c = tl.dot(a, tl.trans(b), c, input_precision=PRECISION)
    return c


@triton.jit
def _inverse_16(b_n, b_nt, FP16: tl.constexpr, PRECISION: tl.constexpr):
    """(I - N)^-1 of a strictly lower 16x16 block, and its transpose, by doubling: 2x2 blocks in closed form, then 4,
    8, 16.

    Each step is T <- T + T (lower-left quarter of N) T. Unlike a Neumann series it never forms powers of N, which
    reach 1e6 for repeated keys and cancel (`kernels/README.md`, "Numerics").
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
def _load_beta(p, i_b: tl.constexpr, o_t, t_0, stride, T):
    """beta, kept away from zero: its gradient divides by it (README, "Where beta is zero"). So is what lies beyond the
    end, where keys are zero."""
    o = i_b * 16 + o_t
    b = tl.load(p + o * stride, mask=t_0 + o < T, other=0.0).to(tl.float32)
    return tl.where(tl.abs(b) < BETA_MIN, BETA_MIN, b)


@triton.jit
def _running_sum(p, i_b: tl.constexpr, o_t, t_0, stride, T, gs, start):
    """Sums of g from the chunk's start to each token of block i_b, which `start` begins, for powers of 2; also stored.
    Beyond the end g is 0, so that the last of all is the chunk's sum.
    """
    o = i_b * 16 + o_t
    b_g = tl.load(p + o * stride, mask=t_0 + o < T, other=0.0).to(gs.dtype.element_ty)
    b_g = tl.cumsum(b_g * LOG2_E, 0) + start
    tl.store(gs + o, b_g)
    return b_g


@triton.jit
def _last(b_x):
    return tl.sum(tl.where(tl.arange(0, 16) == 15, b_x, 0.0), 0)


@triton.jit
def _split_beta(b_b, b_r):
    """rk p, q and -q rk, where p of beta's sign and q = |p| have the product beta."""
    b_p = b_b * tl.rsqrt(tl.abs(b_b))
    b_q = tl.abs(b_p)
    return b_p * b_r, b_q, -b_q * b_r


@triton.jit
def _strict(b_m):
    o = tl.arange(0, 16)
    return tl.where(o[:, None] > o[None, :], b_m, 0.0)


@triton.jit
def _strict_t(b_m):
    o = tl.arange(0, 16)
    return tl.where(o[:, None] < o[None, :], b_m, 0.0)


@triton.jit
def _store_block(p, i_r: tl.constexpr, i_c: tl.constexpr, b):
    o = tl.arange(0, 16)
    tl.store(p + (i_r * 16 + o)[:, None] * C + (i_c * 16 + o)[None, :], b.to(p.dtype.element_ty))


@triton.jit
def _store_lower(p, b):
    """Ten blocks and the zeros above them."""
    zero = tl.zeros([16, 16], tl.float32)
    _store_block(p, 0, 0, b[0])
    _store_block(p, 1, 0, b[1])
    _store_block(p, 1, 1, b[2])
    _store_block(p, 2, 0, b[3])
    _store_block(p, 2, 1, b[4])
    _store_block(p, 2, 2, b[5])
    _store_block(p, 3, 0, b[6])
    _store_block(p, 3, 1, b[7])
    _store_block(p, 3, 2, b[8])
    _store_block(p, 3, 3, b[9])
    _store_block(p, 0, 1, zero)
    _store_block(p, 0, 2, zero)
    _store_block(p, 0, 3, zero)
    _store_block(p, 1, 2, zero)
    _store_block(p, 1, 3, zero)
    _store_block(p, 2, 3, zero)


@triton.jit
def _gram(
    p, st, t_0, T, K, BK: tl.constexpr, EVEN: tl.constexpr, FULL_K: tl.constexpr, CT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """K K^T of one chunk: the ten 16x16 blocks on and below the diagonal, row by row.

    A loop over slices of the keys, not one load: Triton then copies them to shared memory ahead (num_stages), where
    they take no registers, so that more programs share a multiprocessor (8 x 4096 x 8 x 256: 0.076 -> 0.051 ms).
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
        m_k = below(o_k, K, FULL_K)
        x0 = load_tile(p, o_t, st, o_k, below(t_0 + o_t, T, EVEN), m_k).to(CT)
        x1 = load_tile(p, o_t + 16, st, o_k, below(t_0 + 16 + o_t, T, EVEN), m_k).to(CT)
        x2 = load_tile(p, o_t + 32, st, o_k, below(t_0 + 32 + o_t, T, EVEN), m_k).to(CT)
        x3 = load_tile(p, o_t + 48, st, o_k, below(t_0 + 48 + o_t, T, EVEN), m_k).to(CT)
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
def prepare_kernel(
    # inputs; g [B, T, HV], or None without a gate
    k, beta, g,
    # outputs: a [chunks, HV, C, C]; rk [chunks, H, C], or None without the L2 norm; gs [chunks, HV, C] with a gate
    a, rk, gs,
    # packed sequences
    cu_seqlens, chunks,
    # sizes and strides
    T, NT, H, HV, k_sb, k_st, k_sh, b_sb, b_st, b_sh, K,
    # constants
    BK: tl.constexpr, EVEN: tl.constexpr, FULL_K: tl.constexpr, FP16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A = rk (I + strictly_lower(beta rk rk' K K^T))^-1 diag(beta) of one chunk and value head, on 16x16 blocks.

    One warp: the blocks are too small for more, and with one there are no barriers. The ten blocks on and below the
    diagonal are named by row and column: m21 is block row 2, block column 1.
    """
    i_hv = tl.program_id(0)
    i_t = tl.program_id(1)
    i_h = i_hv // (HV // H)
    T_all = T
    i_b, i_c, bos, T = locate_chunk(i_t, chunks, cu_seqlens, T, NT)
    if T == 0:
        return
    t_0 = i_c * C
    p_k = k + i_b * k_sb + (bos + t_0) * k_st + i_h * k_sh
    p_b = beta + i_b * b_sb + (bos + t_0) * b_st + i_hv * b_sh
    p_a = a + (i_t.to(tl.int64) * HV + i_hv) * C * C
    p_r = (i_t.to(tl.int64) * H + i_h) * C
    o_t = tl.arange(0, 16)
    CT: tl.constexpr = a.dtype.element_ty

    b_b0 = _load_beta(p_b, 0, o_t, t_0, b_st, T)
    b_b1 = _load_beta(p_b, 1, o_t, t_0, b_st, T)
    b_b2 = _load_beta(p_b, 2, o_t, t_0, b_st, T)
    b_b3 = _load_beta(p_b, 3, o_t, t_0, b_st, T)
    if gs is not None:
        gs += (i_t.to(tl.int64) * HV + i_hv) * C
        p_g = g + (i_b * T_all + bos + t_0) * HV + i_hv
        d0 = _running_sum(p_g, 0, o_t, t_0, HV, T, gs, 0.0)
        d1 = _running_sum(p_g, 1, o_t, t_0, HV, T, gs, _last(d0))
        d2 = _running_sum(p_g, 2, o_t, t_0, HV, T, gs, _last(d1))
        d3 = _running_sum(p_g, 3, o_t, t_0, HV, T, gs, _last(d2))
    g00, g10, g11, g20, g21, g22, g30, g31, g32, g33 = _gram(p_k, k_st, t_0, T, K, BK, EVEN, FULL_K, CT, PRECISION)
    r0 = tl.full([16], 1.0, tl.float32)
    r1 = r0
    r2 = r0
    r3 = r0
    if rk is not None:
        r0 = norm_of(g00)
        r1 = norm_of(g11)
        r2 = norm_of(g22)
        r3 = norm_of(g33)
        if i_hv % (HV // H) == 0:
            tl.store(rk + p_r + o_t, r0)
            tl.store(rk + p_r + 16 + o_t, r1)
            tl.store(rk + p_r + 32 + o_t, r2)
            tl.store(rk + p_r + 48 + o_t, r3)
    # |beta| is split evenly between rows (q) and columns (p, with the sign): N = -q rk K K^T rk' p, and A = rk p T q.
    # So where beta is tiny, its row and its column stay within fp16's range. Of the diagonal blocks the transpose too:
    # K K^T is symmetric
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
    if gs is not None:
        t00 *= decay(d0[:, None], d0[None, :])
        t10 *= decay(d1[:, None], d0[None, :])
        t11 *= decay(d1[:, None], d1[None, :])
        t20 *= decay(d2[:, None], d0[None, :])
        t21 *= decay(d2[:, None], d1[None, :])
        t22 *= decay(d2[:, None], d2[None, :])
        t30 *= decay(d3[:, None], d0[None, :])
        t31 *= decay(d3[:, None], d1[None, :])
        t32 *= decay(d3[:, None], d2[None, :])
        t33 *= decay(d3[:, None], d3[None, :])
    _store_lower(p_a, (t00, t10, t11, t20, t21, t22, t30, t31, t32, t33))


# ------------------------------------------------------------------------------------------------------------------- P


@triton.jit
def scores_kernel(
    # inputs; gs [chunks, HV, C] of the gate, or None
    q, k, gs,
    # outputs: p [chunks, H * G, C, C]; rq [chunks, H, C], or None without the L2 norm
    p, rq,
    # packed sequences
    cu_seqlens, chunks,
    # sizes and strides
    scale, T, NT, H, q_sb, q_st, q_sh, k_sb, k_st, k_sh, K,
    # constants; G the value heads of a key head with a gate, 1 without
    G: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, FULL_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P = scale rq lower(Q K^T) and the norms of q, of one chunk and key head; with a gate P of one value head."""
    i_h = tl.program_id(0) // G
    i_t = tl.program_id(1)
    i_b, i_c, bos, T = locate_chunk(i_t, chunks, cu_seqlens, T, NT)
    if T == 0:
        return
    CT: tl.constexpr = p.dtype.element_ty
    o_c = tl.arange(0, C)
    m_t = below(o_c + i_c * C, T, EVEN)
    bos += i_c * C
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    b_p = tl.zeros([C, C], tl.float32)
    b_n = tl.zeros([C, C], tl.float32)
    for i_k in range((K + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = below(o_k, K, FULL_K)
        b_q = load_tile(q, o_c, q_st, o_k, m_t, m_k).to(CT)
        b_k = load_tile(k, o_c, k_st, o_k, m_t, m_k).to(CT)
        b_p = tl.dot(b_q, tl.trans(b_k), b_p, input_precision=PRECISION)
        if rq is not None:
            # not as a sum of squares: a tile that registers read, too, is overwritten under a product (README, "What
            # Triton's pipeline gets wrong")
            b_n = tl.dot(b_q, tl.trans(b_q), b_n, input_precision=PRECISION)
    b_s = tl.full([C], scale, tl.float32)
    p_r = (i_t.to(tl.int64) * H + i_h) * C
    if rq is not None:
        b_r = norm_of(b_n)
        tl.store(rq + p_r + o_c, b_r)
        b_s *= b_r
    b_p = tl.where(o_c[:, None] >= o_c[None, :], b_p * b_s[:, None], 0.0)
    if gs is not None:
        p_r = (i_t.to(tl.int64) * H * G + tl.program_id(0)) * C
        b_p *= decay(tl.load(gs + p_r + o_c)[:, None], tl.load(gs + p_r + o_c)[None, :])
    tl.store(p + p_r * C + o_c[:, None] * C + o_c[None, :], b_p.to(p.dtype.element_ty))


# ----------------------------------------------------------------------------------------------------------- launchers


def prepare(x: Inputs, scratch: Scratch, t: Tables, plan: Plan, scale: float) -> None:
    """Writes A, the norms of k and, where the plan has a kernel for them, the scores and the norms of q."""
    K, wide = plan.call.K, plan.call.wide
    if t.n_chunks == 0 or plan.call.T == 0:
        return
    choice, T = plan.prepare, x.k.shape[1]
    launch(
        prepare_kernel, (plan.call.HV, t.n_chunks),
        (x.k, x.beta, x.g, scratch.a, scratch.rk, scratch.gs, t.cu_seqlens, t.chunks),
        (T, t.nt, plan.call.H, plan.call.HV, *x.k.stride()[:3], *x.beta.stride()[:3], static(K, wide)),
        {
            "BK": choice.columns, "EVEN": t.even, "FULL_K": K % choice.columns == 0,
            "FP16": scratch.rk is not None and not wide, "PRECISION": "tf32x3" if wide else "tf32",
        },
        {"num_warps": choice.num_warps, "num_stages": choice.num_stages, "maxnreg": choice.maxnreg},
    )  # fmt: skip
    if plan.scores is not None:
        choice, group = plan.scores, plan.call.HV // plan.call.H if plan.call.gated else 1
        launch(
            scores_kernel, (plan.call.H * group, t.n_chunks),
            (x.q, x.k, scratch.gs, scratch.p, scratch.rq, t.cu_seqlens, t.chunks),
            (scale, T, t.nt, plan.call.H, *x.q.stride()[:3], *x.k.stride()[:3], static(K, wide)),
            {
                "G": group, "BK": choice.columns, "EVEN": t.even, "FULL_K": K % choice.columns == 0,
                "PRECISION": precision(plan.call.dtype),
            },
            {"num_warps": choice.num_warps, "num_stages": choice.num_stages},
        )  # fmt: skip
