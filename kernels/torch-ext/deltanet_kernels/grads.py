"""The chunk-parallel gradients: dq, dk and dbeta.

    R = lower(dO U^T)    dq^ = scale (dO S^T + R K)
    E = -strictly_lower(rk dV U^T)
    rk dk^ = -rk (dV S^T) + U dS^T + (scale rq R)^T Q + (E + E^T) K
    dbeta = rk diag(dV U^T) / diag(A)^2
    d of x^ = x / |x|:  dx = r (dx^ - x^ <x^, dx^>)

They need only the state entering a chunk and the gradient of the one leaving it: given U and dV, both recurrences are
plain sums. Letters as in `reverse.py`; U is saved times rk, as the forward scan used it.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch
from .layout import Inputs, Scratch, Tables, precision, static
from .plan import GLUON, Plan
from .tiles import C, below, load_rows, load_tile, locate_chunk, norm_backward


if GLUON:
    from . import hopper_grads


@triton.jit
def grads_kernel(
    # inputs; dv as the reverse scan wrote it, in the scratch type; rq and rk None without the L2 norm
    q, k, do, a, u, dv, s, ds, rq, rk,
    # outputs
    dq, dk, dbeta,
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

    if role == 0:
        b_dq = tl.zeros([C, NK * BK], tl.float32)
        for i_g in range(G):
            b_r = tl.zeros([C, C], tl.float32)
            for i_v in range(0, V, W):
                o_v = i_v + tl.arange(0, W)
                b_do = load_tile(do + i_g * d_sh, o_c, d_st, o_v, m_t, below(o_v, V, FULL_V)).to(CT)
                b_u = load_rows(u + (i_g * NV + i_v // BV) * BV * C, i_v % BV, 1, W, BV, C)
                b_s = load_rows(s + (i_g * NV + i_v // BV) * NK * BV * BK, i_v % BV, NK, W, BV, BK)
                b_r = tl.dot(b_do, b_u, b_r, input_precision=PRECISION)
                b_dq = tl.dot(b_do, b_s, b_dq, input_precision=PRECISION)
            b_k = load_tile(k, o_c, k_st, o_k, m_t, m_k).to(CT)
            b_r = tl.where(o_c[:, None] >= o_c[None, :], b_r, 0.0).to(CT)
            b_dq = tl.dot(b_r, b_k, b_dq, input_precision=PRECISION)
        b_q = load_tile(q, o_c, q_st, o_k, m_t, m_k)
        b_dq = norm_backward(b_dq * b_sq[:, None], b_q, b_rq, rk is not None)
        tl.store(dq + ((row + o_c) * H + i_h)[:, None] * K + o_k[None, :], b_dq.to(dq.dtype.element_ty), mask=m_o)
    else:
        dv += (row * HV + i_h * G) * V
        ds += ((chunk * HV + i_h * G) * NV) * NK * BV * BK
        b_rk = tl.full([C], 1.0, tl.float32)
        if rk is not None:
            b_rk = tl.load(rk + (chunk * H + i_h) * C + o_c)
        b_dk = tl.zeros([C, NK * BK], tl.float32)
        for i_g in range(G):
            # of the four terms only dV S^T carries rk, so what stands in the accumulator is divided by it meanwhile
            b_dk *= (-1.0 / b_rk)[:, None]
            b_e = tl.zeros([C, C], tl.float32)
            for i_v in range(0, V, W):
                o_v = i_v + tl.arange(0, W)
                b_v = load_tile(dv + i_g * V, o_c, HV * V, o_v, m_t, below(o_v, V, FULL_V))
                b_u = load_rows(u + (i_g * NV + i_v // BV) * BV * C, i_v % BV, 1, W, BV, C)
                b_s = load_rows(s + (i_g * NV + i_v // BV) * NK * BV * BK, i_v % BV, NK, W, BV, BK)
                b_e = tl.dot(b_v, b_u, b_e, input_precision=PRECISION)
                b_dk = tl.dot(b_v, b_s, b_dk, input_precision=PRECISION)
            b_dk *= (-b_rk)[:, None]
            # by A's diagonal rk beta as it was rounded, not by rk beta^2: U and dV carry that rounding (error 0.0048,
            # was 0.0060); twice, because its square would leave fp32's range where beta is near its bound
            p_a = a + ((chunk * HV + i_h * G + i_g) * C + o_c) * C + o_c
            b_a = tl.load(p_a, mask=m_t, other=1.0).to(tl.float32)
            b_g = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_e, 0.0), 1) / b_a * b_rk / b_a
            b_e = tl.where(o_c[:, None] > o_c[None, :], b_e * -b_rk[:, None], 0.0).to(CT)
            b_k = load_tile(k, o_c, k_st, o_k, m_t, m_k).to(CT)
            b_dk = tl.dot(b_e, b_k, b_dk, input_precision=PRECISION)
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
            b_q = load_tile(q, o_c, q_st, o_k, m_t, m_k).to(CT)
            b_r = tl.where(o_c[:, None] <= o_c[None, :], b_r * b_sq[None, :], 0.0).to(CT)
            b_dk = tl.dot(b_r, b_q, b_dk, input_precision=PRECISION)
            p_b = dbeta + (row + o_c) * HV + i_h * G + i_g
            tl.store(p_b, b_g.to(dbeta.dtype.element_ty), mask=m_t)
        b_k = load_tile(k, o_c, k_st, o_k, m_t, m_k)
        b_dk = norm_backward(b_dk, b_k, b_rk, rk is not None)
        tl.store(dk + ((row + o_c) * H + i_h)[:, None] * K + o_k[None, :], b_dk.to(dk.dtype.element_ty), mask=m_o)


def grads(
    x: Inputs, do: torch.Tensor, scratch: Scratch, t: Tables, plan: Plan, scale: float, *, dv, ds, flags, dq, dk, dbeta
) -> None:
    """Writes dq, dk and dbeta."""
    call, choice = plan.call, plan.grads
    if t.n_chunks == 0 or call.T == 0:
        return
    if choice.gluon:
        hopper_grads.grads(x, do, scratch, t, plan, scale, dv, ds, flags, dq, dk, dbeta)
        return
    a, _, rq, rk, u, s = scratch
    launch(
        grads_kernel, (2 * call.H, t.n_chunks),
        (x.q, x.k, do, a, u, dv, s, ds, rq, rk, dq, dk, dbeta, t.cu_seqlens, t.chunks),
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
