"""Where sequences and chunks lie (Tables), and the memory that the kernels leave to each other (Scratch)."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import launch
from .limits import CHUNK
from .plan import Plan
from .pools import Pool
from .tiles import C


ZERO_PROGRAMS = 128  # at most; about one per multiprocessor
ALIGNMENT = 128  # bytes, a line of the cache


class Inputs(NamedTuple):
    """The rule's tensors, as `chunk_gated_delta_rule` describes them. Backward has no v."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    beta: torch.Tensor
    h0: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    g: torch.Tensor | None  # contiguous; None: the rule without a gate
    pool: Pool | None = None  # where in h0, a pool then, the states lie


# -------------------------------------------------------------------------------------------------------------- tables


class Tables(NamedTuple):
    """Where sequences and chunks lie. Tensors are None for a dense batch, where it is plain arithmetic."""

    n: int  # sequences
    n_chunks: int  # programs over chunks; an upper bound for packed sequences, whose lengths only the device knows
    nt: int  # chunks per sequence (dense)
    even: bool  # every chunk is known to be full
    cu_seqlens: torch.Tensor | None = None  # borders
    chunk_offsets: torch.Tensor | None = None
    chunks: torch.Tensor | None = None


@triton.jit
def _zero_rows(x, W, first, end, T, i_p, n_p):
    """Rows [0, first) and [end, T) of [T, W], by n_p programs."""
    if x is not None:
        BLOCK: tl.constexpr = 1024
        o = tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], x.dtype.element_ty)
        for i in range(i_p * BLOCK, first * W, n_p * BLOCK):
            tl.store(x + i + o, zeros, mask=i + o < first * W)
        size = (end * 0 + T) * W  # in int64
        for i in range(end * W + i_p * BLOCK, size, n_p * BLOCK):
            tl.store(x + i + o, zeros, mask=i + o < size)


