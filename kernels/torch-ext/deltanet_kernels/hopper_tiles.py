"""What the Gluon kernels share: tiles between global memory, shared memory and registers, by a power of two of
warps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from .limits import CHUNK


C = gl.constexpr(CHUNK)
async_load = (
    getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
)  # Triton 3.8's name and 3.6's
STAGES = {64: 4, 128: 3}  # value columns per program of a scan -> chunks that shared memory holds


@gluon.jit
def _rows(p, stride, length, R: gl.constexpr, N: gl.constexpr, COLUMNS: gl.constexpr, EVEN: gl.constexpr):
    """Addresses of R rows of N columns, 16 bytes a thread, and which of them lie before row `length` and column
    COLUMNS.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [gl.num_warps(), 1], [1, 0])
    o_r = gl.arange(0, R, gl.SliceLayout(1, layout))
    o_c = gl.arange(0, N, gl.SliceLayout(0, layout))
    m_x = gl.full([R, N], True, gl.int1, layout)
    if not EVEN:
        m_x &= (o_r < length)[:, None]
    if COLUMNS < N:
        m_x &= (o_c < COLUMNS)[None, :]
    return p + o_r[:, None] * stride + o_c[None, :], m_x


@gluon.jit
def copy_tile(tile, p, stride, length, N: gl.constexpr, EVEN: gl.constexpr, COLUMNS: gl.constexpr):
    """Starts copying rows of N columns to shared memory, zeros from row `length` and from column COLUMNS on."""
    p_x, m_x = _rows(p, stride, length, tile.shape[0], N, COLUMNS, EVEN)
    if EVEN and COLUMNS == N:
        async_load(tile, p_x)
    else:
        async_load(tile, p_x, m_x)


