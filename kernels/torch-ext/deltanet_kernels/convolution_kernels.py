"""The kernels of the short convolution; formulas and letters as in `convolution.py`."""

import triton
import triton.language as tl


@triton.jit
def _border(cu_seqlens, i, N, T):
    """Border i; T for a border that there is not, so that no row stands at or after it."""
    return tl.load(cu_seqlens + i, mask=(i >= 0) & (i <= N), other=T).to(tl.int64)


@triton.jit
def _find_sequence(cu_seqlens, t, i_b, T, N):
    """(n, its first token, the token after its last) for the sequence n of row t.

    Packed, rows may lie outside of all sequences: n is -1 or N there, and the "first token" T, beyond any row that is
    read.
    """
    if cu_seqlens is not None:
        # The last n with cu_seqlens[n] <= t (so never an empty sequence), by halving; -1 if there is none. Counted
        # from 1.
        i_n = t * 0
        i_end = i_n + N + 2
        n = N + 2
        while n > 0:
            i_mid = (i_n + i_end) // 2
            left = _border(cu_seqlens, i_mid - 1, N, 0) > t
            i_end = tl.where(left, i_mid, i_end)
            i_n = tl.where(left, i_n, i_mid)
            n = n // 2
        i_n -= 1
        bos = _border(cu_seqlens, tl.where(i_n < N, i_n, -1), N, T)
        eos = _border(cu_seqlens, i_n + 1, N, T)
    else:
        i_n, bos, eos = i_b, i_b * 0, i_b * 0 + T
    return i_n, bos, eos


@triton.jit
def _rows_inside(cu_seqlens, N, T):
    """The first row of the first sequence, and the row after the last of the last one."""
    if cu_seqlens is not None:
        first, end = tl.load(cu_seqlens).to(tl.int64), tl.load(cu_seqlens + N).to(tl.int64)
    else:
        first, end = tl.zeros([], tl.int64), tl.zeros([], tl.int64) + T
    return first, end


@triton.jit
def _weights(p_w, m_d, W: tl.constexpr):
    """(w_0, ..., w_{W-1}) in fp32."""
    b_w = ()
    for J in tl.static_range(W):
        b_w += (tl.load(p_w + (W - 1 - J), mask=m_d, other=0.0).to(tl.float32),)
    return b_w


@triton.jit
def _row(p, s_t, t, first, end, m_d):
    """Row t of a [T, D] tensor as it was loaded, zeros outside of first .. end - 1."""
    return tl.load(p + t * s_t, mask=m_d & (t >= first) & (t < end), other=0.0)


@triton.jit
def _find_state(slots, goes_on, i_n, N):
    """(which of a pool's states sequence i_n goes on from, -1 for none, and whether it has a slot, which those outside
    of all sequences do not)
    """
    m = (i_n >= 0) & (i_n < N)
    i_s = tl.load(slots + i_n, mask=m, other=-1).to(tl.int64)
    exists = i_s >= 0
    if goes_on is not None:
        i_s = tl.where(tl.load(goes_on + i_n, mask=m, other=0) != 0, i_s, -1)
    return i_s, exists


@triton.jit
def _from_state(h, s_hn, s_hd, s_hw, o_h, i_n, N, j, m_d, W: tl.constexpr):
    """The input j rows before the sequence of state i_n in fp32 where m_d; zeros without a state, or a sequence."""
    if h is not None:
        m = m_d & (i_n >= 0) & (i_n < N)
        b_x = tl.load(h + i_n * s_hn + o_h * s_hd + (W - 1 - j) * s_hw, mask=m, other=0.0).to(tl.float32)
    else:
        b_x = tl.zeros(o_h.shape, tl.float32)
    return b_x


@triton.jit
def _own(b_x, h, s_hn, s_hd, s_hw, o_h, i_n, N, t, bos, m_d, FIRST: tl.constexpr, W: tl.constexpr):
    """(x_{t-FIRST}, ..., x_{t-W+1}) as given, but those before the sequence of row t from its state, or zeros."""
    b_own = ()
    for J in tl.static_range(FIRST, W):
        b_h = _from_state(h, s_hn, s_hd, s_hw, o_h, i_n, N, J - (t - bos), m_d & (t - J < bos), W)
        b_own += (tl.where(t - J >= bos, b_x[J - FIRST], b_h),)
    return b_own


