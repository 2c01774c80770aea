"""The forward scan: the state from chunk to chunk, and the output.

    U = A V - A (rk K S)    O = scale rq (Q S) + P U    S' = S + K^T U

With a gate the state fades: S there is exp(gs) S, row by row, in S' the whole chunk's, and a row of U in S' fades from
its token to the chunk's end. A and P hold theirs.

The scan keeps the state transposed, S^T [V, K], as an accumulator: each product of the chain S -> K S -> U -> S then
takes its left operand from registers and its right one from shared memory, and nothing on the critical path makes a
round trip through shared memory (`kernels/README.md`, "Transposed scan").
"""

import triton
import triton.language as tl

from ._launch import launch
from .layout import Inputs, Scratch, Tables, precision, static
from .plan import GLUON, Launch, Plan
from .pools import find_state
from .tiles import EPS, C, below, decay, load_tile, load_tile_t, locate_sequence, store_fragments


if GLUON:
    from . import hopper_scan


FORGOTTEN = tl.constexpr(-40.0)  # the logarithm, to base 2, of what a state may fade to and still count


@triton.jit
def _first_that_counts(gs, NT, HV):
    """The first chunk of a sequence that its final state depends on, and whether it forgets what went before.

    Where keys have unit norm, no state grows but by its own tokens, and what has faded to 2^-40 of what it was changes
    no sum in fp32. Looks at 64 chunks; of what lasts longer, all count.
    """
    o = tl.arange(0, 64)
    p = gs + (NT - 1 - o).to(tl.int64) * HV * C + C - 1
    b_left = tl.cumsum(tl.load(p, mask=o < NT, other=0.0).to(tl.float32), 0)
    n = tl.sum((b_left >= FORGOTTEN).to(tl.int32), 0)
    return tl.where(n < 64, NT - 1 - n, 0), n < 64


@triton.jit
def _squares(b):
    b = b.to(tl.float32)
    return tl.sum(b * b, 1)


