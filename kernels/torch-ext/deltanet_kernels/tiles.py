"""What the chunked kernels share: tiles between global memory and registers, and where a chunk or sequence lies.

Letters of all kernels: i_ index, o_ offset, p_ pointer, m_ mask, b_ block held by a program, t_ tile in shared memory.
"""

import triton
import triton.language as tl

from .limits import CHUNK, NORM_EPS


C = tl.constexpr(CHUNK)
EPS = tl.constexpr(NORM_EPS)


@triton.jit
def below(o, n, ALWAYS: tl.constexpr):
    """o < n; where that always holds, as a constant, so that no load or store carries a predicate: a tenth of a scan's
    instructions, and registers that it spilled."""
    return tl.full(o.shape, True, tl.int1) if ALWAYS else o < n


@triton.jit
def load_tile(p, o_r, stride, o_c, m_r, m_c):
    """Tile [rows, columns], zero outside the masks."""
    return tl.load(p + o_r[:, None] * stride + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)


@triton.jit
def load_tile_t(p, o_r, stride, o_c, m_r, m_c):
    """The same tile read transposed: [columns, rows]."""
    return tl.load(p + o_r[None, :] * stride + o_c[:, None], mask=m_r[None, :] & m_c[:, None], other=0.0)


@triton.jit
def store_fragments(p, b, R: tl.constexpr, N: tl.constexpr):
    """Scratch tile [R, N] in the order in which warps hold it as a left operand: 16 bytes a thread, no moves.

    Row-major order would need a pass through shared memory and two barriers for every 2 KB. Row bits are (warp, half,
    8 rows), column bits (block of 16, half, 4, pair); only the speed depends on the layout, the result never does.
    """
    b = tl.reshape(b, [R // 16, 2, 8, N // 16, 2, 4, 2])
    b = tl.reshape(tl.permute(b, [3, 0, 2, 5, 4, 1, 6]), [R * N // 256, 256])
    o = tl.arange(0, R * N // 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    tl.store(p + o, b.to(p.dtype.element_ty))


@triton.jit
def load_rows(p, i_r, NC: tl.constexpr, W: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Rows i_r to i_r + W of NC neighbouring tiles [R, N] that `store_fragments` wrote, as [W, NC * N]."""
    o = tl.arange(0, NC * W * N // 256)
    o = i_r * 16 + o // (W // 16) * (R * 16) + o % (W // 16) * 256
    b = tl.load(p + o[:, None] + tl.arange(0, 256)[None, :])
    b = tl.reshape(b, [NC, N // 16, W // 16, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(b, [2, 6, 3, 0, 1, 5, 4, 7]), [W, NC * N])


@triton.jit
def decay(b_end, b_start):
    """2 to the difference of two sums of g: what is left at one token of what was there at another, earlier one. Of
    later ones 1, so that nothing overflows that a mask takes away.
    """
    return tl.exp2(tl.minimum((b_end - b_start).to(tl.float32), 0.0))


@triton.jit
def norm_of(b_g):
    """Reciprocal norms from the diagonal of K K^T, or of a block of it."""
    o = tl.arange(0, b_g.shape[0])
    return tl.rsqrt(tl.sum(tl.where(o[:, None] == o[None, :], b_g, 0.0), 1) + EPS)


@triton.jit
def norm_backward(b_d, b_x, b_r, L2NORM: tl.constexpr):
    """b_d is r times the gradient of x^ = r x; returns that of x."""
    if L2NORM:
        b_x = b_x.to(tl.float32)
        b_d -= b_x * (tl.sum(b_x * b_d, 1) * b_r * b_r)[:, None]
    return b_d


# The last two are for Gluon's kernels, too, which have no tensors without a layout: scalars alone.


@triton.jit
def locate_chunk(i_t, chunks, cu_seqlens, T, NT):
    """Batch entry, chunk within its sequence, first token of the sequence and its length, for chunk i_t.

    The length is 0 for a chunk beyond the last: the host knows only an upper bound of a packed batch's chunks.
    """
    if cu_seqlens is not None:
        i_n = tl.load(chunks + i_t * 2)
        i_c = tl.load(chunks + i_t * 2 + 1)
        i_b = i_n.to(tl.int64) * 0
        bos = tl.load(cu_seqlens + tl.maximum(i_n, 0)).to(tl.int64)
        T = tl.where(i_n < 0, 0, (tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1) - bos).to(tl.int32))
    else:
        i_b = (i_t // NT).to(tl.int64)
        i_c = i_t % NT
        bos = i_b * 0
    return i_b, i_c, bos, T


@triton.jit
def locate_sequence(i_n, chunk_offsets, cu_seqlens, T, NT):
    """Batch entry, first token there and in a tensor [B * T], length, chunks and first chunk of sequence i_n."""
    i_b = i_n.to(tl.int64)
    bos = i_b * 0
    row = i_b * T
    chunk_0 = i_b * NT
    if cu_seqlens is not None:
        i_b = i_b * 0
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        row = bos
        T = (tl.load(cu_seqlens + i_n + 1) - bos).to(tl.int32)
        NT = (T + C - 1) // C
        chunk_0 = tl.load(chunk_offsets + i_n).to(tl.int64)
    return i_b, bos, row, T, NT, chunk_0
