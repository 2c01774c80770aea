"""The kernels of the rule token by token; formulas and letters as in `recurrent.py`."""

import triton
import triton.language as tl

from .pools import find_state


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
def forward_kernel(
    # inputs; g [B, T, HV], h0 and cu_seqlens may be None; with slots h0 and ht are one pool; goes_on may be None
    q, k, v, beta, g, h0, cu_seqlens, slots, goes_on,
    # outputs; e (with rq, rk) is None when nothing will be differentiated, ht when it is not wanted
    o, e, rq, rk, ht,
    # sizes and strides
    scale, T, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_bb, s_bt, s_bh,
    s_hn, s_hh, s_hk, s_hv,
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
    m_h0 = m_h
    if slots is None:
        o_h = (i_n * HV + i_hv) * K * V + o_k[:, None] * V + o_v[None, :]
    else:
        i_s, exists, reads = find_state(slots, goes_on, i_n)
        o_h = i_s * s_hn + i_hv.to(tl.int64) * s_hh + o_k[:, None] * s_hk + o_v[None, :] * s_hv
        m_h0 = m_h & reads
        m_h = m_h & exists
    p_q = q + i_b * s_qb + bos * s_qt + i_h * s_qh + o_k
    p_k = k + i_b * s_kb + bos * s_kt + i_h * s_kh + o_k
    p_v = v + i_b * s_vb + bos * s_vt + i_hv * s_vh + o_v
    p_beta = beta + i_b * s_bb + bos * s_bt + i_hv * s_bh
    i_row = i_b * T + bos
    if g is not None:
        p_g = g + i_row * HV + i_hv
    p_o = o + (i_row * HV + i_hv) * V + o_v
    if e is not None:
        p_e = e + (i_row * HV + i_hv) * V + o_v
        if NORM:
            p_rq = rq + i_row * H + i_h
            p_rk = rk + i_row * H + i_h
            writes_norms = (i_v == 0) & (i_hv % (HV // H) == 0)

    b_h = tl.zeros([BK, BV], dtype=tl.float32)
    if h0 is not None:
        b_h += tl.load(h0 + o_h, mask=m_h0, other=0.0).to(tl.float32)

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

        if g is not None:
            b_h *= tl.exp(tl.load(p_g).to(tl.float32))
            p_g += HV
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
        if slots is not None:
            b_o = tl.where(exists, b_o, 0.0)

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
def dv_kernel(
    # inputs; rq and rk None without norms, g and dht may be None
    q, k, beta, g, e, do, rq, rk, dht, cu_seqlens,
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
    if g is not None:
        p_g = g + i_row * HV + i_hv
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
        if g is not None:
            b_dh *= tl.exp(tl.load(p_g).to(tl.float32))
            p_g -= HV

    if dh0 is not None:
        tl.store(dh0 + o_h, b_dh, mask=m_h)


@triton.jit(do_not_specialize=["T"])
def dqk_kernel(
    # inputs; rq and rk None without norms, g, h0 and dht may be None
    q, k, beta, g, e, do, dv, rq, rk, h0, dht, cu_seqlens,
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
    if g is not None:
        p_g = g + i_row
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

            if g is not None:
                b_m *= tl.exp(tl.load(p_g).to(tl.float32))
                p_g += HV
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
        if g is not None:
            p_g += last * HV
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
            if g is not None:
                b_m *= tl.exp(tl.load(p_g).to(tl.float32))
                p_g -= HV
            tl.store(p_dk, b_dk, mask=m_k)
            p_dk -= HV * K


@triton.jit(do_not_specialize=["T"])
def rows_kernel(
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
