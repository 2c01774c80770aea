"""The delta rule token by token: the 2021 algorithm on a GPU.

    e_t = v_t - S_{t-1}^T k_t        u_t = beta_t e_t        S_t = S_{t-1} + k_t u_t^T        o_t = scale S_t^T q_t

Backward, with G the gradient of the state (G_T = dht) and every e_t kept by forward:

    G <- G + scale q_t do_t^T        du_t = G^T k_t        dv_t = beta_t du_t        dbeta_t = e_t . du_t
    dk_t = G u_t - S_{t-1} dv_t      dq_t = scale S_t do_t      G <- G - k_t dv_t^T        dh0 = G after the first token

so nothing is divided by beta and no factor I - beta k k^T is inverted. Two launches and a last one:

    dv     columns of G, last token to first: dv, dbeta, dh0 (a column needs all of k, hence the split over V)
    dqk    given dv, the ROWS of S and of G evolve on their own, so a program owns some rows: S from the first token
           (dq, second term of dk) or, beside it in the same launch, G from the last (first term of dk). A split
           over V would leave one partial dq and dk per value block, gigabytes of them at long T; this leaves none.
    rows   adds the two terms and the value heads of a group, takes the gradient through the q/k norm

Legend: B batch, T time, H key heads, HV value heads (HV = H * G: value head j reads key head j // G), K and V head
sizes, N sequences (N = B, or len(cu_seqlens) - 1 packed into B = 1). In kernels: i_ index, o_ offset, p_ pointer,
m_ mask, s_ stride, b_ block value in registers, n_ a value of the next token; d for a gradient; h0 and ht the first
and the last state; rq and rk the reciprocal norms of q and k; bos the first token of a sequence.
Everything is accumulated in fp32; offsets into tensors are int64.
"""

import torch
import triton
import triton.language as tl

from . import _switch
from ._checks import as_state, check_arguments, check_device, check_layout, check_values, refuse_transforms
from ._launch import launch
from .limits import NORM_EPS


__all__ = ["fused_recurrent_delta_rule"]

# Launch choices. One warp everywhere in the token loops: with more, each token would wait at a barrier for the sums
# that cross warps. 8 columns (or rows) of a 128-wide state are 32 registers a thread, of a 256-wide one 64; wider
# blocks would leave too few programs at batch 1 (16 heads x 128 / 8 = 256 for 132 multiprocessors).
LOOP_BLOCK, LOOP_WARPS = 8, 1


# --------------------------------------------------------------------------------------------- kernels: token loops


@triton.jit
def _sequence(cu_seqlens, i_n, T):
    """(batch row, first token, number of tokens) of sequence i_n, packed or one per batch row."""
    if cu_seqlens is not None:
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        i_b = i_n * 0
        n_tokens = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - bos).to(tl.int32)
    else:
        bos = i_n * 0
        i_b = i_n
        n_tokens = T
    return i_b, bos, n_tokens