@gluon.jit
def store_tile(p, stride, tile, length, N: gl.constexpr, EVEN: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile of shared memory to global memory, but for columns from COLUMNS on, 16 bytes a thread."""
    p_x, m_x = _rows(p, stride, length, tile.shape[0], N, COLUMNS, EVEN)
    b_x = tile.load(p_x.type.layout)
    if EVEN and COLUMNS == N:
        gl.store(p_x, b_x)
    else:
        gl.store(p_x, b_x, mask=m_x)


@gluon.constexpr_function
def fragment_layout(R, N, warps):
    """Who holds what of R // 64 tiles in the order of `store_fragments`, [R * N // 256, 256]: 8 neighbours a thread,
    as an accumulator [R, N] has them. Four warps a tile, or eight, each of which has half of its columns."""
    blocks_of_16 = [[4, 0], [8, 0]] if N == 64 else [[4, 0], [8, 0], [16, 0]]
    lanes = [[0, 8], [0, 16], [0, 32], [0, 64], [0, 128]]
    rows_of_16 = [[1, 0], [2, 0]] if R == 64 else [[1, 0], [2, 0], [N // 4, 0]]
    if R == 64 and warps == 8:
        rows_of_16 += [blocks_of_16.pop()]
    shape = [R * N // 256, 256]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4]] + blocks_of_16, lanes, rows_of_16, [], shape)


@gluon.jit
def load_fragments(p, R: gl.constexpr, N: gl.constexpr, COLUMNS: gl.constexpr):
    """Neighbouring tiles [64, N], R rows in all, that `store_fragments` wrote, in the registers that they came
    from. Of the columns from COLUMNS on, which are zero, nothing is read.
    """
    layout: gl.constexpr = fragment_layout(R, N, gl.num_warps())
    o_r = gl.arange(0, R * N // 256, gl.SliceLayout(1, layout))
    o_c = gl.arange(0, 256, gl.SliceLayout(0, layout))
    p_x = p + o_r[:, None] * 256 + o_c[None, :]
    if COLUMNS == N:
        b = gl.load(p_x)
    else:
        gl.static_assert(R == 64)
        m_x = gl.full([R * N // 256, 256], True, gl.int1, layout) & (o_r < COLUMNS // 4)[:, None]
        b = gl.load(p_x, mask=m_x, other=0.0)
    b = gl.permute(gl.reshape(b, [R // 64, N // 16, 4, 8, 4, 2, 2, 2]), [0, 2, 6, 3, 1, 5, 4, 7])
    return gl.reshape(b, [R, N])


@gluon.jit
def store_fragments(p, b, R: gl.constexpr, N: gl.constexpr):
    """The same as `store_fragments`: an accumulator's registers [R, N] as they are, 16 bytes a thread."""
    layout: gl.constexpr = fragment_layout(R, N, 4 * (R // 64))
    o_r = gl.arange(0, R * N // 256, gl.SliceLayout(1, layout))
    o_c = gl.arange(0, 256, gl.SliceLayout(0, layout))
    b = gl.permute(gl.reshape(b, [R // 64, 4, 2, 8, N // 16, 2, 4, 2]), [0, 4, 1, 3, 6, 5, 2, 7])
    b = gl.convert_layout(gl.reshape(b, [R * N // 256, 256]), layout, assert_trivial=True)
    gl.store(p + o_r[:, None] * 256 + o_c[None, :], b)


@gluon.jit
def load_stage(
    t_q, t_k, t_v, t_a, t_rk, t_rq, t_gs, q, k, v, a, rk, rq, gs, i_c, slot, T, H, HV, q_st, k_st, v_st,
    K: gl.constexpr, KEYS: gl.constexpr, V: gl.constexpr, EVEN: gl.constexpr, RQ: gl.constexpr,
):  # fmt: skip
    """Starts copying what a scan needs of chunk i_c; v is do in the reverse one. Keys of KEYS columns become K."""
    length = T - i_c * C
    i_c = gl.to_tensor(i_c).to(gl.int64)
    o_c = gl.arange(0, C, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    copy_tile(t_k.index(slot), k + i_c * C * k_st, k_st, length, K, EVEN, KEYS)
    copy_tile(t_q.index(slot), q + i_c * C * q_st, q_st, length, K, EVEN, KEYS)
    copy_tile(t_v.index(slot), v + i_c * C * v_st, v_st, length, V, EVEN, V)
    copy_tile(t_a.index(slot), a + i_c * HV * C * C, C, C, C, True, C)
    if rk is not None:
        async_load(t_rk.index(slot), rk + i_c * H * C + o_c)
        if RQ:
            async_load(t_rq.index(slot), rq + i_c * H * C + o_c)
    if gs is not None:
        async_load(t_gs.index(slot), gs + i_c * HV * C + o_c)


STEEP = gl.constexpr(64.0)  # log2 of what a chunk may lose for its factors to be taken apart


@gluon.jit
def fade_lower(b_p, t_gs, layout: gl.constexpr):
    """A product of which the lower triangle is kept, times what is left at the row's token of the column's. What
    overflows above it is not used; `tiles.decay` avoids that.
    """
    return b_p * gl.exp2(t_gs.load(gl.SliceLayout(1, layout))[:, None] - t_gs.load(gl.SliceLayout(0, layout))[None, :])


@gluon.jit
def last_of(t_x):
    """The last value of a line of shared memory, to all threads."""
    return gl.sum(t_x.slice(C - 1, 1).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def store_factors(t_f, first, t_gs, t_rk, rk, whole):
    """Of a chunk, to lines of shared memory, half of t_f's: exp(b), what is left at a token of what entered;
    -rk exp(b); what is left at the chunk's end of a token; and, where there is a fourth line, exp(-b).

    Each is computed once, where a program's threads would compute it 32 times. `whole` is log2 of what the chunk
    keeps.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    b_gs = t_gs.load(layout)
    b_x = gl.exp2(b_gs)
    t_f.index(first).store(b_x)
    t_f.index(first + 1).store(b_x * -t_rk.load(layout) if rk is not None else -b_x)
    t_f.index(first + 2).store(gl.exp2(whole - b_gs))
    if t_f.shape[0] == 8:
        t_f.index(first + 3).store(gl.exp2(-b_gs))


@gluon.jit
def fade_apart(b_p, t_f, first, t_gs, whole, layout: gl.constexpr):
    """`fade_lower` by `store_factors`' lines, two products in place of an exponential, where all of them are in
    range.
    """
    if whole > -STEEP:
        b_p *= t_f.index(first).load(gl.SliceLayout(1, layout))[:, None]
        b_p *= t_f.index(first + 3).load(gl.SliceLayout(0, layout))[None, :]
    else:
        b_p = fade_lower(b_p, t_gs, layout)
    return b_p


@gluon.jit
def store_scores(t_p, b_p, layout: gl.constexpr):
    """lower(Q K^T) to shared memory. Before the tensor cores read it there must be a fence."""
    o_i = gl.arange(0, C, gl.SliceLayout(1, layout))
    o_j = gl.arange(0, C, gl.SliceLayout(0, layout))
    t_p.store(gl.where(o_i[:, None] >= o_j[None, :], b_p, 0.0).to(gl.bfloat16))