@triton.jit
def _taps(p_x, s_xt, h, s_hn, s_hd, s_hw, o_h, i_n, N, t, bos, m_d, FIRST: tl.constexpr, W: tl.constexpr):
    """(x_{t-FIRST}, ..., x_{t-W+1}) in fp32: from x within the sequence, from its state before."""
    b_x = ()
    for J in tl.static_range(FIRST, W):
        b_x += (tl.load(p_x + (t - J) * s_xt, mask=m_d & (t - J >= bos), other=0.0).to(tl.float32),)
    return _own(b_x, h, s_hn, s_hd, s_hw, o_h, i_n, N, t, bos, m_d, FIRST, W)


@triton.jit
def _dot(b_a, b_b):
    """sum_j a_j b_j over two tuples."""
    b_sum = b_a[0] * b_b[0]
    for j in tl.static_range(1, len(b_a)):
        b_sum += b_a[j] * b_b[j]
    return b_sum


@triton.jit
def _sigmoid(b_z):
    """1 / (1 + exp(-z)) as the square of a reciprocal root, so that no instruction guards against subnormals:
    tl.sigmoid makes forward 21 instructions an element instead of 15 (sm_90)."""
    b_r = tl.rsqrt(1.0 + tl.exp2(b_z * -1.4426950408889634))
    return b_r * b_r


@triton.jit
def _dz(b_z, b_dy, SILU: tl.constexpr):
    if SILU:
        b_s = _sigmoid(b_z)
        b_dy = b_dy * b_s * (1.0 + b_z * (1.0 - b_s))
    return b_dy


@triton.jit
def _dz_at(p_x, s_xt, p_dy, s_dyt, h, s_hn, o_h, i_n, N, t, bos, eos, m_d, b_w, W: tl.constexpr, SILU: tl.constexpr):
    """dz of row t >= bos from memory alone, zeros from eos on and outside of all sequences."""
    m = m_d & (t < eos) & (i_n >= 0) & (i_n < N)
    b_z = _dot(b_w, _taps(p_x, s_xt, h, s_hn, W - 1, 1, o_h, i_n, N, t, bos, m, 0, W))
    return _dz(b_z, tl.load(p_dy + t * s_dyt, mask=m, other=0.0).to(tl.float32), SILU)


