"""Chunked delta rule, backward: reverse scan -> chunk-parallel gradients.

Letters as in `chunk_forward.py`; a d before a name is a gradient. U is saved times rk, as the forward scan used it.

    dU = P^T dO + K dS    dV = A^T dU    dS <- dS + Q^T (scale rq dO) - K^T (rk dV)                 reverse
    R = lower(dO U^T)    dq^ = scale (dO S^T + R K)                                                             grads
    E = -strictly_lower(rk dV U^T)
    rk dk^ = -rk (dV S^T) + U dS^T + (scale rq R)^T Q + (E + E^T) K
    dbeta = rk diag(dV U^T) / diag(A)^2
    d of x^ = x / |x|:  dx = r (dx^ - x^ <x^, dx^>)

The second half needs only the state entering a chunk and the gradient of the one leaving it: given U and dV, both
recurrences are plain sums.
"""

import torch
import triton
import triton.language as tl

from . import _switch
from ._launch import launch
from .chunk_forward import (
    Scratch,
    Tables,
    _below,
    _load_rows,
    _load_tile,
    _load_tile_t,
    _locate,
    _norm_backward,
    _store_fragments,
    blocks,
    precision,
    s_shape,
    scratch_type,
    static,
)
from .configs import CHUNK, GLUON, Plan, multiprocessors


