"""The short convolution before the delta rule: causal, depthwise, a few taps, over q, k and v together.

Letters: B batch, T time, D channels, W taps, N sequences.
"""

import torch
import torch.nn.functional as F

from .delta_rule import checked_borders
from .kernel_switch import LIMITS, is_transformed, kernels_for


def short_conv(
    xs: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
    activation: str | None = "silu",
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """The convolution by the fastest route that this machine has; arguments and results as in `torch_short_conv`."""
    kernels = None if is_transformed() else kernels_for(xs[0], _too_wide(weights))
    conv = torch_short_conv if kernels is None else kernels.short_conv
    return conv(xs, weights, activation, initial_state, output_final_state, cu_seqlens)


def short_conv_step(
    xs: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
    state: torch.Tensor,
    activation: str | None = "silu",
) -> tuple[torch.Tensor, ...]:
    """One token of decoding, T = 1, without gradients: returns ys and moves `state` `[B, sum D_i, W - 1]` on in
    place.
    """
    kernels = kernels_for(xs[0], _too_wide(weights))
    if kernels is not None:
        return kernels.short_conv_step(xs, weights, state, activation)
    ys, new_state = torch_short_conv(xs, weights, activation, state, output_final_state=True)
    state.copy_(new_state)
    return ys


def _too_wide(weights: tuple[torch.Tensor, ...]) -> str | None:
    taps = weights[0].shape[-1]
    if LIMITS is None or LIMITS.MIN_TAPS <= taps <= LIMITS.MAX_TAPS:
        return None
    return f"convolutions of other than {LIMITS.MIN_TAPS} to {LIMITS.MAX_TAPS} taps, got {taps}"


def torch_short_conv(
    xs: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
    activation: str | None = "silu",
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Convolve each of `xs` with its `weights` along time: `y_t = act(sum_j w_j x_{t - W + 1 + j})`, in fp32 (fp64 for
    fp64 weights).

    Args:
        xs: tensors `[B, T, D_i]`.
        weights: one `[D_i, W]` for each; the last tap meets the newest token.
        activation: `"silu"` or None.
        initial_state: the `W - 1` inputs before the first, oldest first, `[N, sum D_i, W - 1]`; zeros by default.
        output_final_state: also return the last `W - 1` inputs, in the same form and the inputs' dtype.
        cu_seqlens: borders of N packed sequences, int `[N + 1]`, from 0 to T; needs B = 1. No token sees another
            sequence's. A border may repeat. Without it, N = B.

    Returns:
        `(ys, final_state)`: ys like xs, in their dtypes; final_state, differentiable too, or None unless asked for.
    """
    T, W = xs[0].shape[1], weights[0].shape[-1]
    sizes = [x.shape[-1] for x in xs]
    histories = [None] * len(xs) if initial_state is None else initial_state.mT.split(sizes, dim=-1)
    if cu_seqlens is not None:
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            checked_borders(cu_seqlens, xs[0].shape[0], T)
        sequence, age = _place_in_sequence(cu_seqlens, T)
        inside = ((age >= 0) & (torch.arange(T, device=age.device) < cu_seqlens[-1]))[None, :, None]

    ys, tails = [], []
    for x, weight, history in zip(xs, weights, histories):
        before = x.new_zeros(x.shape[0], W - 1, x.shape[-1])
        history = None if history is None else history.to(x.dtype)
        padded = torch.cat((before if history is None or cu_seqlens is not None else history, x), dim=1)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        y = 0
        for j in range(W):
            shifted = padded[:, j : j + T]
            if cu_seqlens is not None:
                # The input `back` tokens back belongs to the sequence from its `back`-th token on, before that to its
                # history.
                back = W - 1 - j
                own = (age >= back)[None, :, None]
                other = 0 if history is None else history[sequence, (age + j).clamp(0, W - 2)].unsqueeze(0)
                shifted = torch.where(own, shifted, other)
            y = y + shifted * weight[:, j]
        y = F.silu(y) if activation == "silu" else y
        ys.append((y if cu_seqlens is None else torch.where(inside, y, 0)).to(x.dtype))
        tails.append(padded[:, T:] if cu_seqlens is None else _tails(padded[0], history, cu_seqlens, W))
    return tuple(ys), torch.cat(tails, dim=-1).mT.contiguous() if output_final_state else None


def module_short_conv(
    xs: tuple[torch.Tensor, ...],
    convs: tuple[torch.nn.Module, ...],
    W: int,
    activation: str | None = "silu",
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The convolution by modules that are more than a weight of W taps: an adapter, a hook, another class.

    A module is called with `[B, D_i, time]`, where the `W - 1` inputs before it, or zeros, stand in front of each
    sequence.
    """
    T = xs[0].shape[1]
    sizes = [x.shape[-1] for x in xs]
    places = torch.arange(T, device=xs[0].device)  # of the outputs
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, places, right=True) - 1
        places = places + (W - 1) * sequence
    if initial_state is None:
        initial_state = xs[0].new_zeros(xs[0].shape[0], sum(sizes), W - 1)
    ys, tails = [], []
    for x, conv, history in zip(xs, convs, initial_state.mT.split(sizes, dim=-1)):
        padded = torch.cat((history.to(x.dtype), x), dim=1)
        tails.append(padded[:, T:])
        if cu_seqlens is not None:
            length = T + (W - 1) * (len(cu_seqlens) - 1)
            padded = x.new_zeros(x.shape[0], length, x.shape[2]).index_copy(1, places + W - 1, x)
        y = conv(padded.mT).mT[:, places]
        ys.append((F.silu(y) if activation == "silu" else y).to(x.dtype))
    return tuple(ys), torch.cat(tails, dim=-1).mT.contiguous()


def _place_in_sequence(cu_seqlens: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of T packed tokens its sequence, and how many tokens of that one precede it: twice `[T]`."""
    t = torch.arange(T, device=cu_seqlens.device)
    # the last that begins at or before t, which is not an empty one
    sequence = (torch.searchsorted(cu_seqlens, t, right=True) - 1).clamp(0, len(cu_seqlens) - 2)
    return sequence, t - cu_seqlens[sequence]


def _tails(padded: torch.Tensor, history: torch.Tensor | None, cu_seqlens: torch.Tensor, W: int) -> torch.Tensor:
    """The last W - 1 inputs of each sequence, `[N, W - 1, D]`; of a shorter one its history's first. `padded` `[W - 1
    + T, D]`.
    """
    column = torch.arange(W - 1, device=cu_seqlens.device)
    lengths = cu_seqlens.diff()[:, None]
    own = padded[cu_seqlens[1:, None] + column]
    other = 0
    if history is not None:
        n = torch.arange(len(history), device=column.device)[:, None]
        other = history[n, (lengths + column).clamp(max=W - 2)]
    return torch.where((lengths + column >= W - 1).unsqueeze(-1), own, other)
