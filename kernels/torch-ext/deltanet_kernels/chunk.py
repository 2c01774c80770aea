"""`chunk_delta_rule`: the public function, its autograd function and its torch.library operators.

Eager calls go through a plain autograd function, which costs less time on the host than an operator's dispatch (at
batch 1 and 4096 tokens the host is what one waits for); under torch.compile the same launchers are reached through
registered operators, so that `fullgraph=True` passes. Legend as in `chunk_forward.py`.
"""

import collections
import threading

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from . import _switch, chunk_backward, chunk_forward, configs, segments
from ._ahead import compile_ahead
from ._checks import as_state, check_arguments, check_device, check_layout, check_values
from ._replay import replay
from ._transforms import refuse_transforms
from .limits import MAX_CHUNKS


__all__ = ["chunk_delta_rule", "keep_results", "keep_results_compiled"]

SEGMENTS = _switch.uses("segments")


def _plan(
    q: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, backward: bool
) -> tuple[configs.Plan, int, int]:
    """The launch table's line for this call, which backward may follow, and the numbers of segments that forward and backward
    cut a sequence into: the latter's are the former's, or one.
    """
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    arch, sms = configs.arch_of(q.device.index), configs.multiprocessors(q.device.index)
    n = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = q.dtype != torch.bfloat16
    block_v = configs.plan(arch, K, V, wide, False).scan.block_v
    blocks = -(-V // block_v)
    s = segments.count(B, T, HV, K, blocks, sms, backward) if cu_seqlens is None and SEGMENTS else 1
    plan = configs.plan(arch, K, V, wide, n * s * HV * blocks <= sms)
    return plan, s, s if s > 1 and segments.cuts_backward(T, K, B * HV * blocks, sms, plan.beside) else 1


def _forward(scale: float | None, l2norm: bool, final: bool, save: bool, q, k, v, beta, h0, cu_seqlens) -> list:
    """o, the final state or None, and with `save` what backward reads: the memory of the scratch, and Phi or None; else two
    more None.
    """
    # here, and so not again where a call is played that has been checked
    scale = check_arguments(q, k, v, beta, scale, h0, cu_seqlens)
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    plan, s, s_backward = _plan(q, v, cu_seqlens, save)
    if s > 1 and not segments.can_cut(q, k, v, beta):
        s = 1
    whole = q, k, None, beta, h0, cu_seqlens
    o = v.new_empty(B, T, HV, V)
    if s > 1:
        q, k, v, beta = (segments.cut(x, s) for x in (q, k, v, beta))
        t = segments.tables(B, T, s, k.device)
    else:
        t = chunk_forward.tables(B, T, cu_seqlens, (o,))
    memory, scratch = chunk_forward.new_scratch(k, v, l2norm, save, t.n_chunks, plan)
    phi = k.new_empty(t.n, HV, K, K, dtype=torch.float32) if s > 1 else None
    kept = phi if s_backward > 1 else None
    ht = k.new_empty(t.n, HV, K, V, dtype=torch.float32) if final else None
    ahead = compile_ahead(_backward, (scale, l2norm), (*whole, o, None, memory, kept)) if save else None
    chunk_forward.prepare(q, k, beta, scale, scratch, t, plan)
    if s > 1:
        h0 = segments.entry_states(k, v, scratch, h0, phi, scale, t, plan, s)
    part = segments.cut(o, s) if s > 1 else o
    chunk_forward.scan(q, k, v, scratch, h0, scale, t, plan, o=part, ht=ht)
    if ahead is not None:
        ahead.join()
    if s > 1 and final:
        ht = ht[s - 1 :: s].contiguous()
    return [o, ht, memory, kept] if save else [o, ht, None, None]


def _contiguous_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Half of what `x.new_empty(x.shape)` takes on the host, where the shape is turned into numbers and back."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _scratch_like(do: torch.Tensor) -> torch.Tensor:
    """For dv, which `grads` reads back."""
    return _contiguous_like(do, chunk_forward.scratch_type(do.dtype))


def _gradients_like(q, k, beta, do) -> list:
    """dq, dk, dv and dbeta, to be written."""
    return [_contiguous_like(q), _contiguous_like(k), _scratch_like(do), _contiguous_like(beta)]


def _backward(scale: float | None, l2norm: bool, q, k, v, beta, h0, cu_seqlens, do, dht, memory, phi) -> list:
    """dq, dk, dv, dbeta, dh0. `memory` and `phi` as `_forward` gave them; without, all is computed again, heads in slices.

    Only then is v read; else it may be None.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if do.stride(-1) != 1:
        do = do.contiguous()
    if dht is not None:
        dht = dht.contiguous()
    dh0 = None if h0 is None else _contiguous_like(h0)
    plan, _, s = _plan(q, do, cu_seqlens, True)
    ins = q, k, beta, do
    if memory is not None:
        n_chunks = chunk_forward.count_chunks(*q.shape[:2], cu_seqlens)
        layout, _ = chunk_forward.scratch_layout(k, do, l2norm, True, n_chunks, plan)
        scratch = chunk_forward.scratch_in(memory, layout)
    if phi is not None:
        # only do can have such strides that it cannot be cut
        parts = [segments.cut(x if segments.can_cut(x) else x.contiguous(), s) for x in ins]
        t = segments.tables(*q.shape[:2], s, q.device)
        dht = segments.exit_gradients(parts[0], parts[1], parts[3], scratch, phi, dht, scale, t, plan, s)
        part = None if h0 is None else dht.new_empty(dht.shape)
        out = _gradients_like(*ins)
        _gradients(parts, scratch, dht, part, scale, t, plan, [segments.cut(x, s) for x in out])
        if h0 is not None:
            dh0.copy_(part[::s])
    elif memory is not None:
        # packed, what lies outside of all sequences is zeroed by the launch that makes the tables
        out = None if cu_seqlens is None else _gradients_like(*ins)
        t = chunk_forward.tables(*q.shape[:2], cu_seqlens, out or ())
        out = _gradients(ins, scratch, dht, dh0, scale, t, plan, out)
    else:
        plan = plan._replace(stored=True)  # a scan without output computes neither P nor the norms of q
        out = _gradients_like(*ins)
        t = chunk_forward.tables(*q.shape[:2], cu_seqlens, out)
        H, HV = q.shape[2], v.shape[2]
        slices = next(i for i in (4, 3, 2, 1) if H % i == 0)
        for i in range(slices):
            hs, vs = slice(i * H // slices, (i + 1) * H // slices), slice(i * HV // slices, (i + 1) * HV // slices)
            part = [x[:, :, h] for x, h in zip(ins, (hs, hs, vs, vs), strict=True)]
            _, scratch = chunk_forward.new_scratch(part[1], part[3], l2norm, True, t.n_chunks, plan)
            chunk_forward.prepare(*part[:3], scale, scratch, t, plan)
            chunk_forward.scan(
                part[0], part[1], v[:, :, vs], scratch, None if h0 is None else h0[:, vs].contiguous(), scale, t, plan
            )  # fmt: skip
            _gradients(
                part, scratch, None if dht is None else dht[:, vs], None if dh0 is None else dh0[:, vs],
                scale, t, plan, [x[:, :, h] for x, h in zip(out, (hs, hs, vs, vs), strict=True)],
            )  # fmt: skip
    dq, dk, dv, dbeta = out
    return [dq, dk, dv if dv.dtype == do.dtype else dv.to(do.dtype), dbeta, dh0]


def _replay_backward(numbers: tuple, tensors: tuple) -> list:
    """`_backward`, but for `recompute` not from a tape, which would hold the scratch of all slices of heads at once."""
    *_, memory, _ = tensors
    return _backward(*numbers, *tensors) if memory is None else replay(_backward, numbers, tensors)


def _gradients(ins, scratch, dht, dh0, scale, t, plan, out=None):
    """dq, dk, dv and dbeta, written to `out` where it is given."""
    q, k, beta, do = ins
    dv = _scratch_like(do) if out is None else out[2]
    ds, flags = chunk_backward.reverse(q, k, do, scratch, dht, dv, dh0, scale, t, plan)
    # allocated while the reverse scan runs, since at batch 1 the GPU waits for the host
    dq, dk, _, dbeta = out or [_contiguous_like(q), _contiguous_like(k), dv, _contiguous_like(beta)]
    chunk_backward.grads(q, k, do, scratch, dv, ds, flags, dq, dk, dbeta, scale, t, plan)
    return dq, dk, dv, dbeta


class _Here(threading.local):
    run = None


class _Run:
    """Context of a checkpointed region's first run, which leaves the rule's results in `kept`, or of its second."""

    here = _Here()  # backward has threads of its own

    def __init__(self, kept: collections.deque, again: bool):
        self.kept, self.again = kept, again

    def __enter__(self):
        self.outer = self.here.run
        self.here.run = self

    def __exit__(self, *error):
        self.here.run = self.outer


def _forward_once(numbers: tuple, tensors: tuple) -> list:
    """`_forward`, but from what the first run kept where a region runs a second time (see `keep_results`)."""
    run = _Run.here.run
    if run is not None and run.again and run.kept:  # a third run, of a retained graph, finds nothing left
        return run.kept.popleft()
    results = replay(_forward, numbers, tensors)
    if run is not None and not run.again:
        # detached: autograd hangs its graph on the tensors that it is given, and that graph holds `kept`
        run.kept.append([None if x is None else x.detach() for x in results])
    return results


class _ChunkDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, h0, cu_seqlens, numbers, recompute):
        save = not recompute and any(ctx.needs_input_grad)
        o, ht, memory, phi = _forward_once((*numbers, save), (q, k, v, beta, h0, cu_seqlens))
        ctx.save_for_backward(q, k, None if save else v, beta, h0, cu_seqlens, memory, phi)
        ctx.numbers, ctx.v_size = numbers[:2], v.shape[3]
        ctx.set_materialize_grads(False)
        return o, ht

    @staticmethod
    def backward(ctx, do, dht):
        q, k, v, beta, h0, cu_seqlens, memory, phi = ctx.saved_tensors
        if do is None:
            do = q.new_zeros(*beta.shape, ctx.v_size)
        tensors = q, k, v, beta, h0, cu_seqlens, do, dht, memory, phi
        return *_replay_backward(ctx.numbers, tensors), None, None, None


# ------------------------------------------------------------------------------------------- torch.library operators


@torch.library.custom_op("deltanet_kernels::chunk_forward", mutates_args=())
def _forward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, h0: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, l2norm: bool, final: bool, save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    o, ht, memory, phi = replay(_forward, (scale, l2norm, final, save), (q, k, v, beta, h0, cu_seqlens))
    # an operator returns no None
    ht, phi = [q.new_empty(0, dtype=torch.float32) if x is None else x for x in (ht, phi)]
    return o, ht, q.new_empty(0, dtype=torch.uint8) if memory is None else memory, phi


@_forward_op.register_fake
def _(q, k, v, beta, h0, cu_seqlens, scale, l2norm, final, save):
    B, T, _, K = k.shape
    HV, V = v.shape[2:]
    n = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    plan, _, s = _plan(q, v, cu_seqlens, save)
    n_chunks = chunk_forward.count_chunks(B, T, cu_seqlens)
    size = chunk_forward.scratch_layout(k, v, l2norm, True, n_chunks, plan)[1] if save else 0
    has_phi = save and s > 1 and segments.can_cut(q, k, v, beta)
    return (
        v.new_empty(B, T, HV, V),
        q.new_empty((n, HV, K, V) if final else (0,), dtype=torch.float32),
        k.new_empty(size, dtype=torch.uint8),
        k.new_empty((B * s, HV, K, K) if has_phi else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("deltanet_kernels::chunk_backward", mutates_args=())
def _backward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, beta: torch.Tensor, h0: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, do: torch.Tensor, dht: torch.Tensor | None, memory: torch.Tensor | None,
    phi: torch.Tensor | None, scale: float, l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    *grads, dh0 = _replay_backward((scale, l2norm), (q, k, v, beta, h0, cu_seqlens, do, dht, memory, phi))
    return *grads, q.new_empty(0, dtype=torch.float32) if dh0 is None else dh0


@_backward_op.register_fake
def _(q, k, v, beta, h0, cu_seqlens, do, dht, memory, phi, scale, l2norm):
    dh0 = q.new_empty(0, dtype=torch.float32) if h0 is None else h0.new_empty(h0.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), do.new_empty(do.shape), beta.new_empty(beta.shape), dh0


def _setup_context(ctx, inputs, output):
    q, k, v, beta, h0, cu_seqlens, ctx.scale, ctx.l2norm, _, save = inputs
    _, _, memory, phi = output
    ctx.v_size = v.shape[3]
    if save:
        ctx.save_for_backward(q, k, None, beta, h0, cu_seqlens, memory, phi if phi.dim() > 1 else None)
    else:
        ctx.save_for_backward(q, k, v, beta, h0, cu_seqlens, None, None)


def _backward_of_op(ctx, do, dht, *_):
    q, k, v, beta, h0, cu_seqlens, memory, phi = ctx.saved_tensors
    do = q.new_zeros(*beta.shape, ctx.v_size) if do is None else do
    dht = None if dht is None or dht.numel() == 0 else dht
    *grads, dh0 = _backward_op(q, k, v, beta, h0, cu_seqlens, do, dht, memory, phi, ctx.scale, ctx.l2norm)
    return *grads, None if h0 is None else dh0, None, None, None, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)


# ------------------------------------------------------------------------------------------------- public functions


def keep_results() -> tuple[_Run, _Run]:
    """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=keep_results)`.

    Backward then computes the region again, but for `chunk_delta_rule`, whose output, A, U and states are kept: 4.5
    tensors of v's size for heads of 128.

    Not `create_selective_checkpoint_contexts`, which intercepts every operator of the region in Python: on the host a layer
    of a model took 5.2 ms forward and backward, 2.9 with this and with plain checkpointing, 1.8 without (kernels stubbed).
    """
    kept = collections.deque()
    return _Run(kept, again=False), _Run(kept, again=True)


def keep_results_compiled():
    """The same where `torch.compile` traces the region: it marks the operators, which costs nothing at run time.

    Matrix products are not computed again either. Eager, backward stops before it would come to the last one.
    """
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    # rsqrt: a norm's, 2 MB a layer; computed again, Inductor makes a kernel of its own of the norm's weight gradient
    is_kept = operator.name() in ("deltanet_kernels::chunk_forward", "aten::mm", "aten::addmm", "aten::rsqrt")
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _in_parts(q, k, v, beta, scale, state, final, l2norm, cu_seqlens, recompute):
    """More chunks than a grid takes, 4.2 M tokens: some rows at a time, or of a single row some tokens at a time."""
    if cu_seqlens is not None:
        raise ValueError(
            f"a call takes T / {configs.CHUNK} + N = {MAX_CHUNKS} at most for N packed sequences of T tokens, "
            f"got N = {cu_seqlens.shape[0] - 1} and T = {q.shape[1]}: pack fewer"
        )
    B, T = q.shape[:2]
    options = {"scale": scale, "use_qk_l2norm_in_kernel": l2norm, "recompute": recompute}
    if B > 1:
        rows = max(1, MAX_CHUNKS // -(-T // configs.CHUNK))
        parts = [
            chunk_delta_rule(
                *(x[b : b + rows] for x in (q, k, v, beta)), initial_state=None if state is None else state[b : b + rows],
                output_final_state=final, **options,
            )
            for b in range(0, B, rows)
        ]  # fmt: skip
        return torch.cat([o for o, _ in parts]), torch.cat([s for _, s in parts]) if final else None
    outputs, tokens = [], MAX_CHUNKS * configs.CHUNK
    for t in range(0, T, tokens):
        o, state = chunk_delta_rule(
            *(x[:, t : t + tokens] for x in (q, k, v, beta)), initial_state=state, output_final_state=True, **options
        )
        outputs.append(o)
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
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule, chunk by chunk (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule").

        S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T        o_t = scale * S_t^T q_t

    Args:
        q, k: `[B, T, H, K]`, bf16, fp16 or fp32, K at most 256. Any strides, the last dimension contiguous.
        v: `[B, T, HV, V]`, dtype of q. HV is a multiple of H: value head j reads key head `j // (HV // H)`.
        beta: `[B, T, HV]`, the step size, in [0, 2] for normalised keys. Any floating dtype.
        scale: of the queries; default `K ** -0.5`.
        initial_state: `[N, HV, K, V]` fp32, or bf16 or fp16, which are converted (the gradient comes back in its dtype), or
            None for zeros. N is B, or the number of packed sequences.
        output_final_state: whether to return the state after the last token, `[N, HV, K, V]` fp32.
        use_qk_l2norm_in_kernel: q and k are divided by `sqrt(sum(x^2) + 1e-6)`, without a copy of either.
        cu_seqlens: `[N + 1]` int32 or int64 on the device of q: borders of sequences packed along T, with B = 1.
            Empty sequences are allowed. The borders are not read by the host, which would wait for the GPU: none may go
            back or lie beyond T (`DELTANET_KERNELS=check` looks). Tokens outside of all sequences, before the first border
            or after the last, give zeros and get zero gradients.
        cu_seqlens_cpu, head_first, chunk_size: of flash-linear-attention's function. They change nothing here;
            `head_first=True` is refused.
        recompute: keep only the inputs for backward and compute the rest again, a slice of heads at a time: 0.6 of the
            extra memory for twice the time; on one long sequence, which is then not cut into segments, 4 to 5 times.

    Returns:
        `(o, final_state)`: o `[B, T, HV, V]` in v's dtype; final_state is None unless asked for. All gradients are
        defined, that of initial_state and the one coming in on final_state included, and two runs are bit-equal.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above; says what came and what was wanted.
    """
    refuse_transforms("chunk_delta_rule")
    compiling = torch.compiler.is_compiling()
    check_device(q, "delta_rule.torch_chunk_delta_rule")
    check_layout(head_first, chunk_size)
    if _switch.CHECKS:
        check_values({"q": q, "k": k, "v": v, "beta": beta, "initial_state": initial_state}, cu_seqlens, q.shape[1])
    initial_state = as_state(initial_state)
    if compiling:
        scale = check_arguments(q, k, v, beta, scale, initial_state, cu_seqlens)
    elif scale is not None:
        scale = float(scale)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if chunk_forward.count_chunks(*q.shape[:2], cu_seqlens) > MAX_CHUNKS:
        return _in_parts(
            q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, recompute
        )
    numbers = scale, use_qk_l2norm_in_kernel, output_final_state
    if compiling:
        save = (
            not recompute
            and torch.is_grad_enabled()
            and any(x is not None and x.requires_grad for x in (q, k, v, beta, initial_state))
        )
        o, ht, *_ = _forward_op(q, k, v, beta, initial_state, cu_seqlens, *numbers, save)
    elif torch.is_grad_enabled():
        o, ht = _ChunkDeltaRule.apply(q, k, v, beta, initial_state, cu_seqlens, numbers, recompute)
    else:
        o, ht, *_ = replay(_forward, (*numbers, False), (q, k, v, beta, initial_state, cu_seqlens))
    return o, ht if output_final_state else None