@triton.jit(do_not_specialize=["T"])
def _fwd_kernel(
    # inputs; h0 and cu_seqlens may be None
    q, k, v, beta, h0, cu_seqlens,
    # outputs; e (with rq, rk) is None when nothing will be differentiated, ht when it is not wanted
    o, e, rq, rk, ht,
    # sizes and strides
    scale, T, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_bb, s_bt, s_bh,
    # constants
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_hv = pid % NV, (pid // NV) % HV
    i_h = i_hv // (HV // H)
    i_n = (pid // NV // HV).to(tl.int64)
    i_b, bos, n_tokens = _sequence(cu_seqlens, i_n, T)

    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_h = m_k[:, None] & m_v[None, :]
    o_h = (i_n * HV + i_hv) * K * V + o_k[:, None] * V + o_v[None, :]
    p_q = q + i_b * s_qb + bos * s_qt + i_h * s_qh + o_k
    p_k = k + i_b * s_kb + bos * s_kt + i_h * s_kh + o_k
    p_v = v + i_b * s_vb + bos * s_vt + i_hv * s_vh + o_v
    p_beta = beta + i_b * s_bb + bos * s_bt + i_hv * s_bh
    i_row = i_b * T + bos
    p_o = o + (i_row * HV + i_hv) * V + o_v
    if e is not None:
        p_e = e + (i_row * HV + i_hv) * V + o_v
        if NORM:
            p_rq = rq + i_row * H + i_h
            p_rk = rk + i_row * H + i_h
            writes_norms = (i_v == 0) & (i_hv % (HV // H) == 0)

    b_h = tl.zeros([BK, BV], dtype=tl.float32)
    if h0 is not None:
        b_h += tl.load(h0 + o_h, mask=m_h, other=0.0).to(tl.float32)

    # The loads of a token are issued while the one before it is computed.
    n_q = tl.load(p_q, mask=m_k & (n_tokens > 0), other=0.0)
    n_k = tl.load(p_k, mask=m_k & (n_tokens > 0), other=0.0)
    n_v = tl.load(p_v, mask=m_v & (n_tokens > 0), other=0.0)
    n_beta = tl.load(p_beta, mask=n_tokens > 0, other=0.0)
    for t in range(n_tokens):
        b_q, b_k, b_v = n_q.to(tl.float32), n_k.to(tl.float32), n_v.to(tl.float32)
        b_beta = n_beta.to(tl.float32)
        p_q += s_qt
        p_k += s_kt
        p_v += s_vt
        p_beta += s_bt
        n_q = tl.load(p_q, mask=m_k & (t + 1 < n_tokens), other=0.0)
        n_k = tl.load(p_k, mask=m_k & (t + 1 < n_tokens), other=0.0)
        n_v = tl.load(p_v, mask=m_v & (t + 1 < n_tokens), other=0.0)
        n_beta = tl.load(p_beta, mask=t + 1 < n_tokens, other=0.0)

        # S_t^T q = S_{t-1}^T q + (k.q) u: four sums that do not wait for one another, then the update.
        b_hk = tl.sum(b_h * b_k[:, None], 0)
        b_hq = tl.sum(b_h * b_q[:, None], 0)
        b_kq = tl.sum(b_k * b_q, 0)
        b_qscale = scale
        if NORM:
            b_rk = tl.rsqrt(tl.sum(b_k * b_k, 0) + EPS)
            b_rq = tl.rsqrt(tl.sum(b_q * b_q, 0) + EPS)
            b_hk *= b_rk
            b_qscale *= b_rq
        b_e = b_v - b_hk
        b_u = b_beta * b_e
        if NORM:
            b_u *= b_rk
        b_h += b_k[:, None] * b_u[None, :]
        b_o = b_qscale * (b_hq + b_kq * b_u)

        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_v)
        p_o += HV * V
        if e is not None:
            tl.store(p_e, b_e, mask=m_v)
            p_e += HV * V
            if NORM:
                tl.store(p_rq, b_rq, mask=writes_norms)
                tl.store(p_rk, b_rk, mask=writes_norms)
                p_rq += H
                p_rk += H

    if ht is not None:
        tl.store(ht + o_h, b_h, mask=m_h)


@triton.jit(do_not_specialize=["T"])
def _bwd_dv_kernel(
    # inputs; rq and rk None without norms, dht may be None
    q, k, beta, e, do, rq, rk, dht, cu_seqlens,
    # outputs; dbeta [NV, B, T, HV] one part per value block; dh0 may be None
    dv, dbeta, dh0,
    # sizes and strides
    scale, B, T, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_bb, s_bt, s_bh, s_dob, s_dot, s_doh,
    # constants
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_hv = pid % NV, (pid // NV) % HV
    i_h = i_hv // (HV // H)
    i_n = (pid // NV // HV).to(tl.int64)
    i_b, bos, n_tokens = _sequence(cu_seqlens, i_n, T)
    last = bos + n_tokens - 1

    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_h = m_k[:, None] & m_v[None, :]
    o_h = (i_n * HV + i_hv) * K * V + o_k[:, None] * V + o_v[None, :]
    p_q = q + i_b * s_qb + last * s_qt + i_h * s_qh + o_k
    p_k = k + i_b * s_kb + last * s_kt + i_h * s_kh + o_k
    p_do = do + i_b * s_dob + last * s_dot + i_hv * s_doh + o_v
    p_beta = beta + i_b * s_bb + last * s_bt + i_hv * s_bh
    i_row = i_b * T + last
    p_e = e + (i_row * HV + i_hv) * V + o_v
    p_dv = dv + (i_row * HV + i_hv) * V + o_v
    p_dbeta = dbeta + i_v.to(tl.int64) * B * T * HV + i_row * HV + i_hv
    if NORM:
        p_rq = rq + i_row * H + i_h
        p_rk = rk + i_row * H + i_h

    b_dh = tl.zeros([BK, BV], dtype=tl.float32)
    if dht is not None:
        b_dh += tl.load(dht + o_h, mask=m_h, other=0.0)

    n_q = tl.load(p_q, mask=m_k & (n_tokens > 0), other=0.0)
    n_k = tl.load(p_k, mask=m_k & (n_tokens > 0), other=0.0)
    n_do = tl.load(p_do, mask=m_v & (n_tokens > 0), other=0.0)
    n_e = tl.load(p_e, mask=m_v & (n_tokens > 0), other=0.0)
    n_beta = tl.load(p_beta, mask=n_tokens > 0, other=0.0)
    if NORM:
        n_rq = tl.load(p_rq, mask=n_tokens > 0, other=0.0)
        n_rk = tl.load(p_rk, mask=n_tokens > 0, other=0.0)
    for t in range(n_tokens):
        b_q, b_k = n_q.to(tl.float32), n_k.to(tl.float32)
        b_do, b_e, b_beta = n_do.to(tl.float32), n_e, n_beta.to(tl.float32)
        b_qscale = scale
        if NORM:
            b_rk = n_rk
            b_qscale *= n_rq
        p_q -= s_qt
        p_k -= s_kt
        p_do -= s_dot
        p_e -= HV * V
        p_beta -= s_bt
        n_q = tl.load(p_q, mask=m_k & (t + 1 < n_tokens), other=0.0)
        n_k = tl.load(p_k, mask=m_k & (t + 1 < n_tokens), other=0.0)
        n_do = tl.load(p_do, mask=m_v & (t + 1 < n_tokens), other=0.0)
        n_e = tl.load(p_e, mask=m_v & (t + 1 < n_tokens), other=0.0)
        n_beta = tl.load(p_beta, mask=t + 1 < n_tokens, other=0.0)
        if NORM:
            p_rq -= H
            p_rk -= H
            n_rq = tl.load(p_rq, mask=t + 1 < n_tokens, other=0.0)
            n_rk = tl.load(p_rk, mask=t + 1 < n_tokens, other=0.0)

        # du = (G + scale q do^T)^T k, the second term through k.q so that no sum waits for the update.
        b_do *= b_qscale
        b_du = tl.sum(b_dh * b_k[:, None], 0) + tl.sum(b_k * b_q, 0) * b_do
        if NORM:
            b_du *= b_rk
        b_dv = b_beta * b_du
        b_dbeta = tl.sum(b_e * b_du, 0)
        tl.store(p_dv, b_dv, mask=m_v)
        tl.store(p_dbeta, b_dbeta)
        p_dv -= HV * V
        p_dbeta -= HV
        if NORM:
            b_dv *= b_rk
        b_dh += b_q[:, None] * b_do[None, :] - b_k[:, None] * b_dv[None, :]

    if dh0 is not None:
        tl.store(dh0 + o_h, b_dh, mask=m_h)


@triton.jit(do_not_specialize=["T"])
def _bwd_dqk_kernel(
    # inputs; rq and rk None without norms, h0 and dht may be None
    q, k, beta, e, do, dv, rq, rk, h0, dht, cu_seqlens,
    # outputs, fp32 [B, T, HV, K]: gradients of the normalised q and k, the latter in two terms
    dq, dk_s, dk_g,
    # sizes and strides
    scale, T, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_bb, s_bt, s_bh, s_dob, s_dot, s_doh,
    # constants; BR rows of the state a program
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    NR: tl.constexpr = (K + BR - 1) // BR
    pid = tl.program_id(0)
    i_r, i_hv = pid % NR, (pid // NR) % HV
    i_h = i_hv // (HV // H)
    i_n = (pid // NR // HV).to(tl.int64)
    i_b, bos, n_tokens = _sequence(cu_seqlens, i_n, T)

    o_k, o_v = i_r * BR + tl.arange(0, BR), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_h = m_k[:, None] & m_v[None, :]
    o_h = (i_n * HV + i_hv) * K * V + o_k[:, None] * V + o_v[None, :]
    i_row = (i_b * T + bos) * HV + i_hv
    p_q = q + i_b * s_qb + bos * s_qt + i_h * s_qh + o_k
    p_k = k + i_b * s_kb + bos * s_kt + i_h * s_kh + o_k
    p_beta = beta + i_b * s_bb + bos * s_bt + i_hv * s_bh
    p_do = do + i_b * s_dob + bos * s_dot + i_hv * s_doh + o_v
    p_e = e + i_row * V + o_v
    p_dv = dv + i_row * V + o_v
    if NORM:
        p_rq = rq + (i_b * T + bos) * H + i_h
        p_rk = rk + (i_b * T + bos) * H + i_h

    # b_m is S or G; both walks share the loads and the update, and differ in direction and in what they sum.
    b_m = tl.zeros([BR, BV], dtype=tl.float32)
    if tl.program_id(1) == 0:
        # S, first token to last: dk_s = -S_{t-1} dv_t, S += k u^T, dq = scale S_t do_t
        if h0 is not None:
            b_m += tl.load(h0 + o_h, mask=m_h, other=0.0)
        p_dq = dq + i_row * K + o_k
        p_dk = dk_s + i_row * K + o_k
        n_k = tl.load(p_k, mask=m_k & (n_tokens > 0), other=0.0)
        n_do = tl.load(p_do, mask=m_v & (n_tokens > 0), other=0.0)
        n_e = tl.load(p_e, mask=m_v & (n_tokens > 0), other=0.0)
        n_dv = tl.load(p_dv, mask=m_v & (n_tokens > 0), other=0.0)
        n_beta = tl.load(p_beta, mask=n_tokens > 0, other=0.0)
        if NORM:
            n_rk = tl.load(p_rk, mask=n_tokens > 0, other=0.0)
        for t in range(n_tokens):
            b_k, b_do, b_dv = n_k.to(tl.float32), n_do.to(tl.float32), n_dv
            b_u = n_beta.to(tl.float32) * n_e
            if NORM:
                b_u *= n_rk
            p_k += s_kt
            p_do += s_dot
            p_e += HV * V
            p_dv += HV * V
            p_beta += s_bt
            n_k = tl.load(p_k, mask=m_k & (t + 1 < n_tokens), other=0.0)
            n_do = tl.load(p_do, mask=m_v & (t + 1 < n_tokens), other=0.0)
            n_e = tl.load(p_e, mask=m_v & (t + 1 < n_tokens), other=0.0)
            n_dv = tl.load(p_dv, mask=m_v & (t + 1 < n_tokens), other=0.0)
            n_beta = tl.load(p_beta, mask=t + 1 < n_tokens, other=0.0)
            if NORM:
                p_rk += H
                n_rk = tl.load(p_rk, mask=t + 1 < n_tokens, other=0.0)

            b_dk = -tl.sum(b_m * b_dv[None, :], 1)
            b_m += b_k[:, None] * b_u[None, :]
            b_dq = scale * tl.sum(b_m * b_do[None, :], 1)
            tl.store(p_dk, b_dk, mask=m_k)
            tl.store(p_dq, b_dq, mask=m_k)
            p_dk += HV * K
            p_dq += HV * K
    else:
        # G, last token to first: G += scale q do^T, dk_g = G u_t, G -= k dv^T
        if dht is not None:
            b_m += tl.load(dht + o_h, mask=m_h, other=0.0)
        last = (n_tokens - 1).to(tl.int64)
        p_q += last * s_qt
        p_k += last * s_kt
        p_beta += last * s_bt
        p_do += last * s_dot
        p_e += last * HV * V
        p_dv += last * HV * V
        p_dk = dk_g + (i_row + last * HV) * K + o_k
        n_q = tl.load(p_q, mask=m_k & (n_tokens > 0), other=0.0)
        n_k = tl.load(p_k, mask=m_k & (n_tokens > 0), other=0.0)
        n_do = tl.load(p_do, mask=m_v & (n_tokens > 0), other=0.0)
        n_e = tl.load(p_e, mask=m_v & (n_tokens > 0), other=0.0)
        n_dv = tl.load(p_dv, mask=m_v & (n_tokens > 0), other=0.0)
        n_beta = tl.load(p_beta, mask=n_tokens > 0, other=0.0)
        if NORM:
            p_rq += last * H
            p_rk += last * H
            n_rq = tl.load(p_rq, mask=n_tokens > 0, other=0.0)
            n_rk = tl.load(p_rk, mask=n_tokens > 0, other=0.0)
        for t in range(n_tokens):
            b_q, b_k, b_dv = n_q.to(tl.float32), n_k.to(tl.float32), n_dv
            b_do = scale * n_do.to(tl.float32)
            b_u = n_beta.to(tl.float32) * n_e
            if NORM:
                b_do *= n_rq
                b_dv *= n_rk
            p_q -= s_qt
            p_k -= s_kt
            p_do -= s_dot
            p_e -= HV * V
            p_dv -= HV * V
            p_beta -= s_bt
            n_q = tl.load(p_q, mask=m_k & (t + 1 < n_tokens), other=0.0)
            n_k = tl.load(p_k, mask=m_k & (t + 1 < n_tokens), other=0.0)
            n_do = tl.load(p_do, mask=m_v & (t + 1 < n_tokens), other=0.0)
            n_e = tl.load(p_e, mask=m_v & (t + 1 < n_tokens), other=0.0)
            n_dv = tl.load(p_dv, mask=m_v & (t + 1 < n_tokens), other=0.0)
            n_beta = tl.load(p_beta, mask=t + 1 < n_tokens, other=0.0)
            if NORM:
                p_rq -= H
                p_rk -= H
                n_rq = tl.load(p_rq, mask=t + 1 < n_tokens, other=0.0)
                n_rk = tl.load(p_rk, mask=t + 1 < n_tokens, other=0.0)

            b_m += b_q[:, None] * b_do[None, :]
            b_dk = tl.sum(b_m * b_u[None, :], 1)
            b_m -= b_k[:, None] * b_dv[None, :]
            tl.store(p_dk, b_dk, mask=m_k)
            p_dk -= HV * K


@triton.jit(do_not_specialize=["T"])
def _bwd_rows_kernel(
    # inputs; rq and rk None without norms
    q, k, rq, rk, dq_hv, dk_s, dk_g,
    # outputs [B, T, H, K]
    dq, dk,
    # sizes and strides
    T, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh,
    # constants; G value heads a key head, BT tokens a program
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0) % H
    i_t = tl.program_id(0) // H
    i_b = (i_t // tl.cdiv(T, BT)).to(tl.int64)
    o_t = (i_t % tl.cdiv(T, BT)) * BT + tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_t = o_t < T
    m = m_t[:, None] & (o_k < K)[None, :]
    i_row = (i_b * T + o_t) * H + i_h

    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    for g in tl.static_range(G):
        o_g = (i_row * G + g)[:, None] * K + o_k[None, :]
        b_dq += tl.load(dq_hv + o_g, mask=m, other=0.0)
        b_dk += tl.load(dk_s + o_g, mask=m, other=0.0) + tl.load(dk_g + o_g, mask=m, other=0.0)
    if NORM:
        # y = r x with r = 1 / |x|: dx = r (dy - y (y . dy))
        b_rq = tl.load(rq + i_row, mask=m_t, other=0.0)[:, None]
        b_rk = tl.load(rk + i_row, mask=m_t, other=0.0)[:, None]
        o_q = i_b * s_qb + o_t.to(tl.int64)[:, None] * s_qt + i_h * s_qh + o_k[None, :]
        o_kk = i_b * s_kb + o_t.to(tl.int64)[:, None] * s_kt + i_h * s_kh + o_k[None, :]
        b_q = tl.load(q + o_q, mask=m, other=0.0).to(tl.float32) * b_rq
        b_k = tl.load(k + o_kk, mask=m, other=0.0).to(tl.float32) * b_rk
        b_dq = b_rq * (b_dq - b_q * tl.sum(b_q * b_dq, 1)[:, None])
        b_dk = b_rk * (b_dk - b_k * tl.sum(b_k * b_dk, 1)[:, None])
    o_row = i_row[:, None] * K + o_k[None, :]
    tl.store(dq + o_row, b_dq.to(dq.dtype.element_ty), mask=m)
    tl.store(dk + o_row, b_dk.to(dk.dtype.element_ty), mask=m)


# ------------------------------------------------------------------------------------------------------- launchers


def _allocation(cu_seqlens):
    """Packed sequences may leave tokens out, which no program visits: these get zeros. Bytes do not count token by token."""
    return torch.empty if cu_seqlens is None else torch.zeros


def _launch_forward(q, k, v, beta, scale, h0, cu_seqlens, output_final_state, norm, save):
    """(o, ht, e, rq, rk); ht None unless wanted, e (and, with the norm, rq and rk) None unless `save`."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    fp32 = {"device": q.device, "dtype": torch.float32}
    new = _allocation(cu_seqlens)
    o = new(B, T, HV, V, device=v.device, dtype=v.dtype)
    ht = torch.empty(N, HV, K, V, **fp32) if output_final_state else None
    e = torch.empty(B, T, HV, V, **fp32) if save else None
    rq = new(B, T, H, **fp32) if save and norm else None
    rk = new(B, T, H, **fp32) if save and norm else None
    h0 = None if h0 is None else h0.contiguous()
    BV = LOOP_BLOCK
    launch(
        _fwd_kernel, (triton.cdiv(V, BV) * N * HV,),
        (q, k, v, beta, h0, cu_seqlens, o, e, rq, rk, ht),
        (scale, T, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride()),
        {
            "H": H, "HV": HV, "K": K, "V": V, "BK": triton.next_power_of_2(K), "BV": BV, "NORM": norm, "EPS": NORM_EPS,
        },
        {"num_warps": LOOP_WARPS},
    )  # fmt: skip
    return o, ht, e, rq, rk


def _launch_backward(q, k, v, beta, e, rq, rk, do, dht, scale, h0, cu_seqlens, norm):
    """(dq, dk, dv, dbeta, dh0) in the inputs' dtypes; dh0 None without h0."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    fp32 = {"device": q.device, "dtype": torch.float32}
    # A gradient may come in any strides, an expanded scalar's for one.
    do = do if do.stride(-1) == 1 else do.contiguous()
    h0 = None if h0 is None else h0.contiguous()
    dht = None if dht is None else dht.contiguous()
    BV = BR = LOOP_BLOCK
    NV = triton.cdiv(V, BV)
    # dv stays in fp32 until dq and dk, which follow from it, are done.
    new = _allocation(cu_seqlens)
    dv = new(B, T, HV, V, **fp32)
    dbeta = new(NV, B, T, HV, **fp32)
    dh0 = None if h0 is None else torch.empty_like(h0)
    dq_hv, dk_s, dk_g = new(3, B, T, HV, K, **fp32).unbind(0)
    dq = torch.empty(B, T, H, K, device=q.device, dtype=q.dtype)
    dk = torch.empty(B, T, H, K, device=k.device, dtype=k.dtype)
    sizes = {"H": H, "HV": HV, "K": K, "V": V, "NORM": norm}
    strides = (*q.stride()[:3], *k.stride()[:3], *beta.stride(), *do.stride()[:3])
    launch(
        _bwd_dv_kernel, (NV * N * HV,),
        (q, k, beta, e, do, rq, rk, dht, cu_seqlens, dv, dbeta, dh0),
        (scale, B, T, *strides),
        {**sizes, "BK": triton.next_power_of_2(K), "BV": BV},
        {"num_warps": LOOP_WARPS},
    )  # fmt: skip
    launch(
        _bwd_dqk_kernel, (triton.cdiv(K, BR) * N * HV, 2),
        (q, k, beta, e, do, dv, rq, rk, h0, dht, cu_seqlens, dq_hv, dk_s, dk_g),
        (scale, T, *strides),
        {**sizes, "BR": BR, "BV": triton.next_power_of_2(V)},
        {"num_warps": LOOP_WARPS},
    )  # fmt: skip
    launch(
        _bwd_rows_kernel, (triton.cdiv(T, 16) * H * B,),
        (q, k, rq, rk, dq_hv, dk_s, dk_g, dq, dk),
        (T, *q.stride()[:3], *k.stride()[:3]),
        {"H": H, "G": HV // H, "K": K, "BT": 16, "BK": triton.next_power_of_2(K), "NORM": norm},
        {"num_warps": 4},
    )  # fmt: skip
    return dq, dk, dv.to(v.dtype), dbeta.sum(0).to(beta.dtype), dh0


# ------------------------------------------------------------------------------------- operators for torch.compile
# Operators cannot return None, so what is not wanted comes back as an empty tensor. In eager mode the autograd
# function below calls the launchers without passing through the dispatcher.


def _empty_for_none(tensors, like):
    return tuple(like.new_empty(0, dtype=torch.float32) if x is None else x for x in tensors)


def _none_for_empty(wanted: bool, x: torch.Tensor) -> torch.Tensor | None:
    return x if wanted else None


@torch.library.custom_op("deltanet_kernels::recurrent_forward", mutates_args=())
def _forward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, scale: float,
    initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    output_final_state: bool, norm: bool, save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    outputs = _launch_forward(q, k, v, beta, scale, initial_state, cu_seqlens, output_final_state, norm, save)
    return _empty_for_none(outputs, q)


@_forward_op.register_fake
def _(q, k, v, beta, scale, initial_state, cu_seqlens, output_final_state, norm, save):
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = v.new_empty(B, T, HV, V)
    ht = q.new_empty(N, HV, K, V, dtype=torch.float32) if output_final_state else None
    e = q.new_empty(B, T, HV, V, dtype=torch.float32) if save else None
    rq = q.new_empty(B, T, H, dtype=torch.float32) if save and norm else None
    rk = q.new_empty(B, T, H, dtype=torch.float32) if save and norm else None
    return _empty_for_none((o, ht, e, rq, rk), q)


@torch.library.custom_op("deltanet_kernels::recurrent_backward", mutates_args=())
def _backward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor,
    e: torch.Tensor, rq: torch.Tensor, rk: torch.Tensor, do: torch.Tensor, dht: torch.Tensor | None,
    scale: float, initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None, norm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    rq, rk = _none_for_empty(norm, rq), _none_for_empty(norm, rk)
    gradients = _launch_backward(q, k, v, beta, e, rq, rk, do, dht, scale, initial_state, cu_seqlens, norm)
    return _empty_for_none(gradients, q)


@_backward_op.register_fake
def _(q, k, v, beta, e, rq, rk, do, dht, scale, initial_state, cu_seqlens, norm):
    dh0 = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    like = [x.new_empty(x.shape) for x in (q, k, v, beta)]
    return _empty_for_none((*like, dh0), q)


def _setup_context(ctx, inputs, output):
    q, k, v, beta, ctx.scale, initial_state, cu_seqlens, _, ctx.norm, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, *output[2:], initial_state, cu_seqlens)


def _backward_of_op(ctx, do, dht, *_):
    q, k, v, beta, e, rq, rk, initial_state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dq, dk, dv, dbeta, dh0 = _backward_op(
        q, k, v, beta, e, rq, rk, do, dht, ctx.scale, initial_state, cu_seqlens, ctx.norm
    )
    return dq, dk, dv, dbeta, None, _none_for_empty(initial_state is not None, dh0), None, None, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)


# -------------------------------------------------------------------------------------------------------- autograd


class _FusedRecurrentDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, scale, initial_state, cu_seqlens, output_final_state, norm):
        o, ht, e, rq, rk = _launch_forward(
            q, k, v, beta, scale, initial_state, cu_seqlens, output_final_state, norm, save=True
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, beta, e, rq, rk, initial_state, cu_seqlens)
        ctx.scale, ctx.norm = scale, norm
        return o, ht

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dht):
        q, k, v, beta, e, rq, rk, initial_state, cu_seqlens = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do
        dq, dk, dv, dbeta, dh0 = _launch_backward(
            q, k, v, beta, e, rq, rk, do, dht, ctx.scale, initial_state, cu_seqlens, ctx.norm
        )
        return dq, dk, dv, dbeta, None, dh0, None, None, None


# ------------------------------------------------------------------------------------------------ public functions


def fused_recurrent_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    head_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule, one token after another (Schlag, Irie and Schmidhuber 2021, arXiv:2102.11174).

    Exact for any beta, and slow on long sequences, where `chunk_delta_rule` is the one to call. Differentiable in
    q, k, v, beta and initial_state, once; deterministic.

    Args:
        q, k: [B, T, H, K], float32, bfloat16 or float16; T may be 0. K at most 256.
        v: [B, T, HV, V] with HV a multiple of H: value head j reads key head j // (HV // H). V at most 256.
        beta: [B, T, HV], the step sizes, in (0, 1) or (0, 2); ones by default.
        scale: factor on q; K ** -0.5 by default.
        initial_state: [N, HV, K, V] float32, or bfloat16 or float16, which are converted; zeros by default.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: divide every q and k by its length, x * rsqrt(sum x^2 + 1e-6).
        cu_seqlens: [N + 1] int32 or int64, borders of N sequences packed into B = 1: 0, ..., T. Without it N = B. As in
            `chunk_delta_rule`.
        cu_seqlens_cpu, head_first: of flash-linear-attention's functions. They change nothing here; `head_first=True` is
            refused.

    Inputs may be strided views, read in place; the last dimension of q, k and v must be contiguous.

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] float32 or None.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming both.
    """
    refuse_transforms("fused_recurrent_delta_rule")
    check_device(q, "delta_rule.torch_recurrent_delta_rule")
    check_layout(head_first)
    beta = v.new_ones(v.shape[:-1]) if beta is None else beta
    initial_state = as_state(initial_state)
    scale = check_arguments(q, k, v, beta, scale, initial_state, cu_seqlens)
    if _switch.CHECKS:
        check_values({"q": q, "k": k, "v": v, "beta": beta, "initial_state": initial_state}, cu_seqlens, q.shape[1])
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    differentiable = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, beta, initial_state)
    )
    if torch.compiler.is_compiling():
        o, ht, *_ = _forward_op(
            q, k, v, beta, scale, initial_state, cu_seqlens,
            output_final_state, use_qk_l2norm_in_kernel, differentiable,
        )  # fmt: skip
        return o, _none_for_empty(output_final_state, ht)
    if differentiable:
        return _FusedRecurrentDeltaRule.apply(
            q, k, v, beta, scale, initial_state, cu_seqlens, output_final_state, use_qk_l2norm_in_kernel
        )
    return _launch_forward(
        q, k, v, beta, scale, initial_state, cu_seqlens, output_final_state, use_qk_l2norm_in_kernel, save=False
    )[:2]