@triton.jit
def index_kernel(
    cu_seqlens,
    # outputs: first chunk of each sequence, and (sequence, position) of each chunk, -1 where unused
    chunk_offsets, chunks,
    # outputs of the kernels to come, rows of [T, W], or None
    x0, x1, x2, x3, x4,
    N, MAX_CHUNKS, T, W0, W1, W2, W3, W4,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i_n writes the table entries of sequence i_n; program N closes the table. No host synchronisation.

    The programs after these fill the rows outside of all sequences with zeros, in this launch, which is needed anyway:
    where there are none, that costs nothing to speak of.
    """
    i_n = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    if i_n > N:
        first = tl.load(cu_seqlens).to(tl.int64)
        end = tl.load(cu_seqlens + N).to(tl.int64)
        i_p = i_n - N - 1
        n_p = tl.num_programs(0) - N - 1
        _zero_rows(x0, W0, first, end, T, i_p, n_p)
        _zero_rows(x1, W1, first, end, T, i_p, n_p)
        _zero_rows(x2, W2, first, end, T, i_p, n_p)
        _zero_rows(x3, W3, first, end, T, i_p, n_p)
        _zero_rows(x4, W4, first, end, T, i_p, n_p)
        return
    chunk = 0
    for i in range(0, i_n, BLOCK):
        m = i + o < i_n
        length = tl.load(cu_seqlens + i + o + 1, mask=m, other=0) - tl.load(cu_seqlens + i + o, mask=m, other=0)
        chunk += tl.sum((length.to(tl.int32) + C - 1) // C, 0)
    tl.store(chunk_offsets + i_n, chunk)
    if i_n < N:
        length = (tl.load(cu_seqlens + i_n + 1) - tl.load(cu_seqlens + i_n)).to(tl.int32)
        n_chunks = (length + C - 1) // C
        for i in range(0, n_chunks, BLOCK):
            tl.store(chunks + (chunk + i + o) * 2, i_n, mask=i + o < n_chunks)
            tl.store(chunks + (chunk + i + o) * 2 + 1, i + o, mask=i + o < n_chunks)
    else:
        for i in range(chunk, MAX_CHUNKS, BLOCK):
            tl.store(chunks + (i + o) * 2, -1, mask=i + o < MAX_CHUNKS)


@triton.jit
def borders_kernel(
    # outputs, as `index_kernel` writes them, and the segments' borders in [B * T]
    borders, chunk_offsets, chunks,
    T, NT, LENGTH, N, N_CHUNKS,
    S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Entries of BLOCK chunks and of as many segments. NT chunks a sequence, LENGTH a segment, the last ones maybe
    less.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(chunks + o * 2, o // NT * S + o % NT // LENGTH, mask=o < N_CHUNKS)
    tl.store(chunks + o * 2 + 1, o % NT % LENGTH, mask=o < N_CHUNKS)
    first = tl.minimum(o % S * LENGTH, NT)
    tl.store(chunk_offsets + o, o // S * NT + first, mask=o <= N)
    tl.store(borders + o, o // S * T + tl.minimum(first * C, T), mask=o <= N)


def count_chunks(B: int, T: int, cu_seqlens: torch.Tensor | None) -> int:
    """`Tables.n_chunks`."""
    return B * ((T + CHUNK - 1) // CHUNK) if cu_seqlens is None else T // CHUNK + cu_seqlens.shape[0] - 1


def tables(B: int, T: int, cu_seqlens: torch.Tensor | None, outputs: tuple[torch.Tensor, ...] = ()) -> Tables:
    """`outputs`, contiguous, at most five, get zeros where no sequence is (packed sequences alone)."""
    n_chunks = count_chunks(B, T, cu_seqlens)
    if cu_seqlens is None:
        return Tables(B, n_chunks, -(-T // CHUNK), T % CHUNK == 0)
    n = cu_seqlens.shape[0] - 1
    offsets, chunks = (torch.empty(x, dtype=torch.int32, device=cu_seqlens.device) for x in (n + 1, 2 * n_chunks))
    missing = 5 - len(outputs)
    launch(
        index_kernel, (n + 1 + min(ZERO_PROGRAMS, -(-T // CHUNK)),),
        (cu_seqlens, offsets, chunks, *outputs, *[None] * missing),
        (n, n_chunks, T, *[x.stride(1) for x in outputs], *[0] * missing),
        {"BLOCK": 128},
        {"num_warps": 1},
    )  # fmt: skip
    return Tables(n, n_chunks, 0, False, cu_seqlens, offsets, chunks)


def divides(T: int, s: int) -> bool:
    return T % (s * CHUNK) == 0


def segment_tables(B: int, T: int, s: int, device: torch.device) -> Tables:
    """Where the segments and their chunks lie. Packed, their borders come from the numbers, in the launch that indexes
    them.
    """
    if divides(T, s):
        return tables(B * s, T // s, None)
    nt = -(-T // CHUNK)
    sizes = B * s + 1, B * s + 1, 2 * B * nt
    borders, offsets, chunks = (torch.empty(x, dtype=torch.int32, device=device) for x in sizes)
    launch(
        borders_kernel, (-(-max(sizes[0], B * nt) // 128),),
        (borders, offsets, chunks),
        (T, nt, -(-nt // s), B * s, B * nt),
        {"S": s, "BLOCK": 128},
        {"num_warps": 1},
    )  # fmt: skip
    return Tables(B * s, B * nt, 0, T % CHUNK == 0, borders, offsets, chunks)


# ------------------------------------------------------------------------------------------------------------- scratch


class Scratch(NamedTuple):
    """What the kernels leave to each other (`kernels/README.md`, "Symbols")."""

    a: torch.Tensor  # [chunks, HV, C, C]
    p: torch.Tensor | None  # [chunks, H, C, C] (gated: HV), where the plan has a kernel for the scores
    rq: torch.Tensor | None  # [chunks, H, C], with the L2 norm
    rk: torch.Tensor | None
    u: torch.Tensor | None  # in tiles, and so is s; for backward alone
    s: torch.Tensor | None
    gs: torch.Tensor | None  # [chunks, HV, C], with a gate: log2 of the decay since the chunk's start


def scratch_type(dtype: torch.dtype) -> torch.dtype:
    """fp16 goes through fp32: its exponent range cannot hold U and dV where beta is near zero."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def decay_type(dtype: torch.dtype) -> torch.dtype:
    """Of sums of g. Their differences count, in which fp32 loses what fp32 inputs want to keep."""
    return torch.float32 if dtype == torch.bfloat16 else torch.float64


def precision(dtype: torch.dtype) -> str:
    """tf32 holds an fp16 number exactly; fp32 inputs get three tf32 products, an error of fp32's class."""
    return "tf32" if dtype == torch.float16 else "tf32x3"


def static(size: int, wide: bool = False) -> int | tl.constexpr:
    """A head size as kernels are given it: a constant where that was tuned, a number otherwise.

    So sizes of one kind (tiles of the plan, and whether these are full) share their machine code, and a test of all
    sizes compiles a tenth of what it would.
    """
    return size if wide or size & (size - 1) else tl.constexpr(size)


def s_shape(plan: Plan, n_chunks: int) -> tuple[int, ...]:
    """Of s, and of ds."""
    return n_chunks, plan.call.HV, plan.value_tiles * plan.value_tile, plan.key_tiles * plan.key_tile


def sums_shape(plan: Plan, n_chunks: int) -> tuple[int, ...]:
    """Of uv: diag(dV U^T), of dV before it is rounded, in parts of 16 value columns."""
    return n_chunks, plan.call.HV, plan.value_tiles * plan.value_tile // 16, CHUNK


def scratch_layout(plan: Plan, l2norm: bool, save: bool, n_chunks: int) -> tuple[Scratch, int]:
    """(first byte, shape, dtype) of each tensor in one piece of memory, and the bytes of that.

    One piece, since each allocation takes the host up to 6 us, and each tensor that backward is left some more.
    """
    call = plan.call
    norms = n_chunks, call.H, CHUNK
    heads = call.HV if call.gated else call.H  # that have a P of their own
    wanted = Scratch(
        a=(n_chunks, call.HV, CHUNK, CHUNK),
        p=(n_chunks, heads, CHUNK, CHUNK) if plan.scores else None,
        rq=norms if l2norm else None,
        rk=norms if l2norm else None,
        u=(n_chunks, call.HV, plan.value_tiles * plan.value_tile, CHUNK) if save else None,
        s=s_shape(plan, n_chunks) if save else None,
        gs=(n_chunks, call.HV, CHUNK) if call.gated else None,
    )
    types = {"rq": torch.float32, "rk": torch.float32, "gs": decay_type(call.dtype)}
    places, end = [], 0
    for name, shape in wanted._asdict().items():
        dtype = types.get(name, scratch_type(call.dtype))
        places.append(None if shape is None else (end, shape, dtype))
        if shape is not None:
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return Scratch(*places), end


def scratch_in(memory: torch.Tensor, layout: Scratch) -> Scratch:
    """The tensors in `memory`, as many bytes as `scratch_layout` says."""

    def at(start, shape, dtype):
        return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    return Scratch(*(None if place is None else at(*place) for place in layout))
