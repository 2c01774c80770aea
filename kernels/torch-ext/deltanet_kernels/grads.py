"""The chunk-parallel gradients: dq, dk and dbeta.

    R = lower(dO U^T)    dq^ = scale (dO S^T + R K)
    E = -strictly_lower(rk dV U^T)
    rk dk^ = -rk (dV S^T) + U dS^T + (scale rq R)^T Q + (E + E^T) K
    dbeta = rk diag(dV U^T) / diag(A)^2
    d of x^ = x / |x|:  dx = r (dx^ - x^ <x^, dx^>)

With a gate R and E fade like P, dO S^T and dV S^T like S, U dS^T like U. Its own gradient is what passes token t, on
its way to a later one or to the end: with r_i what comes into token i less what goes out of it,

    dg_t = sum over i >= t in the chunk of r_i + <S', dS'>        <S', dS'> = exp(all g) <S, dS> + sum of k . (U dS^T)
    r = q . (dq^ / scale rq as above) + k . (-rk dV S^T + E K) - k . (U dS^T + (scale rq R)^T Q + E^T K)

(S' leaves the chunk). What goes from one token to another stands in two of the r, as the same bits: both roundings of
R are one, and what has come in and gone out again cancels. `decay_kernel` sums, in a launch more.

Of the gated rule, where the caller has normalised the keys, the reverse scan sums diag(dV U^T) itself, to uv, from dV
before it is rounded: with rounded dV, dbeta's error was more than 1.2 times that of fla's kernels, which round least
there.

They need only the state entering a chunk and the gradient of the one leaving it: given U and dV, both recurrences are
plain sums. Letters as in `reverse.py`; U is saved times rk, as the forward scan used it.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch
from .layout import Inputs, Scratch, Tables, precision, static
from .limits import CHUNK
from .plan import GLUON, Plan
from .tiles import C, below, decay, load_rows, load_tile, locate_chunk, norm_backward


if GLUON:
    from . import hopper_grads

LEAST = tl.constexpr(1e-20)  # of factors by which what stands in an accumulator is divided, and multiplied again


@triton.jit
def grads_kernel(
    # inputs; dv as the reverse scan wrote it, in the scratch type; without the L2 norm rq and rk are None, without a
    # gate gs; uv may be None
    q, k, do, a, u, dv, s, ds, uv, rq, rk, gs,
    # outputs; r [3, chunks, HV, C] with a gate: of q, of k, and what goes from each token to the leaving state
    dq, dk, dbeta, r,
    # packed sequences
    cu_seqlens, chunks,
    # sizes and strides
    scale, T, NT, H,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, d_sb, d_st, d_sh, K, V,
    # constants; BV the value columns of a tile, W of a step (FULL_V: that divide V), G the value heads of a key head
    BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, G: tl.constexpr, EVEN: tl.constexpr,
    FULL_K: tl.constexpr, FULL_V: tl.constexpr, PRECISION: tl.constexpr,
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
    i_b, i_c, bos, T = locate_chunk(i_t, chunks, cu_seqlens, T, NT)
    if T == 0:
        return
    CT: tl.constexpr = a.dtype.element_ty
    t_0 = i_c * C
    bos += t_0
    chunk = i_t.to(tl.int64)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, NK * BK)
    m_t = below(t_0 + o_c, T, EVEN)
    m_k = below(o_k, K, FULL_K)
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    row = i_b * T_all + bos
    do += i_b * d_sb + bos * d_st + i_h * G * d_sh
    NV = (V + BV - 1) // BV
    u += ((chunk * HV + i_h * G) * NV) * BV * C
    s += ((chunk * HV + i_h * G) * NV) * NK * BV * BK
    b_rq = tl.full([C], 1.0, tl.float32)
    if rk is not None:
        b_rq = tl.load(rq + (chunk * H + i_h) * C + o_c)
    b_sq = b_rq * scale
    m_o = m_t[:, None] & m_k[None, :]
    if gs is not None:
        gs += (chunk * HV + i_h * G) * C
        r += ((tl.num_programs(1) * role + chunk) * HV + i_h * G) * C

    if role == 0:
        b_dq = tl.zeros([C, NK * BK], tl.float32)
        b_known = tl.zeros([C], tl.float32)
        for i_g in range(G):
            if gs is not None:
                # what has another factor is divided by it meanwhile
                b_gs = tl.load(gs + i_g * C + o_c)
                b_f = tl.maximum(tl.exp2(b_gs.to(tl.float32)), LEAST) * b_sq
                b_dq *= (1.0 / b_f)[:, None]
            b_r = tl.zeros([C, C], tl.float32)
            for i_v in range(0, V, W):
                o_v = i_v + tl.arange(0, W)
                b_do = load_tile(do + i_g * d_sh, o_c, d_st, o_v, m_t, below(o_v, V, FULL_V)).to(CT)
                b_u = load_rows(u + (i_g * NV + i_v // BV) * BV * C, i_v % BV, 1, W, BV, C)
                b_s = load_rows(s + (i_g * NV + i_v // BV) * NK * BV * BK, i_v % BV, NK, W, BV, BK)
                b_r = tl.dot(b_do, b_u, b_r, input_precision=PRECISION)
                b_dq = tl.dot(b_do, b_s, b_dq, input_precision=PRECISION)
            b_k = load_tile(k, o_c, k_st, o_k, m_t, m_k).to(CT)
            if gs is not None:
                b_dq *= b_f[:, None]
                b_r = b_r * decay(b_gs[:, None], b_gs[None, :]) * b_sq[:, None]  # as below, or the bits would differ
            b_r = tl.where(o_c[:, None] >= o_c[None, :], b_r, 0.0).to(CT)
            b_dq = tl.dot(b_r, b_k, b_dq, input_precision=PRECISION)
            if gs is not None:
                b_q = load_tile(q, o_c, q_st, o_k, m_t, m_k).to(tl.float32)
                b_x = tl.sum(b_q * b_dq, 1)
                tl.store(r + i_g * C + o_c, b_x - b_known)
                b_known = b_x
        b_q = load_tile(q, o_c, q_st, o_k, m_t, m_k)
        if gs is None:
            b_dq *= b_sq[:, None]
        b_dq = norm_backward(b_dq, b_q, b_rq, rk is not None)
        tl.store(dq + ((row + o_c) * H + i_h)[:, None] * K + o_k[None, :], b_dq.to(dq.dtype.element_ty), mask=m_o)
    else:
        dv += (row * HV + i_h * G) * V
        ds += ((chunk * HV + i_h * G) * NV) * NK * BV * BK
        if uv is not None:
            uv += ((chunk * HV + i_h * G) * NV) * (BV // 16 * C)
        b_rk = tl.full([C], 1.0, tl.float32)
        if rk is not None:
            b_rk = tl.load(rk + (chunk * H + i_h) * C + o_c)
        b_dk = tl.zeros([C, NK * BK], tl.float32)
        b_known = tl.zeros([C], tl.float32)
        for i_g in range(G):
            if gs is not None:
                b_gs = tl.load(gs + i_g * C + o_c)
                b_all = tl.load(gs + i_g * C + C - 1)
                b_f = tl.maximum(tl.exp2(b_gs.to(tl.float32)), LEAST) * -b_rk
                b_dk *= (1.0 / b_f)[:, None]
            else:
                # of the four terms only dV S^T carries rk: what stands in the accumulator is divided by it meanwhile
                b_dk *= (-1.0 / b_rk)[:, None]
            b_e = tl.zeros([C, C], tl.float32)
            for i_v in range(0, V, W):
                o_v = i_v + tl.arange(0, W)
                b_v = load_tile(dv + i_g * V, o_c, HV * V, o_v, m_t, below(o_v, V, FULL_V))
                b_u = load_rows(u + (i_g * NV + i_v // BV) * BV * C, i_v % BV, 1, W, BV, C)
                b_s = load_rows(s + (i_g * NV + i_v // BV) * NK * BV * BK, i_v % BV, NK, W, BV, BK)
                b_e = tl.dot(b_v, b_u, b_e, input_precision=PRECISION)
                b_dk = tl.dot(b_v, b_s, b_dk, input_precision=PRECISION)
            if gs is not None:
                b_dk *= b_f[:, None]
            else:
                b_dk *= (-b_rk)[:, None]
            # by A's diagonal rk beta as it was rounded, not by rk beta^2: U and dV carry that rounding (error 0.0048,
            # was 0.0060); twice, because its square would leave fp32's range where beta is near its bound
            p_a = a + ((chunk * HV + i_h * G + i_g) * C + o_c) * C + o_c
            b_a = tl.load(p_a, mask=m_t, other=1.0).to(tl.float32)
            if uv is not None:
                b_g = tl.zeros([C], tl.float32)
                for i in range(NV * (BV // 16)):
                    b_g += tl.load(uv + (i_g * NV * (BV // 16) + i) * C + o_c)
                p_b = dbeta + (row + o_c) * HV + i_h * G + i_g  # at once, for fewer registers
                tl.store(p_b, (b_g / b_a / b_a).to(dbeta.dtype.element_ty), mask=m_t)
            else:
                b_g = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_e, 0.0), 1) / b_a * b_rk / b_a
            if gs is not None:
                b_e *= decay(b_gs[:, None], b_gs[None, :])
            b_e = tl.where(o_c[:, None] > o_c[None, :], b_e * -b_rk[:, None], 0.0).to(CT)
            b_k = load_tile(k, o_c, k_st, o_k, m_t, m_k).to(CT)
            b_dk = tl.dot(b_e, b_k, b_dk, input_precision=PRECISION)
            if gs is not None:
                b_in = tl.sum(b_k.to(tl.float32) * b_dk, 1)
                b_through = tl.zeros([NK * BK], tl.float32)
                b_f = tl.maximum(decay(b_all, b_gs), LEAST)
                b_dk *= (1.0 / b_f)[:, None]
            else:
                b_dk = tl.dot(tl.trans(b_e), b_k, b_dk, input_precision=PRECISION)
            # transposed from the start: R^T = U dO^T
            b_r = tl.zeros([C, C], tl.float32)
            for i_v in range(0, V, W):
                o_v = i_v + tl.arange(0, W)
                b_do = load_tile(do + i_g * d_sh, o_c, d_st, o_v, m_t, below(o_v, V, FULL_V)).to(CT)
                b_u = load_rows(u + (i_g * NV + i_v // BV) * BV * C, i_v % BV, 1, W, BV, C)
                b_s = load_rows(ds + (i_g * NV + i_v // BV) * NK * BV * BK, i_v % BV, NK, W, BV, BK)
                b_u = tl.trans(b_u)
                b_r = tl.dot(b_u, tl.trans(b_do), b_r, input_precision=PRECISION)
                b_dk = tl.dot(b_u, b_s, b_dk, input_precision=PRECISION)
                if gs is not None:
                    b_old = load_rows(s + (i_g * NV + i_v // BV) * NK * BV * BK, i_v % BV, NK, W, BV, BK)
                    b_through += tl.sum(b_old.to(tl.float32) * b_s.to(tl.float32), 0)
            if gs is not None:
                b_dk *= b_f[:, None]
                b_k = load_tile(k, o_c, k_st, o_k, m_t, m_k).to(CT)
                # summed by `decay_kernel`: here Triton 3.7 fails on the sum of a sum, for sm_100
                b_leaving = tl.sum(b_k.to(tl.float32) * b_dk, 1) - b_in
                b_through = tl.sum(b_through, 0) * tl.exp2(b_all.to(tl.float32))
                b_leaving += tl.where(o_c == C - 1, b_through, 0.0)
                tl.store(r + tl.num_programs(1).to(tl.int64) * HV * C + i_g * C + o_c, b_leaving)
                b_dk = tl.dot(tl.trans(b_e), b_k, b_dk, input_precision=PRECISION)
                b_r *= decay(b_gs[None, :], b_gs[:, None])
            b_q = load_tile(q, o_c, q_st, o_k, m_t, m_k).to(CT)
            b_r = tl.where(o_c[:, None] <= o_c[None, :], b_r * b_sq[None, :], 0.0).to(CT)
            b_dk = tl.dot(b_r, b_q, b_dk, input_precision=PRECISION)
            if gs is not None:
                b_k = load_tile(k, o_c, k_st, o_k, m_t, m_k).to(tl.float32)
                b_x = tl.sum(b_k * b_dk, 1)
                tl.store(r + i_g * C + o_c, 2.0 * b_in - b_known - b_x)
                b_known = b_x
            if uv is None:
                p_b = dbeta + (row + o_c) * HV + i_h * G + i_g
                tl.store(p_b, b_g.to(dbeta.dtype.element_ty), mask=m_t)
        b_k = load_tile(k, o_c, k_st, o_k, m_t, m_k)
        b_dk = norm_backward(b_dk, b_k, b_rk, rk is not None)
        tl.store(dk + ((row + o_c) * H + i_h)[:, None] * K + o_k[None, :], b_dk.to(dk.dtype.element_ty), mask=m_o)


@triton.jit
def decay_kernel(
    # input, output
    r, dg,
    # packed sequences
    cu_seqlens, chunks,
    T, NT, N_CHUNKS,
    HV: tl.constexpr,
):  # fmt: skip
    """dg of one chunk and value head: sums of r from each token to the chunk's end, and what leaves it."""
    i_hv = tl.program_id(0)
    i_t = tl.program_id(1)
    T_all = T
    i_b, i_c, bos, T = locate_chunk(i_t, chunks, cu_seqlens, T, NT)
    if T == 0:
        return
    o_c = tl.arange(0, C)
    p = (i_t.to(tl.int64) * HV + i_hv) * C + o_c
    part = (i_t * 0 + N_CHUNKS).to(tl.int64) * HV * C
    b_r = tl.cumsum(tl.load(r + p) + tl.load(r + part + p), 0, reverse=True) + tl.sum(tl.load(r + 2 * part + p), 0)
    p_g = dg + (i_b * T_all + bos + i_c * C + o_c) * HV + i_hv
    tl.store(p_g, b_r.to(dg.dtype.element_ty), mask=i_c * C + o_c < T)


