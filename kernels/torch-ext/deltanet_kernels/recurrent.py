"""The delta rule token by token: the 2021 algorithm on a GPU.

    e_t = v_t - S_{t-1}^T k_t        u_t = beta_t e_t        S_t = S_{t-1} + k_t u_t^T        o_t = scale S_t^T q_t

Backward, with G the gradient of the state (G_T = dht) and every e_t kept by forward:

    G <- G + scale q_t do_t^T        du_t = G^T k_t        dv_t = beta_t du_t        dbeta_t = e_t . du_t
    dk_t = G u_t - S_{t-1} dv_t      dq_t = scale S_t do_t      G <- G - k_t dv_t^T
    dh0 = G after the first token

With a gate the state fades before a token reads it: alpha_t S_{t-1} with alpha = exp(g) takes the place of S_{t-1},
and G after token t is multiplied by alpha_t. With r_t what token t reads less what it writes,

    dg_t = <alpha_t S_{t-1}, its gradient> = r_t + dg_{t+1}
    r_t = q_t . dq_t + k_t . (-alpha_t S_{t-1} dv_t) - k_t . (G u_t)

from <S_T, dS_T> on: sums over tokens, in fp64, of what dq and the two terms of dk hold anyway.

So nothing is divided by beta and no factor I - beta k k^T is inverted. Two launches and a last one:

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

from . import _switch
from ._checks import (
    as_state,
    check_arguments,
    check_device,
    check_indices,
    check_layout,
    check_values,
    refuse_gradients,
    refuse_transforms,
)
from ._launch import launch
from ._operators import empty_for_none, none_for_empty
from .limits import NORM_EPS
from .pools import Pool, make_pool
from .recurrent_kernels import dqk_kernel, dv_kernel, forward_kernel, rows_kernel


__all__ = ["fused_recurrent_delta_rule", "fused_recurrent_gated_delta_rule"]

# Launch choices. One warp everywhere in the token loops: with more, each token would wait at a barrier for the sums
# that cross warps. 8 columns (or rows) of a 128-wide state are 32 registers a thread, of a 256-wide one 64; wider
# blocks would leave too few programs at batch 1 (16 heads x 128 / 8 = 256 for 132 multiprocessors).
LOOP_BLOCK, LOOP_WARPS = 8, 1


# ------------------------------------------------------------------------------------------------------- launchers


def _allocation(cu_seqlens):
    """Packed sequences may leave tokens out, which no program visits: these get zeros. Bytes do not count token by
    token.
    """
    return torch.empty if cu_seqlens is None else torch.zeros


def _launch_forward(q, k, v, beta, g, scale, h0, cu_seqlens, output_final_state, norm, save, pool=None):
    """(o, ht, e, rq, rk); ht None unless wanted, e (and, with the norm, rq and rk) None unless `save`. With `pool`, h0
    is a pool of states and ht the same.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    fp32 = {"device": q.device, "dtype": torch.float32}
    new = _allocation(cu_seqlens)
    o = new(B, T, HV, V, device=v.device, dtype=v.dtype)
    slots, goes_on = pool or (None, None)
    if pool is not None:
        ht = h0
    else:
        ht = torch.empty(N, HV, K, V, **fp32) if output_final_state else None
        h0 = None if h0 is None else h0.contiguous()
    e = torch.empty(B, T, HV, V, **fp32) if save else None
    rq = new(B, T, H, **fp32) if save and norm else None
    rk = new(B, T, H, **fp32) if save and norm else None
    BV = LOOP_BLOCK
    launch(
        forward_kernel, (triton.cdiv(V, BV) * N * HV,),
        (q, k, v, beta, g, h0, cu_seqlens, slots, goes_on, o, e, rq, rk, ht),
        (
            scale, T, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(),
            *([None] * 4 if pool is None else h0.stride()),
        ),
        {
            "H": H, "HV": HV, "K": K, "V": V, "BK": triton.next_power_of_2(K), "BV": BV, "NORM": norm, "EPS": NORM_EPS,
        },
        {"num_warps": LOOP_WARPS},
    )  # fmt: skip
    return o, ht, e, rq, rk