@triton.jit
def scan_kernel(
    # inputs; a, rk and gs as the prepare kernel wrote them; p, and then rq, as the scores kernel did, or None; with
    # slots h0 and ht are one pool
    q, k, v, a, p, rk, gs, h0, slots, goes_on,
    # outputs or None; u and s in tiles (`store_fragments`); phi for segments; rq, where p is None
    o, u, s, rq, ht, phi,
    # packed sequences
    cu_seqlens, chunk_offsets,
    # sizes and strides
    scale, T, NT, H, HV,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, K, V, h_sn, h_sh, h_sk, h_sv,
    # constants
    BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, EVEN: tl.constexpr, FULL_K: tl.constexpr,
    FULL_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Runs one sequence, value head and block of BV value columns from the first chunk to the last.

    With phi, blocks of columns beyond V start from the identity with v = 0; phi is their final state.
    Keys wider than BK = 128 are held as two halves, 1 and 2, so that only one bf16 copy of the state lives at a time.
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
    m_v = below(o_v, V, FULL_V and phi is None)

    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    v += i_b * v_sb + bos * v_st + i_hv * v_sh
    if o is not None:
        o += (row * HV + i_hv) * V
    # scratch: u in tiles [BV, C], s in tiles [BV, BK], the halves of the keys side by side
    NV = (V + BV - 1) // BV
    V_LOAD = V
    V_HT = V
    if phi is not None and i_v >= NV:
        o_v -= NV * BV
        m_v = o_v < K
        V_LOAD = 0
        V_HT = K
        ht = phi
    m_load = below(o_v, V_LOAD, FULL_V and phi is None)
    a += (chunk_0 * HV + i_hv) * C * C
    if u is not None:
        u += ((chunk_0 * HV + i_hv) * NV + i_v) * BV * C
        s += ((chunk_0 * HV + i_hv) * NV + i_v) * NK * BV * BK
    if p is not None:
        p += (chunk_0 * HV + i_hv if gs is not None else chunk_0 * H + i_h) * C * C
    if gs is not None:
        gs += (chunk_0 * HV + i_hv) * C
    if rk is not None:
        rk += (chunk_0 * H + i_h) * C
        rq += (chunk_0 * H + i_h) * C
    m_h0 = m_v
    if slots is None:
        p_h = (i_n.to(tl.int64) * HV + i_hv) * K * V
        h_sk = V
        o_h = o_v
    else:
        i_s, exists, reads = find_state(slots, goes_on, i_n)
        p_h = i_s * h_sn + i_hv.to(tl.int64) * h_sh
        o_h = o_v * h_sv
        m_h0 = m_v & reads

    b_s1 = tl.zeros([BV, BK], tl.float32)
    if NK > 1:
        b_s2 = tl.zeros([BV, BK], tl.float32)
    if phi is not None:
        b_s1 += ((o_v[:, None] == o_k1[None, :]) & (i_v >= NV)).to(tl.float32)
        if NK > 1:
            b_s2 += ((o_v[:, None] == o_k2[None, :]) & (i_v >= NV)).to(tl.float32)
    if h0 is not None:
        b_s1 += load_tile_t(h0 + p_h, o_k1, h_sk, o_h, m_k1, m_h0)
        if NK > 1:
            b_s2 += load_tile_t(h0 + p_h, o_k2, h_sk, o_h, m_k2, m_h0)

    first = 0
    if phi is not None and gs is not None and rk is not None:
        first, forgets = _first_that_counts(gs, NT, HV)
        is_zero = (i_v >= NV) & forgets  # Phi
        first = tl.where(is_zero, NT, first)
        b_s1 = tl.where(is_zero, 0.0, b_s1)
        if NK > 1:
            b_s2 = tl.where(is_zero, 0.0, b_s2)
        before = first.to(tl.int64)
        q += before * C * q_st
        k += before * C * k_st
        v += before * C * v_st
        a += before * C * C * HV
        gs += before * C * HV
        rk += before * C * H
    if gs is not None:
        # a chunk ahead, since the chain waits for them
        n_gs = tl.load(gs + o_c, mask=o_c < (NT - first) * C, other=0.0)
        n_all = tl.load(gs + C - 1, mask=first < NT, other=0.0)
    for i_c in range(first, NT):
        m_t = below(o_c + i_c * C, T, EVEN)
        if gs is not None:
            b_gs = n_gs
            b_before = tl.exp2(b_gs.to(tl.float32))
            b_after = decay(n_all, b_gs)
            b_whole = tl.exp2(n_all.to(tl.float32))
            gs += C * HV
            n_gs = tl.load(gs + o_c, mask=o_c < (NT - 1 - i_c) * C, other=0.0)
            n_all = tl.load(gs + C - 1, mask=i_c + 1 < NT, other=0.0)
        b_k1 = load_tile(k, o_c, k_st, o_k1, m_t, m_k1).to(CT)
        if NK > 1:
            b_k2 = load_tile(k, o_c, k_st, o_k2, m_t, m_k2).to(CT)
        b_v = load_tile_t(v, o_c, v_st, o_v, m_t, m_load).to(CT)
        b_a = tl.load(a + o_c[:, None] * C + o_c[None, :])
        if o is not None:
            b_q1 = load_tile(q, o_c, q_st, o_k1, m_t, m_k1).to(CT)
            if NK > 1:
                b_q2 = load_tile(q, o_c, q_st, o_k2, m_t, m_k2).to(CT)
            if p is not None:
                if rk is not None:
                    b_rq = tl.load(rq + o_c)
            else:
                # P^T = upper(K Q^T), and the norms of q
                b_p = tl.dot(b_k1, tl.trans(b_q1), input_precision=PRECISION)
                if NK > 1:
                    b_p = tl.dot(b_k2, tl.trans(b_q2), b_p, input_precision=PRECISION)
                b_rq = tl.full([C], 1.0, tl.float32)
                if rk is not None:
                    b_rq = _squares(b_q1)
                    if NK > 1:
                        b_rq += _squares(b_q2)
                    b_rq = tl.rsqrt(b_rq + EPS)
                    if u is not None:
                        tl.store(rq + o_c, b_rq)
                if gs is not None:
                    b_p *= decay(b_gs[None, :], b_gs[:, None])
                b_p = tl.where(o_c[:, None] <= o_c[None, :], b_p, 0.0).to(CT)
        b_c1 = b_s1.to(CT)
        if u is not None:
            store_fragments(s, b_c1, BV, BK)
            if NK > 1:
                store_fragments(s + BV * BK, b_s2.to(CT), BV, BK)

        # (-rk K S)^T
        b_x = tl.dot(b_c1, tl.trans(b_k1), input_precision=PRECISION)
        if o is not None:
            b_o = tl.dot(b_c1, tl.trans(b_q1), input_precision=PRECISION)
        if NK > 1:
            b_c2 = b_s2.to(CT)
            b_x = tl.dot(b_c2, tl.trans(b_k2), b_x, input_precision=PRECISION)
            if o is not None:
                b_o = tl.dot(b_c2, tl.trans(b_q2), b_o, input_precision=PRECISION)
        b_x = b_x * -tl.load(rk + o_c)[None, :] if rk is not None else -b_x
        if gs is not None:
            b_x *= b_before[None, :]
        # U^T = V^T A^T + (-rk K S)^T A^T
        b_u = tl.dot(b_v, tl.trans(b_a), input_precision=PRECISION)
        b_u = tl.dot(b_x.to(CT), tl.trans(b_a), b_u, input_precision=PRECISION)
        # S^T <- S^T + U^T K
        b_w = b_u
        if gs is not None:
            b_w *= b_after[None, :]
            b_s1 *= b_whole
            if NK > 1:
                b_s2 *= b_whole
        b_u = b_u.to(CT)
        b_w = b_w.to(CT)
        b_s1 = tl.dot(b_w, b_k1, b_s1, input_precision=PRECISION)
        if NK > 1:
            b_s2 = tl.dot(b_w, b_k2, b_s2, input_precision=PRECISION)
        if u is not None:
            store_fragments(u, b_u, BV, C)

        # O^T = scale rq (S^T Q^T) + U^T P^T; a P of this kernel lacks the factor
        if o is not None:
            if gs is not None:
                b_o *= b_before[None, :]
            if p is not None:
                b_o *= (b_rq * scale)[None, :] if rk is not None else scale
                b_p = tl.load(p + o_c[:, None] * C + o_c[None, :])
                b_o = tl.dot(b_u, tl.trans(b_p), b_o, input_precision=PRECISION)
            else:
                b_o = tl.dot(b_u, b_p, b_o, input_precision=PRECISION) * (b_rq * scale)[None, :]
            if slots is not None:
                b_o = tl.where(exists, b_o, 0.0)
            p_o = o + o_c[None, :] * (HV * V) + o_v[:, None]
            tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_t[None, :] & m_v[:, None])

        q += C * q_st
        k += C * k_st
        v += C * v_st
        if o is not None:
            o += C * HV * V
        a += C * C * HV
        if u is not None:
            u += HV * NV * BV * C
            s += HV * NV * NK * BV * BK
        if p is not None:
            p += C * C * (HV if gs is not None else H)
        if rk is not None:
            rk += C * H
            rq += C * H

    if ht is not None:
        if slots is None:
            p_h = (i_n.to(tl.int64) * HV + i_hv) * K * V_HT
            h_sk = V_HT
        else:
            m_v = m_v & exists
        tl.store(ht + p_h + o_k1[None, :] * h_sk + o_h[:, None], b_s1, mask=m_v[:, None] & m_k1[None, :])
        if NK > 1:
            tl.store(ht + p_h + o_k2[None, :] * h_sk + o_h[:, None], b_s2, mask=m_v[:, None] & m_k2[None, :])


