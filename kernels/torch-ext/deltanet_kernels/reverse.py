"""The reverse scan: gradients of the state from chunk to chunk, and dV.

    dU = P^T dO + K dS    dV = A^T dU    dS <- dS + Q^T (scale rq dO) - K^T (rk dV)

With a gate the factors of `scan.py` stand where they stand there: K fades to the chunk's end, dO' and rk dV from its
start, dS over all of it.

Letters as in `scan.py`; a d before a name is a gradient. The state's gradient is kept transposed, as the state is
there.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch
from .layout import Inputs, Scratch, Tables, precision, static
from .plan import GLUON, Launch, Plan
from .tiles import C, below, decay, load_rows, load_tile, load_tile_t, locate_sequence, store_fragments


if GLUON:
    from . import hopper_reverse


@triton.jit
def reverse_kernel(
    # inputs; a, p, rq, rk, gs and u as forward left them, u for uv alone
    q, k, do, a, p, rq, rk, gs, u, dht,
    # outputs or None; ds, in tiles like s: gradient of the state leaving a chunk; uv: parts of diag(dV U^T)
    dv, ds, uv, dh0,
    # packed sequences
    cu_seqlens, chunk_offsets,
    # sizes and strides
    scale, T, NT, H, HV,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, d_sb, d_st, d_sh, K, V,
    # constants
    BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, EVEN: tl.constexpr, FULL_K: tl.constexpr,
    FULL_V: tl.constexpr, PRECISION: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Runs one sequence, value head and block of BV value columns from the last chunk to the first.

    DEEP: the tensor cores transpose dO, exactly, for more shared memory (0.104 ms, was 0.117, at 1 x 4096 x 16 x 128).
    Without dv only dh0 is written (first pass of a segmented scan).
    """
    i_v = tl.program_id(0)
    i_hv = tl.program_id(1)
    i_n = tl.program_id(2)
    i_h = i_hv // (HV // H)
    i_b, bos, row, T, NT, chunk_0 = locate_sequence(i_n, chunk_offsets, cu_seqlens, T, NT)
    CT: tl.constexpr = a.dtype.element_ty
    o_c = tl.arange(0, C)
    o_k1 = tl.arange(0, BK)
    o_k2 = BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k1 = below(o_k1, K, FULL_K or NK > 1)
    m_k2 = below(o_k2, K, FULL_K)
    m_v = below(o_v, V, FULL_V)

    last = tl.zeros([], tl.int64) + NT - 1
    bos += last * C
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    do += i_b * d_sb + bos * d_st + i_hv * d_sh
    a += ((chunk_0 + last) * HV + i_hv) * C * C
    if p is not None:
        p += ((chunk_0 + last) * HV + i_hv if gs is not None else (chunk_0 + last) * H + i_h) * C * C
    if gs is not None:
        gs += ((chunk_0 + last) * HV + i_hv) * C
    if rk is not None:
        rq += ((chunk_0 + last) * H + i_h) * C
        rk += ((chunk_0 + last) * H + i_h) * C
    NV = (V + BV - 1) // BV
    if dv is not None:
        dv += ((row + last * C) * HV + i_hv) * V
        ds += (((chunk_0 + last) * HV + i_hv) * NV + i_v) * NK * BV * BK
    if uv is not None:
        u += (((chunk_0 + last) * HV + i_hv) * NV + i_v) * BV * C
        uv += (((chunk_0 + last) * HV + i_hv) * NV + i_v) * (BV // 16 * C)
    p_h = (i_n.to(tl.int64) * HV + i_hv) * K * V

    b_s1 = tl.zeros([BV, BK], tl.float32)
    if NK > 1:
        b_s2 = tl.zeros([BV, BK], tl.float32)
    if dht is not None:
        b_s1 += load_tile_t(dht + p_h, o_k1, V, o_v, m_k1, m_v)
        if NK > 1:
            b_s2 += load_tile_t(dht + p_h, o_k2, V, o_v, m_k2, m_v)

    if gs is not None:
        # a chunk ahead, since the chain waits for them
        n_gs = tl.load(gs + o_c, mask=o_c < NT * C, other=0.0)
        n_all = tl.load(gs + C - 1, mask=NT > 0, other=0.0)
    if DEEP:
        b_i = (o_c[:, None] == o_c[None, :]).to(CT)
    for i_r in range(NT):
        m_t = below(o_c + (NT - 1 - i_r) * C, T, EVEN)
        if gs is not None:
            b_gs = n_gs
            b_before = tl.exp2(b_gs.to(tl.float32))
            b_after = decay(n_all, b_gs)
            b_whole = tl.exp2(n_all.to(tl.float32))
            gs -= C * HV
            n_gs = tl.load(gs + o_c, mask=o_c < (NT - 1 - i_r) * C, other=0.0)
            n_all = tl.load(gs + C - 1, mask=i_r + 1 < NT, other=0.0)
        b_k1 = load_tile(k, o_c, k_st, o_k1, m_t, m_k1).to(CT)
        b_q1 = load_tile(q, o_c, q_st, o_k1, m_t, m_k1).to(CT)
        if NK > 1:
            b_k2 = load_tile(k, o_c, k_st, o_k2, m_t, m_k2).to(CT)
            b_q2 = load_tile(q, o_c, q_st, o_k2, m_t, m_k2).to(CT)
        if DEEP:
            b_do = tl.trans(load_tile(do, o_c, d_st, o_v, m_t, m_v).to(CT))
        else:
            b_do = load_tile_t(do, o_c, d_st, o_v, m_t, m_v)
        b_a = tl.load(a + o_c[:, None] * C + o_c[None, :])
        if p is not None:
            b_p = tl.load(p + o_c[:, None] * C + o_c[None, :])
        else:
            # P = lower(Q K^T)
            b_p = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
            if NK > 1:
                b_p = tl.dot(b_q2, tl.trans(b_k2), b_p, input_precision=PRECISION)
            if gs is not None:
                b_p *= decay(b_gs[:, None], b_gs[None, :])
                if rk is None:
                    b_p *= scale
            b_p = tl.where(o_c[:, None] >= o_c[None, :], b_p, 0.0).to(CT)
        # dO' = scale rq dO; where P holds the factor, as a stored one does, dO itself meets it, not rounded again
        b_do = tl.dot(b_do, b_i, input_precision="ieee") if DEEP else b_do.to(tl.float32)
        b_dq = b_do * (tl.load(rq + o_c) * scale)[None, :] if rk is not None else b_do * scale
        b_do = b_do.to(CT) if p is not None or (gs is not None and rk is None) else b_dq.to(CT)
        if gs is not None:
            b_dq *= b_before[None, :]
        b_dq = b_dq.to(CT)
        b_c1 = b_s1.to(CT)
        if dv is not None:
            store_fragments(ds, b_c1, BV, BK)
            if NK > 1:
                store_fragments(ds + BV * BK, b_s2.to(CT), BV, BK)

        # dU^T = dO^T P + dS^T K^T
        if gs is None:
            b_u = tl.dot(b_do, b_p, input_precision=PRECISION)
            b_u = tl.dot(b_c1, tl.trans(b_k1), b_u, input_precision=PRECISION)
        else:
            b_u = tl.dot(b_c1, tl.trans(b_k1), input_precision=PRECISION)
        if NK > 1:
            b_c2 = b_s2.to(CT)
            b_u = tl.dot(b_c2, tl.trans(b_k2), b_u, input_precision=PRECISION)
        if gs is not None:
            b_u *= b_after[None, :]
            b_u = tl.dot(b_do, b_p, b_u, input_precision=PRECISION)
        # dV^T = dU^T A
        b_v = tl.dot(b_u.to(CT), b_a, input_precision=PRECISION)
        if uv is not None:
            b_x = b_v * load_rows(u, 0, 1, BV, BV, C).to(tl.float32)
            b_x = tl.sum(tl.reshape(b_x, [BV // 16, 16, C]), 1)
            tl.store(uv + tl.arange(0, BV // 16)[:, None] * C + o_c[None, :], b_x)
        # dS^T <- dS^T + dO'^T Q - (rk dV)^T K
        b_w = -b_v * tl.load(rk + o_c)[None, :] if rk is not None else -b_v
        if gs is not None:
            b_w *= b_before[None, :]
            b_s1 *= b_whole
            if NK > 1:
                b_s2 *= b_whole
        b_w = b_w.to(CT)
        b_s1 = tl.dot(b_dq, b_q1, b_s1, input_precision=PRECISION)
        b_s1 = tl.dot(b_w, b_k1, b_s1, input_precision=PRECISION)
        if NK > 1:
            b_s2 = tl.dot(b_dq, b_q2, b_s2, input_precision=PRECISION)
            b_s2 = tl.dot(b_w, b_k2, b_s2, input_precision=PRECISION)
        if dv is not None:
            p_v = dv + o_c[None, :] * (HV * V) + o_v[:, None]
            tl.store(p_v, b_v.to(dv.dtype.element_ty), mask=m_t[None, :] & m_v[:, None])

        q -= C * q_st
        k -= C * k_st
        do -= C * d_st
        a -= C * C * HV
        if p is not None:
            p -= C * C * (HV if gs is not None else H)
        if rk is not None:
            rq -= C * H
            rk -= C * H
        if dv is not None:
            dv -= C * HV * V
            ds -= HV * NV * NK * BV * BK
        if uv is not None:
            u -= HV * NV * BV * C
            uv -= HV * NV * (BV // 16) * C

    if dh0 is not None:
        tl.store(dh0 + p_h + o_k1[None, :] * V + o_v[:, None], b_s1, mask=m_v[:, None] & m_k1[None, :])
        if NK > 1:
            tl.store(dh0 + p_h + o_k2[None, :] * V + o_v[:, None], b_s2, mask=m_v[:, None] & m_k2[None, :])


def reverse(
    x: Inputs,
    do: torch.Tensor,
    scratch: Scratch,
    t: Tables,
    plan: Plan,
    scale: float,
    choice: Launch,
    *,
    dht,
    dv,
    ds,
    dh0,
    uv=None,
    flags=None,
) -> None:
    """Writes dv and ds, or neither, and uv and dh0, where they are given. `choice` is the plan's reverse or exit; with
    `flags` the gradients, the next launch, run beside this one.
    """  # fmt: skip
    call = plan.call
    if t.n == 0:
        return
    if choice.gluon:
        hopper_reverse.reverse(x, do, scratch, t, scale, choice, plan.key_tile, dht, dv, ds, uv, dh0, flags)
        return
    a, p, rq, rk, u, _, gs = scratch
    launch(
        reverse_kernel, (plan.value_tiles, call.HV, t.n),
        (
            x.q, x.k, do, a, p, rq, rk, gs, None if uv is None else u, dht, dv, ds, uv, dh0,
            t.cu_seqlens, t.chunk_offsets,
        ),
        (
            scale, x.k.shape[1], t.nt, call.H, call.HV, *x.q.stride()[:3], *x.k.stride()[:3], *do.stride()[:3],
            static(call.K, call.wide), static(call.V, call.wide),
        ),
        {
            "BK": plan.key_tile, "NK": plan.key_tiles, "BV": plan.value_tile, "EVEN": t.even,
            "FULL_K": call.K % plan.key_tile == 0, "FULL_V": call.V % plan.value_tile == 0,
            "PRECISION": precision(call.dtype), "DEEP": plan.deep,
        },
        {"num_warps": choice.num_warps, "num_stages": choice.num_stages},
    )  # fmt: skip