def _launch_backward(q, k, v, beta, g, e, rq, rk, ht, do, dht, scale, h0, cu_seqlens, norm):
    """(dq, dk, dv, dbeta, dh0, dg) in the inputs' dtypes; dh0 None without h0, dg without g."""
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
        dv_kernel, (NV * N * HV,),
        (q, k, beta, g, e, do, rq, rk, dht, cu_seqlens, dv, dbeta, dh0),
        (scale, B, T, *strides),
        {**sizes, "BK": triton.next_power_of_2(K), "BV": BV},
        {"num_warps": LOOP_WARPS},
    )  # fmt: skip
    launch(
        dqk_kernel, (triton.cdiv(K, BR) * N * HV, 2),
        (q, k, beta, g, e, do, dv, rq, rk, h0, dht, cu_seqlens, dq_hv, dk_s, dk_g),
        (scale, T, *strides),
        {**sizes, "BR": BR, "BV": triton.next_power_of_2(V)},
        {"num_warps": LOOP_WARPS},
    )  # fmt: skip
    launch(
        rows_kernel, (triton.cdiv(T, 16) * H * B,),
        (q, k, rq, rk, dq_hv, dk_s, dk_g, dq, dk),
        (T, *q.stride()[:3], *k.stride()[:3]),
        {"H": H, "G": HV // H, "K": K, "BT": 16, "BK": triton.next_power_of_2(K), "NORM": norm},
        {"num_warps": 4},
    )  # fmt: skip
    dg = None
    if g is not None:
        r = _row_sums(q, rq, dq_hv) + _row_sums(k, rk, dk_s - dk_g)
        dg = _sums_to_the_end(r, None if dht is None else (ht * dht).sum((2, 3)), cu_seqlens).to(g.dtype)
    return dq, dk, dv.to(v.dtype), dbeta.sum(0).to(beta.dtype), dh0, dg


def _row_sums(x, r, dx):
    """r x . dx over the last dimension, [B, T, HV], of x [B, T, H, K] and dx [B, T, HV, K]."""
    x = x.double() if r is None else x.double() * r.unsqueeze(-1)
    return (x.repeat_interleave(dx.shape[2] // x.shape[2], 2) * dx).sum(-1)


def _sums_to_the_end(r, at_end, cu_seqlens):
    """Sums of r [B, T, HV] from each token to its sequence's end, and of what `at_end` [N, HV] adds there."""
    sums = r.cumsum(1)
    if cu_seqlens is None:
        sums = sums[:, -1:] - sums + r
        return sums if at_end is None else sums + at_end.unsqueeze(1)
    tokens = torch.arange(r.shape[1], device=r.device)
    i_n = torch.searchsorted(cu_seqlens, tokens, right=True) - 1  # of two borders at one place the last
    is_inside = (i_n >= 0) & (i_n < cu_seqlens.shape[0] - 1)
    i_n = i_n.clamp(0, cu_seqlens.shape[0] - 2)
    sums = sums[:, cu_seqlens[i_n + 1] - 1] - sums + r
    sums = sums if at_end is None else sums + at_end[i_n]
    return sums * is_inside.unsqueeze(-1)


# ------------------------------------------------------------------------------------- operators for torch.compile
# In eager mode the autograd function below calls the launchers without passing through the dispatcher.


@torch.library.custom_op("deltanet_kernels::recurrent_forward", mutates_args=())
def _forward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None, scale: float,
    initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    output_final_state: bool, norm: bool, save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    outputs = _launch_forward(q, k, v, beta, g, scale, initial_state, cu_seqlens, output_final_state, norm, save)
    return empty_for_none(q, *outputs)


@_forward_op.register_fake
def _(q, k, v, beta, g, scale, initial_state, cu_seqlens, output_final_state, norm, save):
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = v.new_empty(B, T, HV, V)
    ht = q.new_empty(N, HV, K, V, dtype=torch.float32) if output_final_state else None
    e = q.new_empty(B, T, HV, V, dtype=torch.float32) if save else None
    rq = q.new_empty(B, T, H, dtype=torch.float32) if save and norm else None
    rk = q.new_empty(B, T, H, dtype=torch.float32) if save and norm else None
    return empty_for_none(q, o, ht, e, rq, rk)


@torch.library.custom_op("deltanet_kernels::recurrent_in_pool", mutates_args={"states"})
def _pool_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None, scale: float,
    states: torch.Tensor, cu_seqlens: torch.Tensor | None, norm: bool, slots: torch.Tensor,
    goes_on: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    pool = Pool(slots, goes_on)
    return _launch_forward(q, k, v, beta, g, scale, states, cu_seqlens, False, norm, False, pool)[0]


@_pool_op.register_fake
def _(q, k, v, beta, g, scale, states, cu_seqlens, norm, slots, goes_on):
    return v.new_empty(v.shape)


@torch.library.custom_op("deltanet_kernels::recurrent_backward", mutates_args=())
def _backward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None,
    e: torch.Tensor, rq: torch.Tensor, rk: torch.Tensor, ht: torch.Tensor, do: torch.Tensor,
    dht: torch.Tensor | None, scale: float, initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    norm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    rq, rk = none_for_empty(norm, rq), none_for_empty(norm, rk)
    gradients = _launch_backward(q, k, v, beta, g, e, rq, rk, ht, do, dht, scale, initial_state, cu_seqlens, norm)
    return empty_for_none(q, *gradients)


@_backward_op.register_fake
def _(q, k, v, beta, g, e, rq, rk, ht, do, dht, scale, initial_state, cu_seqlens, norm):
    like = [None if x is None else x.new_empty(x.shape) for x in (q, k, v, beta, initial_state, g)]
    return empty_for_none(q, *like)


def _setup_context(ctx, inputs, output):
    q, k, v, beta, g, ctx.scale, initial_state, cu_seqlens, _, ctx.norm, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, g, *output[2:], output[1], initial_state, cu_seqlens)


def _backward_of_op(ctx, do, dht, *_):
    q, k, v, beta, g, e, rq, rk, ht, initial_state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dht = None if dht is None or dht.numel() == 0 else dht
    dq, dk, dv, dbeta, dh0, dg = _backward_op(
        q, k, v, beta, g, e, rq, rk, ht, do, dht, ctx.scale, initial_state, cu_seqlens, ctx.norm
    )
    dh0, dg = none_for_empty(initial_state is not None, dh0), none_for_empty(g is not None, dg)
    return dq, dk, dv, dbeta, dg, None, dh0, None, None, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)


# -------------------------------------------------------------------------------------------------------- autograd


class _FusedRecurrentDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, scale, initial_state, cu_seqlens, output_final_state, norm):
        o, ht, e, rq, rk = _launch_forward(
            q, k, v, beta, g, scale, initial_state, cu_seqlens, output_final_state, norm, save=True
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, beta, g, e, rq, rk, ht, initial_state, cu_seqlens)
        ctx.scale, ctx.norm = scale, norm
        return o, ht

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dht):
        q, k, v, beta, g, e, rq, rk, ht, initial_state, cu_seqlens = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do
        dq, dk, dv, dbeta, dh0, dg = _launch_backward(
            q, k, v, beta, g, e, rq, rk, ht, do, dht, ctx.scale, initial_state, cu_seqlens, ctx.norm
        )
        return dq, dk, dv, dbeta, dg, None, dh0, None, None, None


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
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
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
        cu_seqlens: [N + 1] int32 or int64, borders of N sequences packed into B = 1: 0, ..., T. Without it N = B. As
            in `chunk_delta_rule`.
        cu_seqlens_cpu, head_first: of flash-linear-attention's functions. They change nothing here; `head_first=True`
            is refused.
        state_indices, has_initial_state: where the states lie in a pool, as in `chunk_delta_rule`.

    Inputs may be strided views, read in place; the last dimension of q, k and v must be contiguous.

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] float32 or None.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, naming both.
    """
    beta = v.new_ones(v.shape[:-1]) if beta is None else beta
    options = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, head_first
    options += state_indices, has_initial_state
    return _token_by_token("fused_recurrent_delta_rule", q, k, v, beta, None, *options)


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: None = None,
    gv: None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    head_first: bool = False,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule, one token after another; see `chunk_gated_delta_rule`.

    Args:
        g: [B, T, HV], the log of the decay, at most 0, any floating dtype; None for the rule without.
        gk, gv: decays per channel, of flash-linear-attention's function; this one has none and refuses them.

    The other arguments, what is returned and what is raised are those of `fused_recurrent_delta_rule`. The gradient of
    g is defined, too.
    """
    if gk is not None or gv is not None:
        raise ValueError("gk and gv, decays per channel, are not of this rule, which has one per value head: pass g")
    beta = v.new_ones(v.shape[:-1]) if beta is None else beta
    options = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, head_first
    options += state_indices, has_initial_state
    return _token_by_token("fused_recurrent_gated_delta_rule", q, k, v, beta, g, *options)