@triton.jit(do_not_specialize=["T", "N"])
def forward_kernel(
    # inputs of each tensor and its output y; h and cu_seqlens may be None; with slots h is a pool; goes_on may be None
    x0, x1, x2, w0, w1, w2, h, cu_seqlens, slots, goes_on, y0, y1, y2,
    # sizes and strides
    T, N, D0, D1, D2, s_x0b, s_x0t, s_x1b, s_x1t, s_x2b, s_x2t,
    n_h, s_hn, s_hd, s_hw,
    # constants
    W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    i_d = tl.program_id(0)
    i_b = tl.program_id(2).to(tl.int64)
    n0, n1 = tl.cdiv(D0, BD), tl.cdiv(D1, BD)
    if i_d < n0:
        p_x, p_w, p_y, D, o_first, s_xt = x0 + i_b * s_x0b, w0, y0, D0, 0, s_x0t
    elif i_d < n0 + n1:
        p_x, p_w, p_y, D, o_first, s_xt = x1 + i_b * s_x1b, w1, y1, D1, D0, s_x1t
        i_d -= n0
    else:
        p_x, p_w, p_y, D, o_first, s_xt = x2 + i_b * s_x2b, w2, y2, D2, D0 + D1, s_x2t
        i_d -= n0 + n1

    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    o_h = o_first + o_d
    if slots is None:
        n_h, s_hd, s_hw = N, W - 1, 1
        s_hn = ((D0 + D1 + D2) * (W - 1)).to(tl.int64)
    t = (tl.program_id(1) * BT).to(tl.int64)
    i_n, bos, eos = _find_sequence(cu_seqlens, t, i_b, T, N)
    first, end = _rows_inside(cu_seqlens, N, T)
    p_x += o_d
    p_y += o_d
    b_w = _weights(p_w + o_d * W, m_d, W)
    i_h = i_n
    if slots is not None:
        i_h, exists = _find_state(slots, goes_on, i_n, N)
    b_before = _taps(p_x, s_xt, h, s_hn, s_hd, s_hw, o_h, i_h, n_h, t, bos, m_d, 1, W)
    for _ in range(0, BT, R):
        b_rows = ()
        for i in tl.static_range(R):
            b_rows += (_row(p_x, s_xt, t + i, first, end, m_d),)
        for i in tl.static_range(R):
            if cu_seqlens is not None:
                while (t + i >= eos) & (i_n < N):  # another begins; empty ones are passed over
                    i_n += 1
                    eos = _border(cu_seqlens, i_n + 1, N, T)
                    i_h = i_n
                    if slots is not None:
                        i_h, exists = _find_state(slots, goes_on, i_n, N)
                    b_before = ()
                    for J in tl.static_range(1, W):
                        b_before += (_from_state(h, s_hn, s_hd, s_hw, o_h, i_h, n_h, J, m_d, W),)
            b_x = (b_rows[i].to(tl.float32),) + b_before
            b_z = _dot(b_w, b_x)
            b_y = b_z * _sigmoid(b_z) if SILU else b_z
            if slots is not None:
                b_y = tl.where(exists, b_y, 0.0)
            # p_y moved on by i_b * T * D beforehand would be stored by single elements: Triton 3.6 loses its
            # alignment.
            tl.store(p_y + (i_b * T + t + i) * D, b_y.to(p_y.dtype.element_ty), mask=m_d & (t + i < T))
            b_before = b_x[: W - 1]
        t += R


@triton.jit(do_not_specialize=["T", "N"])
def backward_kernel(
    # inputs of each tensor; h and cu_seqlens may be None
    x0, x1, x2, w0, w1, w2, dy0, dy1, dy2, h, cu_seqlens,
    # outputs; dw [B * segments, D0 + D1 + D2, W] in fp32, a part for each segment
    dx0, dx1, dx2, dw,
    # sizes and strides
    T, N, D0, D1, D2, s_x0b, s_x0t, s_x1b, s_x1t, s_x2b, s_x2t, s_dy0b, s_dy0t, s_dy1b, s_dy1t, s_dy2b, s_dy2t,
    # constants
    W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    i_d = tl.program_id(0)
    i_b = tl.program_id(2).to(tl.int64)
    n0, n1 = tl.cdiv(D0, BD), tl.cdiv(D1, BD)
    if i_d < n0:
        p_x, p_w, p_dy, p_dx = x0 + i_b * s_x0b, w0, dy0 + i_b * s_dy0b, dx0
        D, o_first, s_xt, s_dyt = D0, 0, s_x0t, s_dy0t
    elif i_d < n0 + n1:
        p_x, p_w, p_dy, p_dx = x1 + i_b * s_x1b, w1, dy1 + i_b * s_dy1b, dx1
        D, o_first, s_xt, s_dyt = D1, D0, s_x1t, s_dy1t
        i_d -= n0
    else:
        p_x, p_w, p_dy, p_dx = x2 + i_b * s_x2b, w2, dy2 + i_b * s_dy2b, dx2
        D, o_first, s_xt, s_dyt = D2, D0 + D1, s_x2t, s_dy2t
        i_d -= n0 + n1

    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    o_h = o_first + o_d
    s_hn = ((D0 + D1 + D2) * (W - 1)).to(tl.int64)
    p_x += o_d
    p_dy += o_d
    p_dx += o_d
    b_w = _weights(p_w + o_d * W, m_d, W)
    t = (tl.program_id(1) * BT + BT - 1).to(tl.int64)
    i_n, bos, eos = _find_sequence(cu_seqlens, t, i_b, T, N)
    first, end = _rows_inside(cu_seqlens, N, T)
    b_rows, b_after = (), ()
    for j in tl.static_range(W - 1):
        b_rows += (_row(p_x, s_xt, t - j, first, end, m_d).to(tl.float32),)
    for j in tl.static_range(1, W):
        b_after += (_dz_at(p_x, s_xt, p_dy, s_dyt, h, s_hn, o_h, i_n, N, t + j, bos, eos, m_d, b_w, W, SILU),)
    b_dw = (tl.zeros([BD], tl.float32),) * W
    for _ in range(0, BT, R):
        b_dy = ()
        for i in tl.static_range(R):
            b_rows += (_row(p_x, s_xt, t - (W - 1) - i, first, end, m_d).to(tl.float32),)
            b_dy += (_row(p_dy, s_dyt, t - i, first, end, m_d).to(tl.float32),)
        for i in tl.static_range(R):
            if cu_seqlens is not None:
                while (t - i < bos) & (i_n >= 0):
                    i_n -= 1
                    bos = _border(cu_seqlens, i_n, N, 0)
                    b_after = (tl.zeros([BD], tl.float32),) * (W - 1)
            b_x = b_rows[i : i + W]
            if cu_seqlens is not None or h is not None:
                b_x = b_x[:1] + _own(b_x[1:], h, s_hn, W - 1, 1, o_h, i_n, N, t - i, bos, m_d, 1, W)
            b_dz = _dz(_dot(b_w, b_x), b_dy[i], SILU)
            b_dzs = (b_dz,) + b_after
            b_dx = _dot(b_w, b_dzs)
            tl.store(p_dx + (i_b * T + t - i) * D, b_dx.to(p_dx.dtype.element_ty), mask=m_d & (t - i < T))
            b_after = b_dzs[: W - 1]
            b_sums = ()
            for j in tl.static_range(W):
                b_sums += (b_dw[j] + b_dz * b_x[j],)
            b_dw = b_sums
        b_rows = b_rows[R:]
        t -= R

    i_part = i_b * tl.num_programs(1) + tl.program_id(1)
    p_dw = dw + (i_part * (D0 + D1 + D2) + o_h) * W + (W - 1)
    for j in tl.static_range(W):
        tl.store(p_dw - j, b_dw[j], mask=m_d)


@triton.jit(do_not_specialize=["T", "N"])
def state_kernel(
    # inputs of each tensor; h and cu_seqlens may be None. With BACKWARD dy too; with slots h and out are one pool
    x0, x1, x2, w0, w1, w2, dy0, dy1, dy2, h, cu_seqlens, slots, goes_on,
    # output [N, D0 + D1 + D2, W - 1]: the state after the last token, or (BACKWARD) the gradient of h
    out,
    # sizes and strides
    T, N, D0, D1, D2, s_x0b, s_x0t, s_x1b, s_x1t, s_x2b, s_x2t, s_dy0b, s_dy0t, s_dy1b, s_dy1t, s_dy2b, s_dy2t,
    n_h, s_hn, s_hd, s_hw,
    # constants
    W: tl.constexpr, SILU: tl.constexpr, BACKWARD: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    n0, n1 = tl.cdiv(D0, BD), tl.cdiv(D1, BD)
    if cu_seqlens is not None:
        i_b = i_n * 0
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        eos = tl.load(cu_seqlens + i_n + 1).to(tl.int64)
    else:
        i_b = i_n
        bos = i_n * 0
        eos = bos + T
    if i_d < n0:
        p_x, p_w, p_dy = x0 + i_b * s_x0b, w0, dy0 + i_b * s_dy0b
        D, o_first, s_xt, s_dyt = D0, 0, s_x0t, s_dy0t
    elif i_d < n0 + n1:
        p_x, p_w, p_dy = x1 + i_b * s_x1b, w1, dy1 + i_b * s_dy1b
        D, o_first, s_xt, s_dyt = D1, D0, s_x1t, s_dy1t
        i_d -= n0
    else:
        p_x, p_w, p_dy = x2 + i_b * s_x2b, w2, dy2 + i_b * s_dy2b
        D, o_first, s_xt, s_dyt = D2, D0 + D1, s_x2t, s_dy2t
        i_d -= n0 + n1
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    o_h = o_first + o_d
    i_h, m_out = i_n, m_d
    if slots is None:
        n_h, s_hd, s_hw = N, W - 1, 1
        s_hn = ((D0 + D1 + D2) * (W - 1)).to(tl.int64)
        p_out = out + i_n * s_hn + o_h * (W - 1)
    else:
        i_h, exists = _find_state(slots, goes_on, i_n, N)
        m_out = m_d & exists
        p_out = out + tl.load(slots + i_n).to(tl.int64) * s_hn + o_h * s_hd
    p_x += o_d
    p_dy += o_d
    if BACKWARD:
        # Column j stands J = W-1-j rows before the sequence: it meets w_{J+i} in row i, i < W - J.
        b_w = _weights(p_w + o_d * W, m_d, W)
        for j in tl.static_range(W - 1):
            b_out = tl.zeros([BD], dtype=tl.float32)
            for i in tl.static_range(j + 1):
                b_dz = _dz_at(p_x, s_xt, p_dy, s_dyt, h, s_hn, o_h, i_n, N, bos + i, bos, eos, m_d, b_w, W, SILU)
                b_out += b_w[W - 1 - j + i] * b_dz
            tl.store(p_out + j, b_out.to(out.dtype.element_ty), mask=m_d)
    else:
        b_x = _taps(p_x, s_xt, h, s_hn, s_hd, s_hw, o_h, i_h, n_h, eos, bos, m_d, 1, W)
        if slots is not None:
            tl.debug_barrier()  # as in `step_kernel`
        for j in tl.static_range(W - 1):
            tl.store(p_out + j * s_hw, b_x[W - 2 - j].to(out.dtype.element_ty), mask=m_out)


@triton.jit
def step_kernel(
    # inputs of each tensor and its output y; h, or a pool for slots, is also an output, updated in place
    x0, x1, x2, w0, w1, w2, h, slots, y0, y1, y2,
    # sizes and strides
    D0, D1, D2, s_x0b, s_x1b, s_x2b, s_hb, s_hd, s_hw,
    # constants
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    n0, n1 = tl.cdiv(D0, BD), tl.cdiv(D1, BD)
    if i_d < n0:
        p_x, p_w, p_y, D, o_first = x0 + i_b * s_x0b, w0, y0, D0, 0
    elif i_d < n0 + n1:
        p_x, p_w, p_y, D, o_first = x1 + i_b * s_x1b, w1, y1, D1, D0
        i_d -= n0
    else:
        p_x, p_w, p_y, D, o_first = x2 + i_b * s_x2b, w2, y2, D2, D0 + D1
        i_d -= n0 + n1
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    m_h = m_d
    if slots is None:
        s_hw = 1
        p_h = h + i_b * s_hb + (o_first + o_d) * (W - 1)
    else:
        i_s, exists = _find_state(slots, None, i_b, i_b + 1)
        m_h = m_d & exists
        p_h = h + i_s * s_hb + (o_first + o_d) * s_hd
    b_x = (tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32),)
    for J in tl.static_range(1, W):
        b_x += (tl.load(p_h + (W - 1 - J) * s_hw, mask=m_h, other=0.0).to(tl.float32),)
    # A column may be stored by another thread than the one that loaded it: all loads before any store.
    tl.debug_barrier()
    for J in tl.static_range(W - 1):
        tl.store(p_h + (W - 2 - J) * s_hw, b_x[J].to(h.dtype.element_ty), mask=m_h)
    b_z = _dot(_weights(p_w + o_d * W, m_d, W), b_x)
    b_y = b_z * _sigmoid(b_z) if SILU else b_z
    if slots is not None:
        b_y = tl.where(exists, b_y, 0.0)
    tl.store(p_y + i_b * D + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d)
