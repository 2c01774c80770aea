"""`chunk_delta_rule` and `chunk_gated_delta_rule`: the public functions, their autograd function and torch.library
operators, of which g is None without a gate.

Eager calls go through a plain autograd function, which costs less time on the host than an operator's dispatch (at
batch 1 and 4096 tokens the host is what one waits for); under torch.compile the same passes are reached through
registered operators, so that `fullgraph=True` compiles.
"""

import torch

from . import _switch, passes
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
from ._operators import empty_for_none, none_for_empty
from ._replay import replay
from .keep import run_once
from .layout import count_chunks, scratch_layout
from .limits import CHUNK, MAX_CHUNKS
from .plan import explain as explain_plan
from .plan import is_aligned, make_plan


__all__ = ["chunk_delta_rule", "chunk_gated_delta_rule", "explain"]


class _ChunkDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, h0, cu_seqlens, g, numbers):
        save = any(ctx.needs_input_grad)
        o, ht, plan, memory, phi = run_once(passes.forward, (*numbers, save), (q, k, v, beta, h0, cu_seqlens, g))
        ctx.save_for_backward(q, k, beta, h0, cu_seqlens, g, memory, phi)
        ctx.plan, ctx.numbers = plan, numbers[:2]
        ctx.set_materialize_grads(False)
        return o, ht

    @staticmethod
    def backward(ctx, do, dht):
        q, k, beta, h0, cu_seqlens, g, memory, phi = ctx.saved_tensors
        if do is None:
            do = q.new_zeros(*beta.shape, ctx.plan.call.V)
        tensors = q, k, beta, h0, cu_seqlens, g, do, dht, memory, phi
        *grads, dg = replay(passes.backward, (ctx.plan, *ctx.numbers), tensors)
        return *grads, None, dg, None


# ------------------------------------------------------------------------------------------- torch.library operators


@torch.library.custom_op("deltanet_kernels::chunk_forward", mutates_args=())
def _forward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, h0: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, g: torch.Tensor | None, scale: float, l2norm: bool, final: bool, save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    tensors = q, k, v, beta, h0, cu_seqlens, g
    o, ht, _, memory, phi = replay(passes.forward, (scale, l2norm, final, save), tensors)
    ht, phi = empty_for_none(q, ht, phi)
    return o, ht, q.new_empty(0, dtype=torch.uint8) if memory is None else memory, phi


