"""States in a pool, as a server holds them: one place, a slot, per request in whatever order requests came.

A kernel is told the slot of each sequence, reads its state there and writes it back, so that nothing is gathered
before a call and scattered after it. A slot of -1 is padding. Legend: N sequences, HV value heads, K and V head sizes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import launch


class Pool(NamedTuple):
    """Where a call's states lie in a pool `[slots, ...]`, which stands beside it."""

    slots: torch.Tensor  # [N], int32 or int64, contiguous; -1 for none
    goes_on: torch.Tensor | None  # [N] uint8: 0 where a sequence starts from zeros, whatever its slot holds

    def of(self, sequences: slice) -> "Pool":
        """Of some of the sequences alone."""
        return Pool(*(None if x is None else x[sequences] for x in self))


def make_pool(state_indices: torch.Tensor | None, has_initial_state: torch.Tensor | None) -> Pool | None:
    """Of the public arguments; None without indices."""
    if state_indices is None:
        return None
    goes_on = None if has_initial_state is None else has_initial_state.contiguous().view(torch.uint8)
    return Pool(state_indices.contiguous(), goes_on)


@triton.jit
def find_state(slots, goes_on, i_n):
    """(slot of sequence i_n, whether it has one, whether it goes on from what is there)."""
    i_s = tl.load(slots + i_n).to(tl.int64)
    exists = i_s >= 0
    reads = exists
    if goes_on is not None:
        reads = exists & (tl.load(goes_on + i_n) != 0)
    return i_s, exists, reads


# -------------------------------------------------------------------------------- copies, for scans that know no slots

ROWS = 32  # of a state, or of the output, per turn of a program


@triton.jit
def gather_kernel(
    # inputs; goes_on may be None
    pool, slots, goes_on,
    # output [N, HV, K, V]
    states,
    # sizes and strides
    HV, K, V, s_pn, s_ph, s_pk, s_pv,
    # constants
    ROWS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_hv = tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    i_s, _, reads = find_state(slots, goes_on, i_n)
    o_k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_v = tl.arange(0, BV)
    m = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_pool = pool + i_s * s_pn + i_hv.to(tl.int64) * s_ph + o_k[:, None] * s_pk + o_v[None, :] * s_pv
    b = tl.load(p_pool, mask=m & reads, other=0.0)
    tl.store(states + (i_n * HV + i_hv) * K * V + o_k[:, None] * V + o_v[None, :], b, mask=m)


@triton.jit
def scatter_kernel(
    # inputs [N, HV, K, V], N apart by s_n; cu_seqlens may be None
    states, slots, cu_seqlens,
    # outputs: the pool, and o [B, T, HV, V], which gets zeros where a sequence has no slot
    pool, o,
    # sizes and strides
    T, HV, K, V, s_n, s_pn, s_ph, s_pk, s_pv,
    # constants
    ROWS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_hv = tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    i_s, exists, _ = find_state(slots, None, i_n)
    o_k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_v = tl.arange(0, BV)
    m_v = (o_v < V)[None, :]
    if exists:
        m = (o_k < K)[:, None] & m_v
        b = tl.load(states + i_n * s_n + i_hv * K * V + o_k[:, None] * V + o_v[None, :], mask=m, other=0.0)
        p_pool = pool + i_s * s_pn + i_hv.to(tl.int64) * s_ph + o_k[:, None] * s_pk + o_v[None, :] * s_pv
        tl.store(p_pool, b, mask=m)
    else:
        bos, eos = i_n * T, i_n * T + T
        if cu_seqlens is not None:
            bos = tl.load(cu_seqlens + i_n).to(tl.int64)
            eos = tl.load(cu_seqlens + i_n + 1).to(tl.int64)
        zeros = tl.zeros([ROWS, BV], o.dtype.element_ty)
        for i in range(bos, eos, tl.num_programs(0) * ROWS):
            t = i + o_k
            tl.store(o + (t[:, None] * HV + i_hv) * V + o_v[None, :], zeros, mask=(t < eos)[:, None] & m_v)


def _sizes(pool: torch.Tensor) -> tuple[tuple[int, int, int], dict]:
    """Blocks of rows, heads and sizes of a pool `[slots, HV, K, V]`, and the constants of its kernels."""
    _, HV, K, V = pool.shape
    return (triton.cdiv(K, ROWS), HV), (HV, K, V), {"ROWS": ROWS, "BV": triton.next_power_of_2(V)}


def gather(pool: torch.Tensor, where: Pool) -> torch.Tensor:
    """The states of a call's sequences, `[N, HV, K, V]`."""
    blocks, sizes, constants = _sizes(pool)
    n = where.slots.shape[0]
    states = pool.new_empty(n, *pool.shape[1:])
    launch(
        gather_kernel, (*blocks, n),
        (pool, where.slots, where.goes_on, states),
        (*sizes, *pool.stride()),
        constants,
        {"num_warps": 4},
    )  # fmt: skip
    return states


def scatter(states: torch.Tensor, pool: torch.Tensor, where: Pool, o: torch.Tensor, cu_seqlens) -> None:
    """Brings them back, and zeros to o for sequences without a slot. Of `states` only the first stride is free."""
    blocks, sizes, constants = _sizes(pool)
    launch(
        scatter_kernel, (*blocks, where.slots.shape[0]),
        (states, where.slots, cu_seqlens, pool, o),
        (o.shape[1], *sizes, states.stride(0), *pool.stride()),
        constants,
        {"num_warps": 4},
    )  # fmt: skip
