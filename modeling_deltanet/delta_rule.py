"""The delta rule: a fixed-size memory S that, before it stores a value under a key, subtracts what the key retrieves.

    S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T          o_t = S_t^T (scale * q_t)

The gated rule (Yang, Kautz, Hatamizadeh 2024: "Gated Delta Networks") lets the memory fade first: exp(g_t) S_{t-1}
stands in place of S_{t-1}, with g_t <= 0.

`torch_recurrent_delta_rule` runs it token by token, as published in 2021 (Schlag, Irie, Schmidhuber: "Linear
Transformers Are Secretly Fast Weight Programmers"). `torch_chunk_delta_rule` computes the same in chunks of C tokens
through matrix products, as published in 2024 (Yang, Wang, Zhang, Shen, Kim: "Parallelizing Linear Transformers with
the Delta Rule over Sequence Length"). `delta_rule` is what the model calls: the Triton kernels on a GPU, these two
functions elsewhere.

Letters: B batch, T time, H key heads, HV value heads (a multiple of H), K and V head sizes, C chunk, N sequences.
"""

import warnings

import torch
import torch.nn.functional as F

from .kernel_switch import LIMITS, is_transformed, kernels_for


# Tokens per chunk, as in the paper and in the GPU kernels. Forward + backward on two CPU cores, (B, T, H, D) = (1,
# 2048, 8, 64): 39 ms in chunks of 32, which keep twice as many states; 47 ms in 64; 60 ms in 128
# (2eed96d, 2026-11-24).
CHUNK_SIZE = 64
# Below this many tokens the recurrence is faster on a CPU: 0.07 ms against 0.13 at T = 1, even at T = 3 (8 heads of
# 64).
SHORT_SEQUENCE = 4
# More than models have: a time axis, rather. (fla warned of more heads than tokens, which a short prompt has, too.)
MANY_HEADS = 256
SMALL_STEP = 2.0**-28  # the least that the kernels take
L2_NORM_EPS = 1e-6  # as the kernels' limits.NORM_EPS, which need not be installed


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    g: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rule by the fastest route that this machine has; arguments and results as in `torch_chunk_delta_rule`."""
    kernels = None if is_transformed() else kernels_for(v, _too_large(q, v))
    options = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    if kernels is not None:
        if g is None:
            return kernels.chunk_delta_rule(q, k, v, beta, *options)
        return kernels.chunk_gated_delta_rule(q, k, v, g, beta, *options)
    is_short = not torch.compiler.is_exporting() and q.shape[1] < SHORT_SEQUENCE
    rule = torch_recurrent_delta_rule if is_short else torch_chunk_delta_rule
    return rule(q, k, v, beta, *options, g=g)


def delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    g: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token of decoding, T = 1, without gradients: returns o and moves `state` `[B, HV, K, V]` on in place."""
    kernels = kernels_for(v, _too_large(q, v))
    if kernels is not None:
        if g is None:
            return kernels.delta_rule_step(q, k, v, beta, state, scale, use_qk_l2norm_in_kernel)
        return kernels.gated_delta_rule_step(q, k, v, g, beta, state, scale, use_qk_l2norm_in_kernel)
    o, new_state = torch_recurrent_delta_rule(q, k, v, beta, scale, state, True, use_qk_l2norm_in_kernel, g=g)
    state.copy_(new_state)
    return o