@_forward_op.register_fake
def _(q, k, v, beta, h0, cu_seqlens, g, scale, l2norm, final, save):
    B, T, _, K = k.shape
    HV, V = v.shape[2:]
    plan = make_plan(q, k, v, beta, cu_seqlens, save, gated=g is not None, aligned=True)  # on which no size depends
    s = plan.segments_backward
    size = scratch_layout(plan, l2norm, True, count_chunks(B, T, cu_seqlens))[1] if save else 0
    return (
        v.new_empty(B, T, HV, V),
        q.new_empty((plan.call.sequences, HV, K, V) if final else (0,), dtype=torch.float32),
        k.new_empty(size, dtype=torch.uint8),
        k.new_empty((B * s, HV, K, K) if save and s > 1 else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("deltanet_kernels::chunk_in_pool", mutates_args={"pool"})
def _pool_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, pool: torch.Tensor,
    cu_seqlens: torch.Tensor | None, g: torch.Tensor | None, state_indices: torch.Tensor,
    has_initial_state: torch.Tensor | None, scale: float, l2norm: bool,
) -> torch.Tensor:  # fmt: skip
    tensors = q, k, v, beta, pool, cu_seqlens, g, state_indices, has_initial_state
    return replay(passes.forward, (scale, l2norm, False, False), tensors)[0]


@_pool_op.register_fake
def _(q, k, v, beta, pool, cu_seqlens, g, state_indices, has_initial_state, scale, l2norm):
    return v.new_empty(v.shape)


@torch.library.custom_op("deltanet_kernels::chunk_backward", mutates_args=())
def _backward_op(
    q: torch.Tensor, k: torch.Tensor, beta: torch.Tensor, h0: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    g: torch.Tensor | None, do: torch.Tensor, dht: torch.Tensor | None, memory: torch.Tensor,
    phi: torch.Tensor | None, scale: float, l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    # an operator takes no plan: of the same tensors it is made again, the same
    aligned = is_aligned(q, k)
    plan = make_plan(q, k, do, beta, cu_seqlens, True, gated=g is not None, cut=phi is not None, aligned=aligned)
    tensors = q, k, beta, h0, cu_seqlens, g, do, dht, memory, phi
    *grads, dh0, dg = replay(passes.backward, (plan, scale, l2norm), tensors)
    return *grads, *empty_for_none(q, dh0, dg)


@_backward_op.register_fake
def _(q, k, beta, h0, cu_seqlens, g, do, dht, memory, phi, scale, l2norm):
    like = [None if x is None else x.new_empty(x.shape) for x in (q, k, do, beta, h0, g)]
    return *like[:4], *empty_for_none(q, *like[4:])


def _setup_context(ctx, inputs, output):
    q, k, v, beta, h0, cu_seqlens, g, ctx.scale, ctx.l2norm, _, _ = inputs
    _, _, memory, phi = output
    ctx.v_size = v.shape[3]
    ctx.save_for_backward(q, k, beta, h0, cu_seqlens, g, memory, phi if phi.dim() > 1 else None)


def _backward_of_op(ctx, do, dht, *_):
    q, k, beta, h0, cu_seqlens, g, memory, phi = ctx.saved_tensors
    assert memory.numel() > 0 or q.numel() == 0, "forward was told to keep nothing for backward"
    do = q.new_zeros(*beta.shape, ctx.v_size) if do is None else do
    dht = None if dht is None or dht.numel() == 0 else dht
    *grads, dh0, dg = _backward_op(q, k, beta, h0, cu_seqlens, g, do, dht, memory, phi, ctx.scale, ctx.l2norm)
    dh0, dg = none_for_empty(h0 is not None, dh0), none_for_empty(g is not None, dg)
    return *grads, dh0, None, dg, None, None, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)


# ------------------------------------------------------------------------------------------------- public functions


def _in_parts(q, k, v, beta, g, scale, state, final, l2norm, cu_seqlens, slots, goes_on):
    """More chunks than a grid takes, 4.2 M tokens: some rows at a time, or of a single row some tokens at a time."""
    if cu_seqlens is not None:
        raise ValueError(
            f"a call takes T / {CHUNK} + N = {MAX_CHUNKS} at most for N packed sequences of T tokens, "
            f"got N = {cu_seqlens.shape[0] - 1} and T = {q.shape[1]}: pack fewer"
        )
    B, T = q.shape[:2]

    def part(rows, state, final, slots, goes_on):
        inputs = (None if x is None else x[rows] for x in (q, k, v, beta, g))
        return _chunked(*inputs, scale, state, final, l2norm, None, slots, goes_on)

    if B > 1:
        step = max(1, MAX_CHUNKS // -(-T // CHUNK))
        rows = [slice(b, b + step) for b in range(0, B, step)]
        if slots is None:
            parts = [part(b, None if state is None else state[b], final, None, None) for b in rows]
            return torch.cat([o for o, _ in parts]), torch.cat([s for _, s in parts]) if final else None
        parts = [part(b, state, final, slots[b], None if goes_on is None else goes_on[b]) for b in rows]
        return torch.cat([o for o, _ in parts]), state if final else None
    outputs, tokens = [], MAX_CHUNKS * CHUNK
    for t in range(0, T, tokens):
        o, state = part((slice(None), slice(t, t + tokens)), state, True, slots, goes_on)
        outputs.append(o)
        goes_on = None  # from here on all do
    return torch.cat(outputs, 1), state if final else None


def chunk_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    head_first: bool = False,
    chunk_size: int | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule, chunk by chunk (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule").

        S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T        o_t = scale * S_t^T q_t

    Args:
        q, k: `[B, T, H, K]`, bf16, fp16 or fp32, K at most 256. Any strides, the last dimension contiguous.
        v: `[B, T, HV, V]`, dtype of q. HV is a multiple of H: value head j reads key head `j // (HV // H)`.
        beta: `[B, T, HV]`, the step size, in [0, 2] for normalised keys. Any floating dtype.
        scale: of the queries; default `K ** -0.5`.
        initial_state: `[N, HV, K, V]` fp32, or bf16 or fp16, which are converted (the gradient comes back in its
            dtype), or None for zeros. N is B, or the number of packed sequences.
        output_final_state: whether to return the state after the last token, `[N, HV, K, V]` fp32.
        use_qk_l2norm_in_kernel: q and k are divided by `sqrt(sum(x^2) + 1e-6)`, without a copy of either.
        cu_seqlens: `[N + 1]` int32 or int64 on the device of q: borders of sequences packed along T, with B = 1.
            Empty sequences are allowed. The borders are not read by the host, which would wait for the GPU: none may
            go back or lie beyond T (`DELTANET_KERNELS=check` looks). Tokens outside of all sequences, before the first
            border or after the last, give zeros and get zero gradients.
        cu_seqlens_cpu, head_first, chunk_size: of flash-linear-attention's function. They change nothing here;
            `head_first=True` is refused.
        state_indices: `[N]` int32 or int64 on the device, for servers: `initial_state` is a pool
            `[slots, HV, K, V]` fp32 of any strides (for one of `[slots, HV, V, K]` pass `pool.mT`), in which the state
            of sequence n has the place `state_indices[n]`. It is read there, and the final state takes its place; no
            gradients. A sequence of -1 is padding: nothing is read or written, and its o is zero. The host does not
            read the indices: none may lie outside of the pool, and of two sequences with the same one it is left open
            what either reads and which state stays (`DELTANET_KERNELS=check` looks for both). Sequences cut into
            segments copy the states, by one small kernel each way.
        has_initial_state: `[N]` bool beside state_indices: False where a sequence starts from zeros, whatever its
            place in the pool holds. All go on from it by default.

    Returns:
        `(o, final_state)`: o `[B, T, HV, V]` in v's dtype; final_state is None unless asked for, and with
        state_indices the pool. All gradients are defined, that of initial_state and the one coming in on final_state
        included, and two runs are bit-equal.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above; says what came and what was wanted.
    """
    refuse_transforms("chunk_delta_rule")
    check_device(q, "delta_rule.torch_chunk_delta_rule")
    check_layout(head_first, chunk_size)
    options = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    return _chunked(q, k, v, beta, None, *options, state_indices, has_initial_state)


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    head_first: bool = False,
    chunk_size: int | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule, chunk by chunk (Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks"): the memory fades
    before it is read and written.

        S_t = S~_t + k_t (beta_t (v_t - S~_t^T k_t))^T        S~_t = exp(g_t) S_{t-1}        o_t = scale * S_t^T q_t

    Args:
        g: `[B, T, HV]`, the log of the decay, at most 0, any floating dtype; summed in fp32.
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, state_indices,
            has_initial_state: as in `chunk_delta_rule`.
        cu_seqlens_cpu, head_first, chunk_size: of flash-linear-attention's function. They change nothing here;
            `head_first=True` is refused.

    Returns:
        `(o, final_state)`, as `chunk_delta_rule` returns them; the gradient of g is defined, too.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above; says what came and what was wanted.
    """
    refuse_transforms("chunk_gated_delta_rule")
    check_device(q, "delta_rule.torch_chunk_delta_rule")
    check_layout(head_first, chunk_size)
    options = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    return _chunked(q, k, v, beta, g, *options, state_indices, has_initial_state)


def _chunked(q, k, v, beta, g, scale, initial_state, final, l2norm, cu_seqlens, slots, goes_on):
    """The rule with g, or without (None); with `slots` for states in a pool."""
    compiling, pooled = torch.compiler.is_compiling(), slots is not None
    if pooled:
        refuse_gradients("the chunked rule with state_indices", q, k, v, beta, g, initial_state)
    else:
        initial_state = as_state(initial_state)
    if _switch.CHECKS:
        tensors = {"q": q, "k": k, "v": v, "beta": beta, "g": g, "initial_state": initial_state}
        if pooled:
            check_arguments(q, k, v, beta, scale, initial_state, cu_seqlens, g, slots, goes_on)
            tensors["initial_state"] = check_indices(initial_state, slots, goes_on)
        check_values(tensors, cu_seqlens, q.shape[1])
    if compiling:
        scale = check_arguments(q, k, v, beta, scale, initial_state, cu_seqlens, g, slots, goes_on)
    elif scale is not None:
        scale = float(scale)
    if initial_state is not None and not pooled:
        initial_state = initial_state.contiguous()
    if g is not None:
        g = g.contiguous()
    if count_chunks(*q.shape[:2], cu_seqlens) > MAX_CHUNKS:
        return _in_parts(q, k, v, beta, g, scale, initial_state, final, l2norm, cu_seqlens, slots, goes_on)
    numbers, tensors = (scale, l2norm, final), (q, k, v, beta, initial_state, cu_seqlens, g)
    if pooled and compiling:
        o, ht = _pool_op(*tensors, slots, goes_on, scale, l2norm), initial_state
    elif pooled or goes_on is not None:
        numbers = scale, l2norm, False, False
        o, ht = replay(passes.forward, numbers, (*tensors, slots, goes_on))[0], initial_state
    elif compiling:
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        o, ht, *_ = _forward_op(*tensors, *numbers, save)
    elif torch.is_grad_enabled():
        o, ht = _ChunkDeltaRule.apply(*tensors, numbers)
    else:
        o, ht, *_ = replay(passes.forward, (*numbers, False), tensors)
    return o, ht if final else None


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    g: torch.Tensor | None = None,
) -> str:
    """Which kernels `chunk_delta_rule` launches for these arguments, or `chunk_gated_delta_rule` with g, with which
    tiles, and why: a line per kernel.

    Gradients count as asked for where they may be: under `torch.no_grad` the answer is that of a forward without them.
    """
    return explain_plan(make_plan(q, k, v, beta, cu_seqlens, torch.is_grad_enabled(), gated=g is not None))