def _token_by_token(
    name, q, k, v, beta, g, scale, initial_state, final, norm, cu_seqlens, head_first, state_indices, has_initial_state
):
    """The rule with g, or without (None)."""
    refuse_transforms(name)
    check_device(q, "delta_rule.torch_recurrent_delta_rule")
    check_layout(head_first)
    if state_indices is None:
        initial_state = as_state(initial_state)
    scale = check_arguments(
        q, k, v, beta, scale, initial_state, cu_seqlens, g, state_indices, has_initial_state
    )  # fmt: skip
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "g": g, "initial_state": initial_state}
    if _switch.CHECKS:
        read = initial_state
        if state_indices is not None:
            read = check_indices(initial_state, state_indices, has_initial_state)
        check_values(tensors | {"initial_state": read}, cu_seqlens, q.shape[1])
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    g = None if g is None else g.contiguous()
    pool = make_pool(state_indices, has_initial_state)
    if pool is not None:
        refuse_gradients(f"{name} with state_indices", *tensors.values())
        if torch.compiler.is_compiling():
            o = _pool_op(q, k, v, beta, g, scale, initial_state, cu_seqlens, norm, *pool)
        else:
            o, *_ = _launch_forward(q, k, v, beta, g, scale, initial_state, cu_seqlens, False, norm, False, pool)
        return o, initial_state if final else None
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors.values())
    if torch.compiler.is_compiling():
        o, ht, *_ = _forward_op(q, k, v, beta, g, scale, initial_state, cu_seqlens, final, norm, differentiable)
        return o, none_for_empty(final, ht)
    if differentiable:
        return _FusedRecurrentDeltaRule.apply(q, k, v, beta, g, scale, initial_state, cu_seqlens, final, norm)
    return _launch_forward(q, k, v, beta, g, scale, initial_state, cu_seqlens, final, norm, save=False)[:2]