def scan(
    x: Inputs, scratch: Scratch, t: Tables, plan: Plan, scale: float, choice: Launch, *, o=None, ht=None, phi=None
) -> None:
    """Writes o and the final state ht where they are given, u and s where the scratch has them, and, for segments,
    phi [N, HV, K, K]. `choice` is the plan's scan or entry. States in a pool go back into it, `ht` is None.
    """
    call = plan.call
    if t.n == 0:
        return
    if choice.gluon:
        hopper_scan.scan(x, scratch, t, scale, choice, plan.key_tile, o, ht)
        return
    a, p, rq, rk, u, s, gs = scratch
    slots, goes_on = x.pool or (None, None)
    ht = ht if x.pool is None else x.h0
    columns = plan.value_tiles if phi is None else plan.value_tiles - (-call.K // plan.value_tile)
    launch(
        scan_kernel, (columns, call.HV, t.n),
        (x.q, x.k, x.v, a, p, rk, gs, x.h0, slots, goes_on, o, u, s, rq, ht, phi, t.cu_seqlens, t.chunk_offsets),
        (
            scale, x.k.shape[1], t.nt, call.H, call.HV, *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3],
            static(call.K, call.wide), static(call.V, call.wide), *([None] * 4 if x.pool is None else x.h0.stride()),
        ),
        {
            "BK": plan.key_tile, "NK": plan.key_tiles, "BV": plan.value_tile, "EVEN": t.even,
            "FULL_K": call.K % plan.key_tile == 0, "FULL_V": call.V % plan.value_tile == 0,
            "PRECISION": precision(call.dtype),
        },
        {"num_warps": choice.num_warps, "num_stages": choice.num_stages},
    )  # fmt: skip
