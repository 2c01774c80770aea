"""The short convolution before the delta rule: causal, depthwise, a few taps, over q, k and v together.

Letters: B batch, T time, D channels, W taps, N sequences.
"""

import torch
import torch.nn.functional as F

from .delta_rule import is_transformed, kernels_for


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
    """One token of decoding, T = 1, without gradients: returns ys and moves `state` `[B, sum D_i, W - 1]` on in place."""
    kernels = kernels_for(xs[0], _too_wide(weights))
    if kernels is not None:
        return kernels.short_conv_step(xs, weights, state, activation)
    ys, new_state = torch_short_conv(xs, weights, activation, state, output_final_state=True)
    state.copy_(new_state)
    return ys


def _too_wide(weights: tuple[torch.Tensor, ...]) -> str | None:
    taps = weights[0].shape[-1]
    return f"convolutions of more than 4 taps, got {taps}" if taps > 4 else None


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
        initial_state: the `W - 1` inputs before the first, oldest first, `[B, sum D_i, W - 1]`; zeros by default. Not
            with `cu_seqlens`.
        output_final_state: also return the last `W - 1` inputs, in the same form and the inputs' dtype.
        cu_seqlens: borders of N packed sequences, int `[N + 1]`; needs B = 1. No token sees another sequence's.

    Returns:
        `(ys, final_state)`: ys like xs, in their dtypes; final_state, differentiable too, or None unless asked for.
    """
    T, W = xs[0].shape[1], weights[0].shape[-1]
    sizes = [x.shape[-1] for x in xs]
    if initial_state is None:
        histories = [x.new_zeros(x.shape[0], W - 1, x.shape[-1]) for x in xs]
    else:
        histories = [h.to(x.dtype) for h, x in zip(initial_state.mT.split(sizes, dim=-1), xs)]
    # Inputs that lie W - 1 - j tokens back exist only from the (W - 1 - j)-th token of a sequence on.
    age = None if cu_seqlens is None else _position_in_sequence(cu_seqlens, T)

    ys, tails = [], []
    for x, weight, history in zip(xs, weights, histories):
        padded = torch.cat((history, x), dim=1)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        y = 0
        for j in range(W):
            shifted = padded[:, j : j + T]
            if age is not None:
                shifted = shifted.masked_fill((age < W - 1 - j)[None, :, None], 0)
            y = y + shifted * weight[:, j]
        ys.append((F.silu(y) if activation == "silu" else y).to(x.dtype))
        tails.append(padded[:, T:])
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

    A module is called with `[B, D_i, time]`, where the `W - 1` inputs before it, or zeros, stand in front of each sequence.
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


def _position_in_sequence(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """For each of T packed tokens, how many tokens of its own sequence precede it: `[T]`."""
    t = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, t, right=True) - 1
    return t - cu_seqlens[sequence]
