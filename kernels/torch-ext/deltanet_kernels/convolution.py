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
s_ stride, b_ block value in registers or a tuple of them; d for a gradient; h the state; bos and eos the first token
of a sequence and the one after its last.
Everything is accumulated in fp32; offsets into tensors are int64.
"""

import functools
from collections.abc import Sequence

import torch
import triton

from . import _switch
from ._checks import check_device, check_indices, check_pool, check_values, refuse_gradients, refuse_transforms
from ._launch import launch
from .convolution_kernels import backward_kernel, forward_kernel, state_kernel, step_kernel
from .limits import MAX_TAPS, MIN_TAPS
from .pools import Pool, make_pool


__all__ = ["short_conv", "short_conv_step"]

MAX_TENSORS = 3

# Launch choices, measured on an H200 for three tensors [8, 4096, 2048] in bf16 with W = 4 and SiLU, where the bytes
# alone take 0.190 ms forward and 0.285 ms backward. 4 channels a thread.
# Forward 0.211 ms (four rows ahead, 8 channels and one warp: 0.228).
FORWARD_SEGMENT, FORWARD_BLOCK_D, FORWARD_WARPS, FORWARD_ROWS = 32, 256, 2, 8
# Backward 0.374 ms, the sum of dw's parts included (segments of 64 rows: 0.402; eight rows ahead: 0.364, but in packed
# sequences 0.419, not 0.415, and 202 registers, not 143). 3 rows in 128 are computed twice, and dw's partial sums are
# 1/16 of x's bytes (W fp32 a channel and segment).
BACKWARD_SEGMENT, BACKWARD_BLOCK_D, BACKWARD_WARPS, BACKWARD_ROWS = 128, 256, 2, 4
STEP_BLOCK_D, STEP_WARPS = 256, 2


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


def _launch_forward(xs, weights, silu, initial_state, output_final_state, cu_seqlens, pool=None):
    """(list of y, final state or None). With `pool` the initial state is a pool, into which the final states go."""
    B, T, N, Ds = _sizes(xs, cu_seqlens)
    if B > GRID_LIMIT:
        parts = []
        for b in _batches(B):
            state, part = (_rows_of(initial_state, b), None) if pool is None else (initial_state, pool.of(b))
            rows = [x[b] for x in xs]
            parts.append(_launch_forward(rows, weights, silu, state, output_final_state, None, part))
        ys = [torch.cat(y) for y in zip(*(ys for ys, _ in parts))]
        return ys, torch.cat([state for _, state in parts]) if output_final_state else None
    W = weights[0].shape[1]
    xs, weights = [_rows(x) for x in xs], [w.contiguous() for w in weights]
    h = initial_state if initial_state is None or pool is not None else initial_state.contiguous()
    ys = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in xs]
    BD, blocks = _block(Ds, FORWARD_BLOCK_D)
    final_state = None
    BT = _segment(T, FORWARD_SEGMENT)
    launch(
        forward_kernel, (blocks, triton.cdiv(T, BT), B),
        (*_three(xs), *_three(weights), h, cu_seqlens, *(pool or (None, None)), *_three(ys)),
        (T, N, *Ds, *_strides(xs), *_places(h, pool)),
        {"W": W, "SILU": silu, "BT": BT, "BD": BD, "R": FORWARD_ROWS},
        {"num_warps": FORWARD_WARPS},
    )  # fmt: skip
    if pool is not None:
        _launch_state(xs, weights, xs, h, cu_seqlens, h, silu, backward=False, pool=pool)
    elif output_final_state:
        final_state = torch.empty(N, sum(Ds), W - 1, device=xs[0].device, dtype=xs[0].dtype)
        _launch_state(xs, weights, xs, h, cu_seqlens, final_state, silu, backward=False)
    return ys, final_state


def _places(h, pool):
    """The number of states in a pool, and its strides."""
    return (None,) * 4 if pool is None else (h.shape[0], *h.stride())


def _launch_state(xs, weights, dys, h, cu_seqlens, out, silu, backward, pool=None):
    _, T, N, Ds = _sizes(xs, cu_seqlens)
    BD, blocks = _block(Ds, STEP_BLOCK_D)
    launch(
        state_kernel, (N, blocks),
        (*_three(xs), *_three(weights), *_three(dys), h, cu_seqlens, *(pool or (None, None)), out),
        (T, N, *Ds, *_strides(xs), *_strides(dys), *_places(h, pool)),
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
        backward_kernel, (blocks, segments, B),
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


def _launch_step(xs, weights, state, silu, slots=None):
    """List of y; state, with `slots` a pool, is overwritten."""
    B, _, _, Ds = _sizes(xs, None)
    xs, weights = [_rows(x) for x in xs], [w.contiguous() for w in weights]
    ys = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in xs]
    BD, blocks = _block(Ds, STEP_BLOCK_D)
    launch(
        step_kernel, (B, blocks),
        (*_three(xs), *_three(weights), state, slots, *_three(ys)),
        (
            *Ds, *[x.stride(0) for x in _three(xs)], state.stride(0),
            *((None, None) if slots is None else state.stride()[1:]),
        ),
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


# An operator that changes its input may return tensors but no list of them, so these two always return three.
def _always_three(ys, like):
    return (*ys, *(like.new_empty(0) for _ in range(MAX_TENSORS - len(ys))))


@torch.library.custom_op("deltanet_kernels::short_conv_in_pool", mutates_args={"states"})
def _pool_op(
    xs: list[torch.Tensor], weights: list[torch.Tensor], silu: bool, states: torch.Tensor,
    cu_seqlens: torch.Tensor | None, slots: torch.Tensor, goes_on: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    ys, _ = _launch_forward(xs, weights, silu, states, False, cu_seqlens, Pool(slots, goes_on))
    return _always_three(ys, states)


@_pool_op.register_fake
def _(xs, weights, silu, states, cu_seqlens, slots, goes_on):
    return _always_three([x.new_empty(x.shape) for x in xs], states)


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


@torch.library.custom_op("deltanet_kernels::short_conv_step", mutates_args={"state"})
def _step_op(
    xs: list[torch.Tensor], weights: list[torch.Tensor], state: torch.Tensor, silu: bool,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _always_three(_launch_step(xs, weights, state, silu, slots), state)


@_step_op.register_fake
def _(xs, weights, state, silu, slots=None):
    return _always_three([x.new_empty(x.shape) for x in xs], state)


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


def _check_pool(pool, state_indices, has_initial_state, n, xs, W):
    shape = sum(x.shape[2] for x in xs), W - 1
    check_pool(pool, state_indices, has_initial_state, n, shape, xs[0].dtype, xs[0].device)


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
    *,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
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
        state_indices, has_initial_state: [N], as in `chunk_delta_rule`: initial_state is a pool
            [slots, sum D_i, W - 1] in x's dtype, of any strides ([slots, W - 1, sum D_i] in memory: pass `pool.mT`).

    Returns:
        a tuple of y_i [B, T, D_i] in x's dtype, and the final state [N, sum D_i, W - 1] or None; with state_indices
        the pool or None.

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
    pooled = state_indices is not None or has_initial_state is not None
    if pooled:
        _check_pool(initial_state, state_indices, has_initial_state, N, xs, weights[0].shape[1])
        refuse_gradients("short_conv with state_indices", *xs, *weights, initial_state)
    elif initial_state is not None:
        _check_state("initial_state", initial_state, N, xs, weights[0].shape[1])
    check_device(xs[0], "short_conv.torch_short_conv")
    if _switch.CHECKS:
        read = check_indices(initial_state, state_indices, has_initial_state) if pooled else initial_state
        check_values(_named(xs, weights, read), cu_seqlens, xs[0].shape[1])
    if pooled:
        pool = make_pool(state_indices, has_initial_state)
        if torch.compiler.is_compiling():
            ys = _pool_op(xs, weights, silu, initial_state, cu_seqlens, *pool)[: len(xs)]
        else:
            ys, _ = _launch_forward(xs, weights, silu, initial_state, False, cu_seqlens, pool)
        return tuple(ys), initial_state if output_final_state else None
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
    *,
    state_indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """One token of `short_conv` for decoding: one launch, the state moves on in place. Not differentiable.

    Args:
        xs: one to three [B, 1, D_i], float32, bfloat16 or float16.
        weights: as many [D_i, W], W in 2..4, any one floating dtype.
        state: [B, sum D_i, W - 1] in x's dtype, the last inputs, oldest first; its last two dimensions contiguous.
            Overwritten: the oldest input leaves, the new one enters.
        activation: "silu" or None.
        state_indices: [B], as in `delta_rule_step`: `state` is a pool [slots, sum D_i, W - 1] in x's dtype, of any
            strides.

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
    if state_indices is None:
        _check_state("state", state, xs[0].shape[0], xs, W)
    else:
        _check_pool(state, state_indices, None, xs[0].shape[0], xs, W)
        state_indices = state_indices.contiguous()
    check_device(xs[0], "short_conv.short_conv_step")
    if _switch.CHECKS:
        read = state if state_indices is None else check_indices(state, state_indices, None)
        check_values(_named(xs, weights, read), None, 1)
    if state_indices is None and state.stride()[1:] != (W - 1, 1):
        raise ValueError(f"state must be contiguous in its last two dimensions, got strides {state.stride()}")
    refuse_gradients("short_conv_step", *xs, *weights, state)
    if torch.compiler.is_compiling():
        return _step_op(xs, weights, state, silu, state_indices)[: len(xs)]
    return tuple(_launch_step(xs, weights, state, silu, state_indices))