if GLUON:
    from . import hopper_grads, hopper_reverse, hopper_tiles

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def reverse_kernel(
    # inputs; a, p, rq and rk as forward left them; p only with STORED
    q, k, do, a, p, rq, rk, dht,
    # outputs; ds, in tiles like s: gradient of the state leaving a chunk
    dv, ds, dh0,
    # packed sequences
    cu_seqlens, chunk_offsets,
    # sizes and strides
    scale, T, NT, H, HV, HV_ALL,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, d_sb, d_st, d_sh, K, V,
    # constants
    BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, L2NORM: tl.constexpr, PACKED: tl.constexpr,
    EVEN: tl.constexpr, FULL_K: tl.constexpr, FULL_V: tl.constexpr, HAS_DHT: tl.constexpr, HAS_DH0: tl.constexpr,
    SAVE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STORED: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Runs one sequence, value head and block of BV value columns from the last chunk to the first.

    DEEP: the tensor cores transpose dO, exactly, for more shared memory (0.104 ms, not 0.117, at 1 x 4096 x 16 x 128).
    Without SAVE only dh0 is written (first pass of a segmented scan).
    """
    i_v = tl.program_id(0)
    i_hv = tl.program_id(1)
    i_n = tl.program_id(2)
    i_h = i_hv // (HV // H)
    T_all = T
    if PACKED:
        i_b = tl.zeros([], tl.int64)
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        T = (tl.load(cu_seqlens + i_n + 1) - bos).to(tl.int32)
        NT = (T + C - 1) // C
        chunk_0 = tl.load(chunk_offsets + i_n).to(tl.int64)
    else:
        i_b = i_n.to(tl.int64)
        bos = tl.zeros([], tl.int64)
        chunk_0 = i_b * NT
    CT: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    o_c = tl.arange(0, C)
    o_k1 = tl.arange(0, BK)
    o_k2 = BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k1 = _below(o_k1, K, FULL_K or NK > 1)
    m_k2 = _below(o_k2, K, FULL_K)
    m_v = _below(o_v, V, FULL_V)

    last = tl.zeros([], tl.int64) + NT - 1
    bos += last * C
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    do += i_b * d_sb + bos * d_st + i_hv * d_sh
    dv += ((i_b * T_all + bos) * HV_ALL + i_hv) * V
    a += ((chunk_0 + last) * HV + i_hv) * C * C
    p += ((chunk_0 + last) * H + i_h) * C * C
    rq += ((chunk_0 + last) * H + i_h) * C
    rk += ((chunk_0 + last) * H + i_h) * C
    NV = (V + BV - 1) // BV
    ds += (((chunk_0 + last) * HV + i_hv) * NV + i_v) * NK * BV * BK
    p_h = (i_n.to(tl.int64) * HV_ALL + i_hv) * K * V

    b_s1 = tl.zeros([BV, BK], tl.float32)
    if NK > 1:
        b_s2 = tl.zeros([BV, BK], tl.float32)
    if HAS_DHT:
        b_s1 += _load_tile_t(dht + p_h, o_k1, V, o_v, m_k1, m_v)
        if NK > 1:
            b_s2 += _load_tile_t(dht + p_h, o_k2, V, o_v, m_k2, m_v)

    if DEEP:
        b_i = (o_c[:, None] == o_c[None, :]).to(CT)
    for i_r in range(NT):
        m_t = _below((NT - 1 - i_r) * C + o_c, T, EVEN)
        b_k1 = _load_tile(k, o_c, k_st, o_k1, m_t, m_k1).to(CT)
        b_q1 = _load_tile(q, o_c, q_st, o_k1, m_t, m_k1).to(CT)
        if NK > 1:
            b_k2 = _load_tile(k, o_c, k_st, o_k2, m_t, m_k2).to(CT)
            b_q2 = _load_tile(q, o_c, q_st, o_k2, m_t, m_k2).to(CT)
        if DEEP:
            b_do = tl.trans(_load_tile(do, o_c, d_st, o_v, m_t, m_v).to(CT))
        else:
            b_do = _load_tile_t(do, o_c, d_st, o_v, m_t, m_v)
        b_a = tl.load(a + o_c[:, None] * C + o_c[None, :])
        if STORED:
            b_p = tl.load(p + o_c[:, None] * C + o_c[None, :])
        else:
            # P = lower(Q K^T)
            b_p = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
            if NK > 1:
                b_p = tl.dot(b_q2, tl.trans(b_k2), b_p, input_precision=PRECISION)
            b_p = tl.where(o_c[:, None] >= o_c[None, :], b_p, 0.0).to(CT)
        # dO' = scale rq dO; a stored P holds the factor, so there dO itself meets P
        b_do = tl.dot(b_do, b_i, input_precision="ieee") if DEEP else b_do.to(tl.float32)
        b_dq = (b_do * (tl.load(rq + o_c) * scale)[None, :]).to(CT) if L2NORM else (b_do * scale).to(CT)
        b_do = b_do.to(CT) if STORED else b_dq
        b_c1 = b_s1.to(CT)
        if SAVE:
            _store_fragments(ds, b_c1, BV, BK)
            if NK > 1:
                _store_fragments(ds + BV * BK, b_s2.to(CT), BV, BK)

        # dU^T = dO^T P + dS^T K^T
        b_u = tl.dot(b_do, b_p, input_precision=PRECISION)
        b_u = tl.dot(b_c1, tl.trans(b_k1), b_u, input_precision=PRECISION)
        if NK > 1:
            b_c2 = b_s2.to(CT)
            b_u = tl.dot(b_c2, tl.trans(b_k2), b_u, input_precision=PRECISION)
        # dV^T = dU^T A
        b_v = tl.dot(b_u.to(CT), b_a, input_precision=PRECISION)
        # dS^T <- dS^T + dO'^T Q - (rk dV)^T K
        b_w = (-b_v * tl.load(rk + o_c)[None, :]).to(CT) if L2NORM else (-b_v).to(CT)
        b_s1 = tl.dot(b_dq, b_q1, b_s1, input_precision=PRECISION)
        b_s1 = tl.dot(b_w, b_k1, b_s1, input_precision=PRECISION)
        if NK > 1:
            b_s2 = tl.dot(b_dq, b_q2, b_s2, input_precision=PRECISION)
            b_s2 = tl.dot(b_w, b_k2, b_s2, input_precision=PRECISION)
        if SAVE:
            p_v = dv + o_c[None, :] * (HV_ALL * V) + o_v[:, None]
            tl.store(p_v, b_v.to(dv.dtype.element_ty), mask=m_t[None, :] & m_v[:, None])

        q -= C * q_st
        k -= C * k_st
        do -= C * d_st
        dv -= C * HV_ALL * V
        a -= C * C * HV
        p -= C * C * H
        rq -= C * H
        rk -= C * H
        ds -= HV * NV * NK * BV * BK

    if HAS_DH0:
        tl.store(dh0 + p_h + o_k1[None, :] * V + o_v[:, None], b_s1, mask=m_v[:, None] & m_k1[None, :])
        if NK > 1:
            tl.store(dh0 + p_h + o_k2[None, :] * V + o_v[:, None], b_s2, mask=m_v[:, None] & m_k2[None, :])


@triton.jit
def grads_kernel(
    # inputs; dv as the reverse scan wrote it, in the scratch type
    q, k, do, a, u, dv, s, ds, rq, rk,
    # outputs
    dq, dk, dbeta,
    # packed sequences
    cu_seqlens, chunks,
    # sizes and strides
    scale, T, NT, H, H_ALL, HV_ALL,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, d_sb, d_st, d_sh, K, V,
    # constants; BV the value columns of a tile, W of a step (FULL_V: that divide V), G the value heads of a key head
    BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    L2NORM: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr, FULL_K: tl.constexpr, FULL_V: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and key head. Even programs compute dq, odd ones dk and dbeta.

    Two small programs rather than one that holds R for both: at d = 128 the latter spilled 0.9 KB a thread. They run
    side by side, so that what both read comes from the L2 cache the second time.
    """
    role = tl.program_id(0) % 2
    i_h = tl.program_id(0) // 2
    i_t = tl.program_id(1)
    HV = H * G
    T_all = T
    i_b, i_c, bos, T = _locate(i_t, chunks, cu_seqlens, T, NT, PACKED)
    if T == 0:
        return
    CT: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    t_0 = i_c * C
    bos += t_0
    chunk = i_t.to(tl.int64)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, NK * BK)
    m_t = _below(t_0 + o_c, T, EVEN)
    m_k = _below(o_k, K, FULL_K)
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    row = i_b * T_all + bos
    do += i_b * d_sb + bos * d_st + i_h * G * d_sh
    NV = (V + BV - 1) // BV
    u += ((chunk * HV + i_h * G) * NV) * BV * C
    s += ((chunk * HV + i_h * G) * NV) * NK * BV * BK
    b_rq = tl.full([C], 1.0, tl.float32)
    if L2NORM:
        b_rq = tl.load(rq + (chunk * H + i_h) * C + o_c)
    b_sq = b_rq * scale
    m_o = m_t[:, None] & m_k[None, :]

    if role == 0:
        b_dq = tl.zeros([C, NK * BK], tl.float32)
        for i_g in range(G):
            b_r = tl.zeros([C, C], tl.float32)
            for i_v in range(0, V, W):
                o_v = i_v + tl.arange(0, W)
                b_do = _load_tile(do + i_g * d_sh, o_c, d_st, o_v, m_t, _below(o_v, V, FULL_V)).to(CT)
                b_u = _load_rows(u + (i_g * NV + i_v // BV) * BV * C, i_v % BV, 1, W, BV, C)
                b_s = _load_rows(s + (i_g * NV + i_v // BV) * NK * BV * BK, i_v % BV, NK, W, BV, BK)
                b_r = tl.dot(b_do, b_u, b_r, input_precision=PRECISION)
                b_dq = tl.dot(b_do, b_s, b_dq, input_precision=PRECISION)
            b_k = _load_tile(k, o_c, k_st, o_k, m_t, m_k).to(CT)
            b_r = tl.where(o_c[:, None] >= o_c[None, :], b_r, 0.0).to(CT)
            b_dq = tl.dot(b_r, b_k, b_dq, input_precision=PRECISION)
        b_q = _load_tile(q, o_c, q_st, o_k, m_t, m_k)
        b_dq = _norm_backward(b_dq * b_sq[:, None], b_q, b_rq, L2NORM)
        tl.store(dq + ((row + o_c) * H_ALL + i_h)[:, None] * K + o_k[None, :], b_dq.to(dq.dtype.element_ty), mask=m_o)
    else:
        dv += (row * HV_ALL + i_h * G) * V
        ds += ((chunk * HV + i_h * G) * NV) * NK * BV * BK
        b_rk = tl.full([C], 1.0, tl.float32)
        if L2NORM:
            b_rk = tl.load(rk + (chunk * H + i_h) * C + o_c)
        b_dk = tl.zeros([C, NK * BK], tl.float32)
        for i_g in range(G):
            # of the four terms only dV S^T carries rk, so what stands in the accumulator is divided by it meanwhile
            b_dk *= (-1.0 / b_rk)[:, None]
            b_e = tl.zeros([C, C], tl.float32)
            for i_v in range(0, V, W):
                o_v = i_v + tl.arange(0, W)
                b_v = _load_tile(dv + i_g * V, o_c, HV_ALL * V, o_v, m_t, _below(o_v, V, FULL_V))
                b_u = _load_rows(u + (i_g * NV + i_v // BV) * BV * C, i_v % BV, 1, W, BV, C)
                b_s = _load_rows(s + (i_g * NV + i_v // BV) * NK * BV * BK, i_v % BV, NK, W, BV, BK)
                b_e = tl.dot(b_v, b_u, b_e, input_precision=PRECISION)
                b_dk = tl.dot(b_v, b_s, b_dk, input_precision=PRECISION)
            b_dk *= (-b_rk)[:, None]
            # by A's diagonal rk beta as it was rounded, not by rk beta^2: U and dV carry that rounding (error 0.0048, not
            # 0.0060); twice, because its square would leave fp32's range where beta is near its bound
            p_a = a + ((chunk * HV + i_h * G + i_g) * C + o_c) * C + o_c
            b_a = tl.load(p_a, mask=m_t, other=1.0).to(tl.float32)
            b_g = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_e, 0.0), 1) / b_a * b_rk / b_a
            b_e = tl.where(o_c[:, None] > o_c[None, :], b_e * -b_rk[:, None], 0.0).to(CT)
            b_k = _load_tile(k, o_c, k_st, o_k, m_t, m_k).to(CT)
            b_dk = tl.dot(b_e, b_k, b_dk, input_precision=PRECISION)
            b_dk = tl.dot(tl.trans(b_e), b_k, b_dk, input_precision=PRECISION)
            # transposed from the start: R^T = U dO^T
            b_r = tl.zeros([C, C], tl.float32)
            for i_v in range(0, V, W):
                o_v = i_v + tl.arange(0, W)
                b_do = _load_tile(do + i_g * d_sh, o_c, d_st, o_v, m_t, _below(o_v, V, FULL_V)).to(CT)
                b_u = _load_rows(u + (i_g * NV + i_v // BV) * BV * C, i_v % BV, 1, W, BV, C)
                b_s = _load_rows(ds + (i_g * NV + i_v // BV) * NK * BV * BK, i_v % BV, NK, W, BV, BK)
                b_u = tl.trans(b_u)
                b_r = tl.dot(b_u, tl.trans(b_do), b_r, input_precision=PRECISION)
                b_dk = tl.dot(b_u, b_s, b_dk, input_precision=PRECISION)
            b_q = _load_tile(q, o_c, q_st, o_k, m_t, m_k).to(CT)
            b_r = tl.where(o_c[:, None] <= o_c[None, :], b_r * b_sq[None, :], 0.0).to(CT)
            b_dk = tl.dot(b_r, b_q, b_dk, input_precision=PRECISION)
            p_b = dbeta + (row + o_c) * HV_ALL + i_h * G + i_g
            tl.store(p_b, b_g.to(dbeta.dtype.element_ty), mask=m_t)
        b_k = _load_tile(k, o_c, k_st, o_k, m_t, m_k)
        b_dk = _norm_backward(b_dk, b_k, b_rk, L2NORM)
        tl.store(dk + ((row + o_c) * H_ALL + i_h)[:, None] * K + o_k[None, :], b_dk.to(dk.dtype.element_ty), mask=m_o)


# --------------------------------------------------------------------------------------------------------- launchers


def reverse(q, k, do, x: Scratch, dht, dv, dh0, scale, t: Tables, plan: Plan, save: bool = True):
    """Reverse scan. Writes dv and dh0 (whose heads may be a slice of more).

    Returns ds [chunks, HV, V, K], and flags or None, by which `grads`, the next launch, runs beside this one.
    """
    a, p, rq, rk = x[:4]
    B, T, H, K = k.shape
    HV, V = do.shape[2:]
    wide = k.dtype != torch.bfloat16
    ds = k.new_empty(*s_shape(k, do, t.n_chunks, plan), dtype=scratch_type(k.dtype)) if save else a
    flags = None
    if t.n == 0:
        return ds, flags
    choice = plan.reverse
    block_v, nv, block_k, nk = blocks(K, V, plan)
    heads = dv.stride(1) // V if save else HV
    if plan.gluon_scans and hopper_tiles.accepts(q, k, do):
        # at a chip's last quarter or less there is no room for the gradients
        if (
            plan.beside
            and save
            and _switch.uses("beside")
            and 4 * nv * HV * t.n <= 3 * multiprocessors(k.device.index)
        ):
            flags = k.new_empty(t.n_chunks, HV, nv, dtype=torch.int32)
        hopper_reverse.reverse(q, k, do, a, rq, rk, dht, dv, ds, dh0, flags, scale, t, heads, save)
    else:
        launch(
            reverse_kernel, (nv, HV, t.n),
            (
                q, k, do, a, a if p is None else p, a if rq is None else rq, a if rk is None else rk, a if dht is None else dht,
                dv, ds, a if dh0 is None else dh0,
                t.cu_seqlens, t.chunk_offsets,
            ),
            (
                scale, T, t.nt, H, HV, heads, *q.stride()[:3], *k.stride()[:3], *do.stride()[:3],
                static(K, wide), static(V, wide),
            ),
            {
                "BK": block_k, "NK": nk, "BV": block_v, "C": CHUNK,
                "L2NORM": rk is not None, "PACKED": t.cu_seqlens is not None, "EVEN": t.even,
                "FULL_K": K % block_k == 0, "FULL_V": V % block_v == 0, "HAS_DHT": dht is not None,
                "HAS_DH0": dh0 is not None, "SAVE": save, "STORED": plan.stored, "DEEP": choice.deep,
                "WIDE": wide, "PRECISION": precision(k.dtype),
            },
            {"num_warps": choice.num_warps, "num_stages": choice.num_stages},
        )  # fmt: skip
    return ds, flags


def grads(q, k, do, x: Scratch, dv, ds, flags, dq, dk, dbeta, scale, t: Tables, plan: Plan):
    """Writes dq, dk and dbeta, whose heads may be a slice of more."""
    a, _, rq, rk, u, s = x
    B, T, H, K = k.shape
    HV, V = do.shape[2:]
    wide = k.dtype != torch.bfloat16
    if t.n_chunks == 0 or T == 0:
        return
    choice = plan.grads
    block_v, _, block_k, nk = blocks(K, V, plan)
    step = min(block_v, choice.block_v)
    if plan.gluon_grads and hopper_tiles.accepts(q, k, do):
        hopper_grads.grads(q, k, do, a, u, dv, s, ds, rq, rk, flags, dq, dk, dbeta, scale, t, plan)
    else:
        launch(
            grads_kernel, (2 * H, t.n_chunks),
            (
                q, k, do, a, u, dv, s, ds, u if rq is None else rq, u if rk is None else rk, dq, dk, dbeta,
                t.cu_seqlens, t.chunks,
            ),
            (
                scale, T, t.nt, H, dk.stride(1) // K, dv.stride(1) // V,
                *q.stride()[:3], *k.stride()[:3], *do.stride()[:3], static(K, wide), static(V, wide),
            ),
            {
                "BK": block_k, "NK": nk, "BV": block_v, "W": step, "C": CHUNK,
                "G": HV // H, "L2NORM": rk is not None, "PACKED": t.cu_seqlens is not None, "EVEN": t.even,
                "FULL_K": K % block_k == 0, "FULL_V": V % step == 0,
                "WIDE": wide, "PRECISION": precision(k.dtype),
            },
            {"num_warps": choice.num_warps, "num_stages": choice.num_stages, "maxnreg": choice.maxnreg},
        )  # fmt: skip
