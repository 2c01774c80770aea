"""Short causal depthwise convolution and SiLU for several tensors (q, k and v) in one launch.

    z_t = sum_j w_j x_{t-j}, j = 0 .. W-1        y_t = silu(z_t), or z_t

What lies before a sequence comes from its state (its last W - 1 inputs, oldest first), or is zero. Backward:

    dz_t = dy_t silu'(z_t)        dx_t = sum_j w_j dz_{t+j}        dw_j = sum_t dz_t x_{t-j}

A program walks a segment of rows (time), R of them loaded before the first is needed, so each element is loaded and
converted once. Forward walks from the first row to the last with the W - 1 inputs before a row in registers. Backward
walks from the last to the first with the W - 1 rows of dz after a row, so each dz is computed once (and those of the
W - 1 rows after a segment once more), and dw gathers in registers: one partial sum a segment, added up afterwards in a
fixed order.

Legend: B batch, T time, D channels (D0, D1, D2 of up to three tensors, one after another in the state and in dw),
W width, N sequences (N = B, or len(cu_seqlens) - 1 packed into B = 1), BT rows of a segment, BD channels of a program.
w_j multiplies x_{t-j}: it is column W-1-j of the weight [D, W]. In kernels: i_ index, o_ offset, p_ pointer, m_ mask,
s_ stride, b_ block value in registers or a tuple of them; d for a gradient; h the state; bos and eos the first token of
a sequence and the one after its last.
Everything is accumulated in fp32; offsets into tensors are int64.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import _switch
from ._checks import check_device, check_values, refuse_transforms
from ._launch import launch
from .limits import MAX_TAPS, MIN_TAPS


__all__ = ["short_conv", "short_conv_step"]

MAX_TENSORS = 3

# Launch choices, measured on an H200 for three tensors [8, 4096, 2048] in bf16 with W = 4 and SiLU, where the bytes alone
# take 0.190 ms forward and 0.285 ms backward. 4 channels a thread.
# Forward 0.211 ms (four rows ahead, 8 channels and one warp: 0.228).
FORWARD_SEGMENT, FORWARD_BLOCK_D, FORWARD_WARPS, FORWARD_ROWS = 32, 256, 2, 8
# Backward 0.374 ms, the sum of dw's parts included (segments of 64 rows: 0.402; eight rows ahead: 0.364, but in packed
# sequences 0.419, not 0.415, and 202 registers, not 143). 3 rows in 128 are computed twice, and dw's partial sums are 1/16 of
# x's bytes (W fp32 a channel and segment).
BACKWARD_SEGMENT, BACKWARD_BLOCK_D, BACKWARD_WARPS, BACKWARD_ROWS = 128, 256, 2, 4
STEP_BLOCK_D, STEP_WARPS = 256, 2


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _border(cu_seqlens, i, N, T):
    """Border i; T for a border that there is not, so that no row stands at or after it."""
    return tl.load(cu_seqlens + i, mask=(i >= 0) & (i <= N), other=T).to(tl.int64)


@triton.jit
def _find_sequence(cu_seqlens, t, i_b, T, N):
    """(n, its first token, the token after its last) for the sequence n of row t.

    Packed, rows may lie outside of all sequences: n is -1 or N there, and the "first token" T, beyond any row that is read.
    """
    if cu_seqlens is not None:
        # The last n with cu_seqlens[n] <= t (so never an empty sequence), by halving; -1 if there is none. Counted from 1.
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
def _from_state(h, s_hn, o_h, i_n, N, j, m_d, W: tl.constexpr):
    """The input j rows before sequence i_n in fp32 where m_d; zeros without a state, or a sequence."""
    if h is not None:
        m = m_d & (i_n >= 0) & (i_n < N)
        b_x = tl.load(h + i_n * s_hn + o_h * (W - 1) + (W - 1 - j), mask=m, other=0.0).to(tl.float32)
    else:
        b_x = tl.zeros(o_h.shape, tl.float32)
    return b_x


@triton.jit
def _own(b_x, h, s_hn, o_h, i_n, N, t, bos, m_d, FIRST: tl.constexpr, W: tl.constexpr):
    """(x_{t-FIRST}, ..., x_{t-W+1}) as given, but those before the sequence of row t from its state, or zeros."""
    b_own = ()
    for J in tl.static_range(FIRST, W):
        b_h = _from_state(h, s_hn, o_h, i_n, N, J - (t - bos), m_d & (t - J < bos), W)
        b_own += (tl.where(t - J >= bos, b_x[J - FIRST], b_h),)
    return b_own


@triton.jit
def _taps(p_x, s_xt, h, s_hn, o_h, i_n, N, t, bos, m_d, FIRST: tl.constexpr, W: tl.constexpr):
    """(x_{t-FIRST}, ..., x_{t-W+1}) in fp32: from x within the sequence, from its state before."""
    b_x = ()
    for J in tl.static_range(FIRST, W):
        b_x += (tl.load(p_x + (t - J) * s_xt, mask=m_d & (t - J >= bos), other=0.0).to(tl.float32),)
    return _own(b_x, h, s_hn, o_h, i_n, N, t, bos, m_d, FIRST, W)


@triton.jit
def _dot(b_a, b_b):
    """sum_j a_j b_j over two tuples."""
    b_sum = b_a[0] * b_b[0]
    for j in tl.static_range(1, len(b_a)):
        b_sum += b_a[j] * b_b[j]
    return b_sum


@triton.jit
def _sigmoid(b_z):
    """1 / (1 + exp(-z)) as the square of a reciprocal root, so that no instruction guards against subnormals: tl.sigmoid
    makes forward 21 instructions an element instead of 15 (sm_90)."""
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
    b_z = _dot(b_w, _taps(p_x, s_xt, h, s_hn, o_h, i_n, N, t, bos, m, 0, W))
    return _dz(b_z, tl.load(p_dy + t * s_dyt, mask=m, other=0.0).to(tl.float32), SILU)


@triton.jit(do_not_specialize=["T", "N"])
def _fwd_kernel(
    # inputs of each tensor and its output y; h and cu_seqlens may be None
    x0, x1, x2, w0, w1, w2, h, cu_seqlens, y0, y1, y2,
    # sizes and strides
    T, N, D0, D1, D2, s_x0b, s_x0t, s_x1b, s_x1t, s_x2b, s_x2t,
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
    s_hn = ((D0 + D1 + D2) * (W - 1)).to(tl.int64)
    t = (tl.program_id(1) * BT).to(tl.int64)
    i_n, bos, eos = _find_sequence(cu_seqlens, t, i_b, T, N)
    first, end = _rows_inside(cu_seqlens, N, T)
    p_x += o_d
    p_y += o_d
    b_w = _weights(p_w + o_d * W, m_d, W)
    b_before = _taps(p_x, s_xt, h, s_hn, o_h, i_n, N, t, bos, m_d, 1, W)
    for _ in range(0, BT, R):
        b_rows = ()
        for i in tl.static_range(R):
            b_rows += (_row(p_x, s_xt, t + i, first, end, m_d),)
        for i in tl.static_range(R):
            if cu_seqlens is not None:
                while (t + i >= eos) & (i_n < N):  # another begins; empty ones are passed over
                    i_n += 1
                    eos = _border(cu_seqlens, i_n + 1, N, T)
                    b_before = ()
                    for J in tl.static_range(1, W):
                        b_before += (_from_state(h, s_hn, o_h, i_n, N, J, m_d, W),)
            b_x = (b_rows[i].to(tl.float32),) + b_before
            b_z = _dot(b_w, b_x)
            b_y = b_z * _sigmoid(b_z) if SILU else b_z
            # p_y moved on by i_b * T * D beforehand would be stored by single elements: Triton 3.6 loses its alignment.
            tl.store(p_y + (i_b * T + t + i) * D, b_y.to(p_y.dtype.element_ty), mask=m_d & (t + i < T))
            b_before = b_x[: W - 1]
        t += R


@triton.jit(do_not_specialize=["T", "N"])
def _bwd_kernel(
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
                b_x = b_x[:1] + _own(b_x[1:], h, s_hn, o_h, i_n, N, t - i, bos, m_d, 1, W)
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
def _state_kernel(
    # inputs of each tensor; h and cu_seqlens may be None. With BACKWARD dy too
    x0, x1, x2, w0, w1, w2, dy0, dy1, dy2, h, cu_seqlens,
    # output [N, D0 + D1 + D2, W - 1]: the state after the last token, or (BACKWARD) the gradient of h
    out,
    # sizes and strides
    T, N, D0, D1, D2, s_x0b, s_x0t, s_x1b, s_x1t, s_x2b, s_x2t, s_dy0b, s_dy0t, s_dy1b, s_dy1t, s_dy2b, s_dy2t,
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
    s_hn = ((D0 + D1 + D2) * (W - 1)).to(tl.int64)
    p_x += o_d
    p_dy += o_d
    p_out = out + i_n * s_hn + o_h * (W - 1)
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
        b_x = _taps(p_x, s_xt, h, s_hn, o_h, i_n, N, eos, bos, m_d, 1, W)
        for j in tl.static_range(W - 1):
            tl.store(p_out + j, b_x[W - 2 - j].to(out.dtype.element_ty), mask=m_d)


@triton.jit
def _step_kernel(
    # inputs of each tensor and its output y; h is also an output, updated in place
    x0, x1, x2, w0, w1, w2, h, y0, y1, y2,
    # sizes and strides
    D0, D1, D2, s_x0b, s_x1b, s_x2b, s_hb,
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
    p_h = h + i_b * s_hb + (o_first + o_d) * (W - 1)
    b_x = (tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32),)
    for J in tl.static_range(1, W):
        b_x += (tl.load(p_h + (W - 1 - J), mask=m_d, other=0.0).to(tl.float32),)
    # A column may be stored by another thread than the one that loaded it: all loads before any store.
    tl.debug_barrier()
    for J in tl.static_range(W - 1):
        tl.store(p_h + (W - 2 - J), b_x[J].to(h.dtype.element_ty), mask=m_d)
    b_z = _dot(_weights(p_w + o_d * W, m_d, W), b_x)
    b_y = b_z * _sigmoid(b_z) if SILU else b_z
    tl.store(p_y + i_b * D + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d)


# -------------------------------------------------------------------------------------------------------- launchers


def _three(xs, missing=None):
    """The kernels have three slots: an empty one repeats the first tensor, and has no channels."""
    return (*xs, *[xs[0] if missing is None else missing] * (MAX_TENSORS - len(xs)))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x itself when its last dimension is contiguous (any other stride will do), else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _sizes(xs, cu_seqlens):
    """B, T, N, the channels of the three slots, and the number of channel blocks of a given size."""
    B, T = xs[0].shape[:2]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return B, T, N, _three([x.shape[2] for x in xs], missing=0)


# CUDA's, of a grid's second and third axis; the first ends at 2^31 - 1.
GRID_LIMIT = 65535


def _segment(T: int, rows: int) -> int:
    """`rows` of a segment, or as many times that as leave a grid its segments."""
    while triton.cdiv(T, rows) > GRID_LIMIT:  # from 2.1 M tokens on
        rows *= 2
    return rows


def _batches(B: int) -> list[slice]:
    """A batch in parts that a grid takes."""
    return [slice(first, first + GRID_LIMIT) for first in range(0, B, GRID_LIMIT)]


def _rows_of(state: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if state is None else state[rows]


@functools.cache
def _block(sizes, largest):
    """(channels a block, blocks over all tensors)."""
    BD = min(largest, max(16, triton.next_power_of_2(max(sizes))))
    return BD, sum(triton.cdiv(D, BD) for D in sizes)


def _strides(xs):
    return [s for x in _three(xs) for s in x.stride()[:2]]


def _launch_forward(xs, weights, silu, initial_state, output_final_state, cu_seqlens):
    """(list of y, final state or None)."""
    B, T, N, Ds = _sizes(xs, cu_seqlens)
    if B > GRID_LIMIT:
        parts = [
            _launch_forward([x[b] for x in xs], weights, silu, _rows_of(initial_state, b), output_final_state, None)
            for b in _batches(B)
        ]
        ys = [torch.cat(y) for y in zip(*(ys for ys, _ in parts))]
        return ys, torch.cat([state for _, state in parts]) if output_final_state else None
    W = weights[0].shape[1]
    xs, weights = [_rows(x) for x in xs], [w.contiguous() for w in weights]
    h = None if initial_state is None else initial_state.contiguous()
    ys = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in xs]
    BD, blocks = _block(Ds, FORWARD_BLOCK_D)
    final_state = None
    BT = _segment(T, FORWARD_SEGMENT)
    launch(
        _fwd_kernel, (blocks, triton.cdiv(T, BT), B),
        (*_three(xs), *_three(weights), h, cu_seqlens, *_three(ys)),
        (T, N, *Ds, *_strides(xs)),
        {"W": W, "SILU": silu, "BT": BT, "BD": BD, "R": FORWARD_ROWS},
        {"num_warps": FORWARD_WARPS},
    )  # fmt: skip
    if output_final_state:
        final_state = torch.empty(N, sum(Ds), W - 1, device=xs[0].device, dtype=xs[0].dtype)
        _launch_state(xs, weights, xs, h, cu_seqlens, final_state, silu, backward=False)
    return ys, final_state


def _launch_state(xs, weights, dys, h, cu_seqlens, out, silu, backward):
    _, T, N, Ds = _sizes(xs, cu_seqlens)
    BD, blocks = _block(Ds, STEP_BLOCK_D)
    launch(
        _state_kernel, (N, blocks),
        (*_three(xs), *_three(weights), *_three(dys), h, cu_seqlens, out),
        (T, N, *Ds, *_strides(xs), *_strides(dys)),
        {"W": weights[0].shape[1], "SILU": silu, "BACKWARD": backward, "BD": BD},
        {"num_warps": STEP_WARPS},
    )  # fmt: skip


def _launch_backward(xs, weights, dys, silu, initial_state, cu_seqlens, needs_state):
    """(list of dx, list of dweight, gradient of the initial state or None)."""
    B, T, N, Ds = _sizes(xs, cu_seqlens)
    if B > GRID_LIMIT:
        parts = [
            _launch_backward(
                [x[b] for x in xs], weights, [dy[b] for dy in dys], silu, _rows_of(initial_state, b), None, needs_state
            )
            for b in _batches(B)
        ]
        dxs, dws, dhs = zip(*parts)
        return (
            [torch.cat(dx) for dx in zip(*dxs)],
            [torch.stack(dw).sum(0) for dw in zip(*dws)],
            torch.cat(dhs) if needs_state else None,
        )
    W = weights[0].shape[1]
    xs, dys = [_rows(x) for x in xs], [_rows(dy) for dy in dys]
    contiguous = [w.contiguous() for w in weights]
    h = None if initial_state is None else initial_state.contiguous()
    dxs = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in xs]
    BT = _segment(T, BACKWARD_SEGMENT)
    segments = triton.cdiv(T, BT)
    dw = torch.empty(B * segments, sum(Ds), W, device=xs[0].device, dtype=torch.float32)
    BD, blocks = _block(Ds, BACKWARD_BLOCK_D)
    dh = None
    launch(
        _bwd_kernel, (blocks, segments, B),
        (*_three(xs), *_three(contiguous), *_three(dys), h, cu_seqlens, *_three(dxs), dw),
        (T, N, *Ds, *_strides(xs), *_strides(dys)),
        {"W": W, "SILU": silu, "BT": BT, "BD": BD, "R": BACKWARD_ROWS},
        {"num_warps": BACKWARD_WARPS},
    )  # fmt: skip
    if needs_state:
        dh = torch.empty_like(h)
        _launch_state(xs, contiguous, dys, h, cu_seqlens, dh, silu, backward=True)
    dws = dw.sum(0).split([w.shape[0] for w in weights])
    # clone: an operator's outputs may not share memory
    return dxs, [d.to(w.dtype, copy=True) for d, w in zip(dws, weights, strict=True)], dh


def _launch_step(xs, weights, state, silu):
    """List of y; state is overwritten."""
    B, _, _, Ds = _sizes(xs, None)
    xs, weights = [_rows(x) for x in xs], [w.contiguous() for w in weights]
    ys = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in xs]
    BD, blocks = _block(Ds, STEP_BLOCK_D)
    launch(
        _step_kernel, (B, blocks),
        (*_three(xs), *_three(weights), state, *_three(ys)),
        (*Ds, *[x.stride(0) for x in _three(xs)], state.stride(0)),
        {"W": weights[0].shape[1], "SILU": silu, "BD": BD},
        {"num_warps": STEP_WARPS},
    )  # fmt: skip
    return ys


# -------------------------------------------------------------------------------------- operators for torch.compile
# Operators cannot return None: a state that is not wanted is an empty tensor. In eager mode the autograd function
# below calls the launchers without passing through the dispatcher.


@torch.library.custom_op("deltanet_kernels::short_conv_forward", mutates_args=())
def _forward_op(
    xs: list[torch.Tensor], weights: list[torch.Tensor], silu: bool, initial_state: torch.Tensor | None,
    output_final_state: bool, cu_seqlens: torch.Tensor | None,
) -> list[torch.Tensor]:  # fmt: skip
    ys, final_state = _launch_forward(xs, weights, silu, initial_state, output_final_state, cu_seqlens)
    return [*ys, xs[0].new_empty(0) if final_state is None else final_state]


@_forward_op.register_fake
def _(xs, weights, silu, initial_state, output_final_state, cu_seqlens):
    B = xs[0].shape[0]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, sum(x.shape[2] for x in xs), weights[0].shape[1] - 1) if output_final_state else (0,)
    return [*(x.new_empty(x.shape) for x in xs), xs[0].new_empty(shape)]


@torch.library.custom_op("deltanet_kernels::short_conv_backward", mutates_args=())
def _backward_op(
    xs: list[torch.Tensor], weights: list[torch.Tensor], dys: list[torch.Tensor], silu: bool,
    initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
) -> list[torch.Tensor]:  # fmt: skip
    dxs, dws, dh = _launch_backward(xs, weights, dys, silu, initial_state, cu_seqlens, initial_state is not None)
    return [*dxs, *dws, xs[0].new_empty(0) if dh is None else dh]


@_backward_op.register_fake
def _(xs, weights, dys, silu, initial_state, cu_seqlens):
    dh = xs[0].new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return [*(x.new_empty(x.shape) for x in (*xs, *weights)), dh]


def _setup_context(ctx, inputs, output):
    xs, weights, ctx.silu, initial_state, _, cu_seqlens = inputs
    ctx.n = len(xs)
    ctx.save_for_backward(initial_state, cu_seqlens, *xs, *weights)


def _backward_of_op(ctx, grads):
    initial_state, cu_seqlens, *tensors = ctx.saved_tensors
    xs, weights = tensors[: ctx.n], tensors[ctx.n :]
    dys = [torch.zeros_like(x) if dy is None else dy for x, dy in zip(xs, grads[: ctx.n], strict=True)]
    *gradients, dh = _backward_op(xs, weights, dys, ctx.silu, initial_state, cu_seqlens)
    dh = None if initial_state is None else dh
    return gradients[: ctx.n], gradients[ctx.n :], None, dh, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)


# An operator that changes its input may return tensors but no list of them, so this one always returns three.
@torch.library.custom_op("deltanet_kernels::short_conv_step", mutates_args={"state"})
def _step_op(
    xs: list[torch.Tensor], weights: list[torch.Tensor], state: torch.Tensor, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ys = _launch_step(xs, weights, state, silu)
    return tuple(ys + [state.new_empty(0) for _ in range(MAX_TENSORS - len(ys))])


@_step_op.register_fake
def _(xs, weights, state, silu):
    ys = [x.new_empty(x.shape) for x in xs]
    return tuple(ys + [state.new_empty(0) for _ in range(MAX_TENSORS - len(ys))])


# --------------------------------------------------------------------------------------------------------- autograd


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n, silu, initial_state, output_final_state, cu_seqlens, *tensors):
        ys, final_state = _launch_forward(
            list(tensors[:n]), list(tensors[n:]), silu, initial_state, output_final_state, cu_seqlens
        )
        ctx.n, ctx.silu = n, silu
        ctx.save_for_backward(initial_state, cu_seqlens, *tensors)
        if final_state is not None:
            ctx.mark_non_differentiable(final_state)
        return final_state, *ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, *dys):
        initial_state, cu_seqlens, *tensors = ctx.saved_tensors
        xs, weights = tensors[: ctx.n], tensors[ctx.n :]
        dxs, dws, dh = _launch_backward(
            xs, weights, dys, ctx.silu, initial_state, cu_seqlens, needs_state=ctx.needs_input_grad[2]
        )
        return None, None, dh, None, None, *dxs, *dws


# ------------------------------------------------------------------------------------------------- public functions


def _check_inputs(xs, weights, activation):
    """The same xs and weights as lists, and whether there is a SiLU."""
    xs, weights = list(xs), list(weights)
    if not 1 <= len(xs) <= MAX_TENSORS or len(weights) != len(xs):
        raise ValueError(
            f"xs and weights must hold 1 to {MAX_TENSORS} tensors, one weight each, got {len(xs)} and {len(weights)}"
        )
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    x0, w0 = xs[0], weights[0]
    if x0.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"xs must be float32, bfloat16 or float16, got {x0.dtype}")
    for i, (x, w) in enumerate(zip(xs, weights, strict=True)):
        if x.dim() != 3 or x.shape[:2] != x0.shape[:2] or x.dtype != x0.dtype or x.device != x0.device:
            raise ValueError(
                f"xs must all be [B, T, D_i] of one dtype and device, got {x0.dtype} {list(x0.shape)} on {x0.device} "
                f"and {x.dtype} {list(x.shape)} on {x.device}"
            )
        if w.dim() != 2 or w.shape[0] != x.shape[2] or w.shape[1] != w0.shape[-1]:
            raise ValueError(
                f"weights[{i}] must be [{x.shape[2]}, {w0.shape[-1]}] beside x {list(x.shape)}, got {list(w.shape)}"
            )
        if w.dtype != w0.dtype or not w.is_floating_point() or w.device != x0.device:
            raise ValueError(
                f"weights must all be of one floating dtype on {x0.device}, got {w0.dtype} and {w.dtype} on {w.device}"
            )
    if not MIN_TAPS <= w0.shape[1] <= MAX_TAPS:
        raise ValueError(f"weights must be [D, W] with W in {MIN_TAPS}..{MAX_TAPS}, got {list(w0.shape)}")
    return xs, weights, activation == "silu"


def _named(xs, weights, state):
    names = [f"xs[{i}]" for i in range(len(xs))] + [f"weights[{i}]" for i in range(len(weights))]
    return dict(zip(names, (*xs, *weights))) | {"state": state}


def _check_state(name, state, N, xs, W):
    shape = [N, sum(x.shape[2] for x in xs), W - 1]
    x = xs[0]
    if list(state.shape) != shape or state.dtype != x.dtype or state.device != x.device:
        raise ValueError(
            f"{name} must be {x.dtype} {shape} on {x.device}, got {state.dtype} {list(state.shape)} on {state.device}"
        )


def _last_inputs(xs, initial_state, W, cu_seqlens):
    """The final state in torch's own operators, which give it a gradient."""
    if initial_state is None:
        N = xs[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial_state = xs[0].new_zeros(N, sum(x.shape[2] for x in xs), W - 1)
    if cu_seqlens is None:
        new = torch.cat([x[:, max(0, x.shape[1] - W + 1) :] for x in xs], dim=2).mT
        return torch.cat((initial_state[:, :, new.shape[2] :], new), dim=2)
    j = torch.arange(W - 1, device=cu_seqlens.device)
    place = cu_seqlens[1:, None] - (W - 1) + j  # [N, W - 1]
    age = place - cu_seqlens[:-1, None]  # negative in the initial state
    new = torch.cat([x[0, place.clamp(min=0)] for x in xs], dim=2).mT
    old = initial_state.gather(2, (age + W - 1).clamp(max=W - 2).unsqueeze(1).expand_as(new))
    return torch.where((age >= 0).unsqueeze(1), new, old)


def short_conv(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    activation: str | None = "silu",
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Causal depthwise convolution of one to three tensors, with SiLU, in one launch.

    y[b, t, d] = silu(sum_i weight[d, i] x[b, t - W + 1 + i, d]), as torch's conv1d with groups = D and W - 1 zeros
    (or the state) on the left. Differentiable, once, in xs, weights and initial_state, also through the final
    state; deterministic. Asking for that costs one more small launch, or a few where gradients are enabled.

    Args:
        xs: one to three [B, T, D_i], float32, bfloat16 or float16, such as the projections to q, k and v; views cut
            from one projection are read in place (a last dimension that is not contiguous costs a copy).
        weights: as many [D_i, W], W in 2..4, any one floating dtype; no bias.
        activation: "silu" or None.
        initial_state: [N, sum D_i, W - 1] in x's dtype, the last W - 1 inputs before each sequence, oldest first,
            the tensors' channels one after another; zeros by default.
        output_final_state: whether to return such a state after the last token.
        cu_seqlens: [N + 1] int32 or int64, borders of N sequences packed into B = 1: 0, ..., T. Without it N = B.
            A border may repeat. They are not read by the host: none may go back or lie beyond T. What lies outside of
            all sequences gives zeros, and gets zero gradients.

    Returns:
        a tuple of y_i [B, T, D_i] in x's dtype, and the final state [N, sum D_i, W - 1] or None.

    Raises:
        ValueError: for shapes, dtypes, devices or an activation that do not fit, naming what came and what was
            wanted.
    """
    refuse_transforms("short_conv")
    xs, weights, silu = _check_inputs(xs, weights, activation)
    N = xs[0].shape[0]
    if cu_seqlens is not None:
        if N != 1:
            raise ValueError(f"cu_seqlens needs the sequences packed into B = 1, got B = {N}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be int32 or int64 [N + 1], N >= 1, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            )
        if cu_seqlens.device != xs[0].device:
            raise ValueError(f"cu_seqlens must be on x's device {xs[0].device}, got {cu_seqlens.device}")
        N = cu_seqlens.shape[0] - 1
        cu_seqlens = cu_seqlens.contiguous()
    if initial_state is not None:
        _check_state("initial_state", initial_state, N, xs, weights[0].shape[1])
    check_device(xs[0], "short_conv.torch_short_conv")
    if _switch.CHECKS:
        check_values(_named(xs, weights, initial_state), cu_seqlens, xs[0].shape[1])
    last = None
    if output_final_state and torch.is_grad_enabled():
        last, output_final_state = _last_inputs(xs, initial_state, weights[0].shape[1], cu_seqlens), False
    if torch.compiler.is_compiling():
        *ys, final_state = _forward_op(xs, weights, silu, initial_state, output_final_state, cu_seqlens)
        return tuple(ys), final_state if output_final_state else last
    final_state, *ys = _ShortConv.apply(len(xs), silu, initial_state, output_final_state, cu_seqlens, *xs, *weights)
    return tuple(ys), final_state if output_final_state else last


def short_conv_step(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    state: torch.Tensor,
    activation: str | None = "silu",
) -> tuple[torch.Tensor, ...]:
    """One token of `short_conv` for decoding: one launch, the state moves on in place. Not differentiable.

    Args:
        xs: one to three [B, 1, D_i], float32, bfloat16 or float16.
        weights: as many [D_i, W], W in 2..4, any one floating dtype.
        state: [B, sum D_i, W - 1] in x's dtype, the last inputs, oldest first; its last two dimensions contiguous.
            Overwritten: the oldest input leaves, the new one enters.
        activation: "silu" or None.

    Returns:
        a tuple of y_i [B, 1, D_i] in x's dtype.

    Raises:
        ValueError: for shapes, dtypes, devices or an activation that do not fit, for T != 1, for a state that cannot
            be updated in place, and when a gradient is asked of it.
    """
    refuse_transforms("short_conv_step")
    xs, weights, silu = _check_inputs(xs, weights, activation)
    W = weights[0].shape[1]
    if xs[0].shape[1] != 1:
        raise ValueError(f"short_conv_step takes one token, T = 1, got T = {xs[0].shape[1]}")
    _check_state("state", state, xs[0].shape[0], xs, W)
    check_device(xs[0], "short_conv.short_conv_step")
    if _switch.CHECKS:
        check_values(_named(xs, weights, state), None, 1)
    if state.stride()[1:] != (W - 1, 1):
        raise ValueError(f"state must be contiguous in its last two dimensions, got strides {state.stride()}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*xs, *weights, state)):
        raise ValueError("short_conv_step has no backward: call it under torch.no_grad(), got requires_grad inputs")
    if torch.compiler.is_compiling():
        return _step_op(xs, weights, state, silu)[: len(xs)]
    return tuple(_launch_step(xs, weights, state, silu))