def grads(
    x: Inputs,
    do: torch.Tensor,
    scratch: Scratch,
    t: Tables,
    plan: Plan,
    scale: float,
    *,
    dv,
    ds,
    uv=None,
    flags,
    dq,
    dk,
    dbeta,
    dg,
) -> None:
    """Writes dq, dk, dbeta and, with a gate, dg."""
    call, choice = plan.call, plan.grads
    if t.n_chunks == 0 or call.T == 0:
        return
    if choice.gluon:
        hopper_grads.grads(x, do, scratch, t, plan, scale, dv, ds, uv, flags, dq, dk, dbeta, dg)
        return
    a, _, rq, rk, u, s, gs = scratch
    r = None if gs is None else gs.new_empty(3, t.n_chunks, call.HV, CHUNK, dtype=torch.float32)
    launch(
        grads_kernel, (2 * call.H, t.n_chunks),
        (x.q, x.k, do, a, u, dv, s, ds, uv, rq, rk, gs, dq, dk, dbeta, r, t.cu_seqlens, t.chunks),
        (
            scale, x.k.shape[1], t.nt, call.H, *x.q.stride()[:3], *x.k.stride()[:3], *do.stride()[:3],
            static(call.K, call.wide), static(call.V, call.wide),
        ),
        {
            "BK": plan.key_tile, "NK": plan.key_tiles, "BV": plan.value_tile, "W": choice.columns,
            "G": call.HV // call.H, "EVEN": t.even, "FULL_K": call.K % plan.key_tile == 0,
            "FULL_V": call.V % choice.columns == 0, "PRECISION": precision(call.dtype),
        },
        {"num_warps": choice.num_warps, "num_stages": choice.num_stages, "maxnreg": choice.maxnreg},
    )  # fmt: skip
    if r is not None:
        launch(
            decay_kernel, (call.HV, t.n_chunks),
            (r, dg, t.cu_seqlens, t.chunks),
            (x.k.shape[1], t.nt, t.n_chunks),
            {"HV": call.HV},
            {"num_warps": 1},
        )  # fmt: skip