def additive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments with which the delta rule only adds, S_t = S_{t-1} + k_t (beta_t v_t)^T: the plain linear transformer.

    It is the rule's limit for small steps: step (v / step - S^T k) = v - step S^T k. At 2^-28 a text of T tokens loses
    T / 2^28 of what it has written, and a power of two changes no digit of v. fp16, which has no room for v / step,
    becomes fp32.
    """
    if v.dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    return q, k, v * (beta.to(v.dtype) / SMALL_STEP).unsqueeze(-1), torch.full_like(beta, SMALL_STEP, dtype=v.dtype)


def _too_large(q: torch.Tensor, v: torch.Tensor) -> str | None:
    sizes = q.shape[-1], v.shape[-1]
    if LIMITS is None or max(sizes) <= LIMITS.MAX_HEAD_SIZE:
        return None
    return f"heads larger than {LIMITS.MAX_HEAD_SIZE}, got {sizes}"


def torch_chunk_delta_rule(
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
    g: torch.Tensor | None = None,
    head_first: bool = False,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule in chunks: O(T) time, sequential only over T / 64 chunks. Differentiable in every tensor.

    Args:
        q, k: queries and keys, `[B, T, H, K]`, in one floating dtype with `v`.
        v: values, `[B, T, HV, V]`; value head g is addressed by key head `g // (HV / H)`.
        beta: step sizes in [0, 2], `[B, T, HV]`, any floating dtype. Above 1 they give negative eigenvalues.
        scale: factor on the queries, `K ** -0.5` by default.
        initial_state: memory before the first token, `[N, HV, K, V]` in fp32 (fp64 for fp64 inputs) or a narrower
            dtype, which is converted; zeros by default.
        output_final_state: also return the memory after the last token.
        use_qk_l2norm_in_kernel: divide each query and key by its L2 norm first (1e-6 is added to the squared norm).
        cu_seqlens: borders of N packed sequences, int `[N + 1]`, from 0 to T; needs B = 1. Without it, N = B. A border
            may repeat: such a sequence is empty and its final state is its initial one.
        cu_seqlens_cpu, head_first, chunk_size: of flash-linear-attention's function. They change nothing here;
            `head_first=True` is refused.
        g: the gated rule's decay, log alpha, `[B, T, HV]`, at most 0, any floating dtype; None for the rule without.

    Returns:
        `(o, final_state)`: o `[B, T, HV, V]` in v's dtype; final_state `[N, HV, K, V]` in fp32 (fp64 for fp64 inputs),
        or None unless asked for. All arithmetic is in that dtype.

    Raises:
        ValueError: a shape, dtype or border that does not fit, with what came and what was wanted.
    """
    _refuse_head_first(head_first)
    o_dtype = v.dtype
    q, k, v, beta, g, state, borders = _prepare(
        q, k, v, beta, g, scale, initial_state, use_qk_l2norm_in_kernel, cu_seqlens
    )
    B, T, HV, _ = v.shape
    with torch.autocast(q.device.type, enabled=False):  # fp32 must stay fp32 under a bf16 autocast
        tensors = q, k, v, beta.unsqueeze(-1), *(() if g is None else (g.unsqueeze(-1),))
        if torch.compiler.is_exporting() and isinstance(T, torch.SymInt):
            # A program for any length has no loop over chunks: the sequence is one, at a cost that grows with T cubed.
            chunked, chunk_borders, token_slots = [x.transpose(1, 2).flatten(0, 1) for x in tensors], [0, 1], None
        else:
            chunked, chunk_borders, token_slots = _cut(tensors, borders)
        q, k, v, beta, g = chunked if len(chunked) == 5 else (*chunked, None)
        rule = _transformable_chunk_delta_rule if is_transformed() else _ChunkDeltaRule.apply
        o, final_state = rule(q, k, v, beta, g, state, chunk_borders)
        # [n * B * HV, C, V] -> [B, T, HV, V]
        o = o.unflatten(0, (chunk_borders[-1], B, HV)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        o = o[:, :T] if token_slots is None else o[:, token_slots]
    return o.to(o_dtype, memory_format=torch.contiguous_format), final_state if output_final_state else None


class _ChunkDeltaRule(torch.autograd.Function):
    """The rule on tensors cut into chunks: q, k `[n * X, C, K]`, v `[n * X, C, V]`, beta and g `[n * X, C, 1]`, where
    X = B * HV. Without a gate (g is None) every factor of `_decays` is 1 and left out.

    Gradients are written out, not recorded, which is twice as fast on a CPU and keeps only S, U, W and two [C, C]
    matrices per chunk. In the formulas lower() keeps the diagonal and strict() does not; a product is one batched call
    over all chunks.
    """

    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial_state, chunk_borders):
        between, before, after = _decays(g)

        # 1. M = strict(diag(beta) K K^T): how far each token reads what earlier ones of its chunk wrote, as far as it
        # is left.
        KK = _times((k @ k.mT).tril_(-1), between)

        # 2. The product of the chunk's factors I - beta k k^T in its compact WY form, A = (I + M)^-1 diag(beta).
        identity = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
        A = torch.linalg.solve_triangular(beta * KK, identity, upper=False, unitriangular=True).mul_(beta.mT)
        W = A @ _times(k, before)

        # 3. From chunk to chunk: the pseudo values U = A (V - K S) = A V - W S, and the state S <- S + K^T U.
        U = A @ v
        S = v.new_empty(k.shape[0], k.shape[-1], v.shape[-1])
        written = _times(k, after)
        final_state = initial_state.clone(memory_format=torch.contiguous_format)  # the loop works on views of it
        for n, state in _chunks(final_state, chunk_borders):
            S[n] = state
            U[n].baddbmm_(W[n], state, alpha=-1)
            if g is not None:
                state.mul_(before[n, -1:])
            state.baddbmm_(written[n].mT, U[n])

        # 4. All outputs at once: O = Q S + lower(Q K^T) U. (Not in place: compiled by torch 2.11, an output that an
        # in-place call returned has no gradient.)
        o = torch.baddbmm(_times(q, before) @ S, _times((q @ k.mT).tril_(), between), U)
        ctx.save_for_backward(q, k, v, beta, g, KK, A, W, S, U)
        ctx.chunk_borders = chunk_borders
        return o, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dht):
        q, k, v, beta, g, KK, A, W, S, U = ctx.saved_tensors
        with torch.autocast(do.device.type, enabled=False):  # compiled, backward runs under the caller's autocast
            between, before, after = _decays(g)

            # Against time, dS being the gradient of the state that leaves a chunk:
            # dU = P^T dO + K dS, then dS <- dS + Q^T dO - W^T dU, for P = lower(Q K^T) and W^T = K^T A^T.
            P = _times((q @ k.mT).tril_(), between)
            dU = P.mT @ do
            dS = _times(q, before).mT @ do
            written = _times(k, after)
            d_state = dht.clone(memory_format=torch.contiguous_format)
            for n, state in _chunks(d_state, ctx.chunk_borders, reverse=True):
                dU[n].baddbmm_(written[n], state)
                kept = state if g is None else state * before[n, -1:]
                entering = (kept + dS[n]).baddbmm_(W[n].mT, dU[n], alpha=-1)
                dS[n] = state
                state.copy_(entering)

            # Chunk-parallel; R and F are the gradients of P and of strict(K K^T).
            dv = A.mT @ dU
            R, F = do @ U.mT, dv @ U.mT
            q_reads, k_reads, k_writes = do @ S.mT, dv @ S.mT, U @ dS.mT
            dg = None
            if g is not None:
                q_reads, k_reads, k_writes = q_reads * before, k_reads * before, k_writes * after
                # of exp(g_t): what goes from before t to t or later, in the chunk, into it, out of it and through it
                pairs = (R * P).sub_(F * KK).flip(-2).cumsum_(-2).flip(-2).tril_(-1).sum(-1, keepdim=True)
                reads = ((q * q_reads) - (k * k_reads)).sum(-1, keepdim=True)
                writes = (k * k_writes).sum(-1, keepdim=True)
                through = (S * dS).sum((-2, -1), keepdim=True) * before[:, -1:]
                dg = pairs + reads.flip(-2).cumsum(-2).flip(-2) + (writes.cumsum(-2) - writes) + through
            R, F = _times(R.tril_(), between), _times(F.tril_(-1), between)
            dq = q_reads.baddbmm_(R, k)
            dk = k_writes.sub_(k_reads).baddbmm_(R.mT, q)
            dk.baddbmm_(F + F.mT, k, alpha=-1)

            # E = V - K S - strict(K K^T) U is what each token found missing, U = beta E: no division by beta.
            E = torch.baddbmm(v, _times(k, before), S, alpha=-1).baddbmm_(KK, U, alpha=-1)
            dbeta = dU.baddbmm_(KK.mT, dv, alpha=-1).mul_(E).sum(-1, keepdim=True)
        return dq, dk, dv, dbeta, dg, d_state, None


