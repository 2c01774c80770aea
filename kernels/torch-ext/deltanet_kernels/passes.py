"""Forward and backward as lists of launches: what `chunk_delta_rule` computes once its plan is made."""

import torch

from ._checks import check_arguments
from .grads import grads
from .layout import (
    Inputs,
    count_chunks,
    s_shape,
    scratch_in,
    scratch_layout,
    scratch_type,
    segment_tables,
    sums_shape,
    tables,
)
from .plan import Plan, can_cut, is_aligned, make_plan
from .pools import gather, make_pool, scatter
from .prepare import prepare
from .reverse import reverse
from .scan import scan
from .segments import cut, entry_states, exit_gradients


def forward(
    scale: float | None, l2norm: bool, final: bool, save: bool, q, k, v, beta, h0, cu_seqlens, g,
    state_indices=None, has_initial_state=None,
) -> list:  # fmt: skip
    """o, the final state or None, the plan, and with `save` what backward reads: the memory of the scratch, and Phi or
    None; otherwise two more None. With `state_indices` h0 is a pool, to which the final states go.
    """
    # checked here: a replayed call has the signature of one that passed
    scale = check_arguments(q, k, v, beta, scale, h0, cu_seqlens, g, state_indices, has_initial_state)
    B, T = q.shape[:2]
    plan = make_plan(q, k, v, beta, cu_seqlens, save, gated=g is not None)
    call, s = plan.call, plan.segments
    pool = make_pool(state_indices, has_initial_state)
    x = Inputs(q, k, v, beta, h0, cu_seqlens, g, pool)
    o = v.new_empty(B, T, call.HV, call.V)
    copies = pool is not None and s > 1
    if copies:
        x, final = x._replace(h0=gather(h0, pool), pool=None), True
    if s > 1:
        x = x._replace(q=cut(q, s), k=cut(k, s), v=cut(v, s), beta=cut(beta, s), g=None if g is None else cut(g, s))
        t = segment_tables(B, T, s, k.device)
    else:
        t = tables(B, T, cu_seqlens, (o,))
    layout, size = scratch_layout(plan, l2norm, save, t.n_chunks)
    memory = k.new_empty(size, dtype=torch.uint8)
    scratch = scratch_in(memory, layout)
    phi = k.new_empty(t.n, call.HV, call.K, call.K, dtype=torch.float32) if s > 1 else None
    ht = k.new_empty(t.n, call.HV, call.K, call.V, dtype=torch.float32) if final else None
    prepare(x, scratch, t, plan, scale)
    if s > 1:
        x = x._replace(h0=entry_states(x, scratch, t, plan, scale, phi))
    scan(x, scratch, t, plan, scale, plan.scan, o=cut(o, s) if s > 1 else o, ht=ht)
    if copies:
        scatter(ht[s - 1 :: s], h0, pool, o, cu_seqlens)
        ht = None
    elif s > 1 and final:
        ht = ht[s - 1 :: s].contiguous()
    return [o, ht, plan, memory, phi if plan.segments_backward > 1 else None] if save else [o, ht, plan, None, None]


def backward(
    plan: Plan, scale: float | None, l2norm: bool, q, k, beta, h0, cu_seqlens, g, do, dht, memory, phi
) -> list:
    """dq, dk, dv, dbeta, dh0 or None, and dg or None. The plan, `memory` and `phi` as `forward` gave them."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if do.stride(-1) != 1 or (plan.reverse.gluon and not is_aligned(do)):
        do = do.clone(memory_format=torch.contiguous_format)
    if dht is not None:
        dht = dht.contiguous()
    B, T = q.shape[:2]
    s = plan.segments_backward
    x = Inputs(q, k, None, beta, h0, cu_seqlens, g)
    dh0 = None if h0 is None else _contiguous_like(h0)
    layout, _ = scratch_layout(plan, l2norm, True, count_chunks(B, T, cu_seqlens))
    scratch = scratch_in(memory, layout)
    if s == 1:
        # packed, what lies outside of all sequences is zeroed by the launch that makes the tables
        out = None if cu_seqlens is None else _gradients_like(x, do)
        t = tables(B, T, cu_seqlens, [y for y in out or () if y is not None])
        out = _gradients(x, do, scratch, t, plan, scale, dht, dh0, out)
    else:
        if not can_cut(do):  # forward saw the other tensors
            do = do.contiguous()
        out = _gradients_like(x, do)
        parts, t = x._replace(q=cut(q, s), k=cut(k, s), beta=cut(beta, s)), segment_tables(B, T, s, q.device)
        dht = exit_gradients(parts, cut(do, s), scratch, t, plan, scale, phi, dht)
        dh0s = None if h0 is None else dht.new_empty(dht.shape)
        parts_out = [None if y is None else cut(y, s) for y in out]
        _gradients(parts, cut(do, s), scratch, t, plan, scale, dht, dh0s, parts_out)
        if h0 is not None:
            dh0.copy_(dh0s[::s])
    dq, dk, dv, dbeta, dg = out
    return [dq, dk, dv if dv.dtype == do.dtype else dv.to(do.dtype), dbeta, dh0, dg]


def _gradients(x: Inputs, do, scratch, t, plan: Plan, scale: float, dht, dh0, out: list | None) -> list:
    """dq, dk, dv, dbeta and dg or None, written to `out` where it is given."""
    dv = _scratch_like(do) if out is None else out[2]
    ds = do.new_empty(s_shape(plan, t.n_chunks), dtype=scratch_type(plan.call.dtype))
    flags = uv = None
    if scratch.gs is not None and scratch.rk is None:  # why: `grads.py`
        uv = do.new_empty(sums_shape(plan, t.n_chunks), dtype=torch.float32)
    if plan.beside:
        flags = do.new_empty(t.n_chunks, plan.call.HV, plan.value_tiles, dtype=torch.int32)
    reverse(x, do, scratch, t, plan, scale, plan.reverse, dht=dht, dv=dv, ds=ds, uv=uv, dh0=dh0, flags=flags)
    # allocated while the reverse scan runs, since at batch 1 the GPU waits for the host
    dq, dk, _, dbeta, dg = out or _gradients_like(x, do, dv)
    grads(x, do, scratch, t, plan, scale, dv=dv, ds=ds, uv=uv, flags=flags, dq=dq, dk=dk, dbeta=dbeta, dg=dg)
    return [dq, dk, dv, dbeta, dg]


def _contiguous_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Half of what `x.new_empty(x.shape)` takes on the host, where the shape is turned into numbers and back."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _scratch_like(do: torch.Tensor) -> torch.Tensor:
    """For dv, which `grads` reads back."""
    return _contiguous_like(do, scratch_type(do.dtype))


def _gradients_like(x: Inputs, do: torch.Tensor, dv: torch.Tensor | None = None) -> list:
    """dq, dk, dv, dbeta and dg or None, to be written."""
    dv = _scratch_like(do) if dv is None else dv
    dg = None if x.g is None else _contiguous_like(x.g)
    return [_contiguous_like(x.q), _contiguous_like(x.k), dv, _contiguous_like(x.beta), dg]