def _decays(g: torch.Tensor | None):
    """What is left at token i of what token j wrote, `[.., C, C]`, of the entering state at token i, and of what token
    i wrote at the chunk's end, `[.., C, 1]` each; three times None without a gate.

    Sums of g over just the tokens between, not differences of sums from the start, in which a large g would leave
    nothing of those after it.
    """
    if g is None:
        return None, None, None
    C = g.shape[-2]
    between = g.expand(*g.shape[:-1], C).tril(-1).cumsum(-2).exp().tril()
    return between, g.cumsum(-2).exp(), between[..., -1, :].unsqueeze(-1)


def _times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return x if factor is None else x * factor


def _transformable_chunk_delta_rule(q, k, v, beta, g, initial_state, chunk_borders):
    """`_ChunkDeltaRule.forward` without its writing in place, for torch to differentiate in any direction and
    order.
    """
    between, before, after = _decays(g)
    identity = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    KK = _times((k @ k.mT).tril(-1), between)
    A = torch.linalg.solve_triangular(beta * KK + identity, identity, upper=False) * beta.mT
    W, U, written, read = A @ _times(k, before), A @ v, _times(k, after), _times(q, before)
    P = _times((q @ k.mT).tril(), between)
    sequences = [initial_state.flatten(0, 1)] if len(chunk_borders) == 2 else initial_state.unbind(0)
    outputs, final_states = [], []
    for state, first, last in zip(sequences, chunk_borders, chunk_borders[1:]):
        X = state.shape[0]
        for n in (slice(n * X, (n + 1) * X) for n in range(first, last)):
            u = U[n] - W[n] @ state
            outputs.append(read[n] @ state + P[n] @ u)
            state = (state if g is None else state * before[n, -1:]) + written[n].mT @ u
        final_states.append(state)
    return torch.cat(outputs), torch.cat(final_states).unflatten(0, initial_state.shape[:2])


def _chunks(states: torch.Tensor, chunk_borders: list[int], reverse: bool = False):
    """Go through the chunks of all sequences: their slice of the chunked tensors, and the state they work on.

    `states` is `[N, HV, K, V]`; what comes with a chunk is the view `[X, K, V]` of its sequence, or of the whole batch
    where there is one sequence per row.
    """
    per_sequence = [states.flatten(0, 1)] if len(chunk_borders) == 2 else states.unbind(0)
    X = per_sequence[0].shape[0]  # not len(), which makes a number of a symbol
    order = [(slice(n * X, (n + 1) * X), state)
             for state, first, last in zip(per_sequence, chunk_borders, chunk_borders[1:])
             for n in range(first, last)]  # fmt: skip
    return reversed(order) if reverse else order


def torch_recurrent_delta_rule(
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
    g: torch.Tensor | None = None,
    head_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule token by token, for decoding and as the baseline; arguments as in `torch_chunk_delta_rule`, beta
    1 by default.
    """
    _refuse_head_first(head_first)
    beta = v.new_ones(v.shape[:-1]) if beta is None else beta
    o_dtype = v.dtype
    q, k, v, beta, g, state, borders = _prepare(
        q, k, v, beta, g, scale, initial_state, use_qk_l2norm_in_kernel, cu_seqlens
    )
    alpha = None if g is None else g.exp()[..., None, None]
    with torch.autocast(q.device.type, enabled=False):
        outputs, final_states = [], []
        states = (state,) if cu_seqlens is None else state.split(1)
        for S, first, last in zip(states, borders, borders[1:]):
            for t in range(first, last):
                k_t = k[:, t].unsqueeze(-1)
                S = S if alpha is None else S * alpha[:, t]
                error = v[:, t].unsqueeze(-2) - k_t.mT @ S
                S = S + k_t @ (beta[:, t, :, None, None] * error)
                outputs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
            final_states.append(S)
        o = torch.stack(outputs, dim=1) if outputs else v
    return o.to(o_dtype), torch.cat(final_states) if output_final_state else None


def _prepare(q, k, v, beta, g, scale, initial_state, use_qk_l2norm_in_kernel, cu_seqlens):
    """Check the arguments of a rule and bring them into the form in which it computes.

    Returns q (scaled), k, v `[B, T, HV, *]`, beta and g `[B, T, HV]` in fp32 or fp64, the initial state, and the
    sequences' borders, a list of ints: `[0, T]` without `cu_seqlens`.
    """
    _check(q, k, v, beta, g, initial_state)
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    g = None if g is None else g.to(dtype)
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS) for x in (q, k))
    q = q * (K**-0.5 if scale is None else scale)
    if HV != H:
        q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q, k))

    if cu_seqlens is None:
        borders, num_states = [0, T], B
    else:
        borders = checked_borders(cu_seqlens, B, T)
        num_states = len(borders) - 1
    if initial_state is None:
        initial_state = v.new_zeros(num_states, HV, K, V)
    elif (
        initial_state.shape != (num_states, HV, K, V)
        or not initial_state.is_floating_point()
        or torch.promote_types(initial_state.dtype, dtype) != dtype
    ):
        raise ValueError(
            f"initial_state must be [N, HV, K, V] = {[num_states, HV, K, V]} in {dtype} or a narrower dtype, "
            f"got {list(initial_state.shape)} in {initial_state.dtype}"
        )
    return q, k, v, beta, g, initial_state.to(dtype), borders


def _refuse_head_first(head_first: bool) -> None:
    if head_first:
        raise ValueError("head_first=True is not supported: q, k and v must be [B, T, H, D], got [B, H, T, D]")


def _check(q, k, v, beta, g, initial_state) -> None:
    if q.ndim != 4 or v.ndim != 4 or k.shape != q.shape or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            "q and k must be [B, T, H, K] and v [B, T, HV, V] with the same B and T, "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if v.shape[2] % q.shape[2] != 0:
        raise ValueError(f"the value heads ({v.shape[2]}) must be a multiple of the key heads ({q.shape[2]})")
    if beta.shape != v.shape[:3]:
        raise ValueError(f"beta must be [B, T, HV] = {list(v.shape[:3])}, got {list(beta.shape)}")
    if g is not None and not (g.shape == beta.shape and g.is_floating_point()):
        raise ValueError(
            f"g must be [B, T, HV] = {list(beta.shape)} in a floating dtype, got {list(g.shape)} in {g.dtype}"
        )
    if not (v.is_floating_point() and q.dtype == k.dtype == v.dtype and beta.is_floating_point()):
        raise ValueError(
            "q, k and v must share one floating dtype and beta must be floating, "
            f"got q {q.dtype}, k {k.dtype}, v {v.dtype}, beta {beta.dtype}"
        )
    if q.shape[1] < q.shape[2] and q.shape[2] > MANY_HEADS and not torch.compiler.is_compiling():
        warnings.warn(
            f"q has {q.shape[1]} tokens and {q.shape[2]} heads: is it [B, H, T, K]? The rule wants [B, T, H, K]",
            stacklevel=4,
        )
    if any(x is not None and x.device != q.device for x in (k, v, beta, g, initial_state)):
        raise ValueError(f"every tensor must be on q's device, {q.device}")


def checked_borders(cu_seqlens: torch.Tensor, B: int, T: int) -> list[int]:
    """`cu_seqlens` as a list, which waits for a GPU. ValueError where it does not pack T tokens."""
    if B != 1:
        raise ValueError(f"cu_seqlens packs sequences along time and needs a batch of 1, got {B}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be a 1-d integer tensor of N + 1 borders, got {list(cu_seqlens.shape)} in "
            f"{cu_seqlens.dtype}"
        )
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != T or any(a > b for a, b in zip(borders, borders[1:])):
        raise ValueError(f"cu_seqlens must go from 0 to T = {T} and never back, got {borders}")
    return borders


def _cut(tensors, borders):
    """Cut `[B, T, HV, *]` tensors into chunks `[n * B * HV, C, *]` so that every sequence starts a chunk of its own.

    What fills up a sequence's last chunk is zero: a zero key with a zero step writes nothing. Also returns the chunk
    at which each sequence begins (and the end), and each token's place on the padded time axis, or None if that is t.
    """
    lengths = [last - first for first, last in zip(borders, borders[1:])]
    C = max(1, min(CHUNK_SIZE, max(lengths)))
    chunk_borders = [0]
    for length in lengths:
        chunk_borders.append(chunk_borders[-1] + -(-length // C))
    padded_length = C * chunk_borders[-1]
    if len(lengths) == 1:
        padded, token_slots = [F.pad(x, (0, 0, 0, 0, 0, padded_length - lengths[0])) for x in tensors], None
    else:
        device = tensors[0].device
        shifts = [C * chunk - first for chunk, first in zip(chunk_borders, borders)]
        token_slots = torch.arange(borders[-1], device=device) + torch.repeat_interleave(
            torch.tensor(shifts[: len(lengths)], device=device), torch.tensor(lengths, device=device)
        )
        padded = [x.new_zeros(x.shape[0], padded_length, *x.shape[2:]).index_copy(1, token_slots, x) for x in tensors]
    chunked = [x.unflatten(1, (padded_length // C, C)).permute(1, 0, 3, 2, 4).flatten(0, 2) for x in padded]
    return chunked, chunk_borders, token_slots
