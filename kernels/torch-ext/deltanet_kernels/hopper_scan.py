"""The scan of `scan.py` for Hopper, in Gluon, Triton's language with explicit layouts.

Same formulas, same scratch. Triton waits for each product before it issues the next; here only those wait that need a
result, so that the products off the chain S -> K S -> U -> S (P, Q S, A V) run in its gaps. P and the norms of q are
computed a chunk ahead and the output is stored a chunk later, so that one fence a chunk, at its start, covers all that
the tensor cores read: a fence waits for every store on its way.

No product may be on its way from one turn of the loop to the next, and what a wait returned must be used up before its
accumulator is written again: otherwise ptxas makes every product wait for the one before (C7514), or crashes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._launch import launch
from .hopper_tiles import (
    STAGES,
    C,
    fade_apart,
    last_of,
    load_stage,
    store_factors,
    store_fragments,
    store_scores,
    store_tile,
)
from .layout import Inputs, Scratch, Tables
from .limits import NORM_EPS
from .plan import Launch
from .pools import find_state
from .tiles import locate_sequence


EPS = gl.constexpr(NORM_EPS)


# ---------------------------------------------------------------------------------------------------------- kernels


@gluon.jit
def store_query_norms(t_q, t_rq, rq, exists, K: gl.constexpr, SAVE: gl.constexpr):
    """Reciprocal norms of a chunk's queries, to shared memory and with SAVE to rq, if the chunk exists."""
    # two or four threads a row: one or two shuffles a sum. Rows first, so that no bank of shared memory is asked twice
    N: gl.constexpr = gl.num_warps() // 2
    rows: gl.constexpr = gl.BlockedLayout([1, K // N], [32 // N, N], [gl.num_warps(), 1], [0, 1])
    b_q = t_q.load(rows).to(gl.float32)
    b_rq = gl.rsqrt(gl.sum(b_q * b_q, 1) + EPS)
    t_rq.store(b_rq)
    if SAVE:
        gl.store(rq + gl.arange(0, C, gl.SliceLayout(1, rows)), b_rq, mask=exists)


# with the one chunk as a constant Triton 3.6 fails an assertion
@gluon.jit(do_not_specialize=["NT"])
def scan_kernel(
    # inputs; a, rk and gs as the prepare kernel wrote them; rk and rq None without the L2 norm, gs without a gate
    # (with slots h0 and ht are one pool)
    q, k, v, a, rk, gs, h0, slots, goes_on,
    # outputs; u, s (in tiles, `store_fragments`) and ht may be None; rq is written with u
    o, u, s, rq, ht,
    # packed sequences
    cu_seqlens, chunk_offsets,
    # sizes and strides
    scale, T, NT, q_sb, q_sh, k_sb, k_sh, v_sb, v_sh, h_sn, h_sh,
    # constants; heads and a token's strides among them, so that of a tile's addresses a thread keeps one
    H: gl.constexpr, HV: gl.constexpr, q_st: gl.constexpr, k_st: gl.constexpr, v_st: gl.constexpr,
    h_sk: gl.constexpr, h_sv: gl.constexpr,
    K: gl.constexpr, KEYS: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, EVEN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Runs one sequence, value head and block of BV value columns, 64 a warp group, from the first chunk to the
    last.
    """
    i_v = gl.program_id(0) * BV
    i_hv = gl.program_id(1)
    i_n = gl.program_id(2)
    i_h = i_hv // (HV // H)
    i_b, bos, row, T, NT, chunk_0 = locate_sequence(i_n, chunk_offsets, cu_seqlens, T, NT)
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    v += i_b * v_sb + bos * v_st + i_hv * v_sh + i_v
    o += (row * HV + i_hv) * V + i_v
    a += (chunk_0 * HV + i_hv) * C * C
    if u is not None:
        u += ((chunk_0 * HV + i_hv) * V + i_v) * C
        s += ((chunk_0 * HV + i_hv) * V + i_v) * K
    if gs is not None:
        gs += (chunk_0 * HV + i_hv) * C
    if rk is not None:
        rk += (chunk_0 * H + i_h) * C
        rq += (chunk_0 * H + i_h) * C
    if slots is None:
        p_h = (i_n.to(gl.int64) * HV + i_hv) * KEYS * V + i_v
    else:
        i_s, exists, reads = find_state(slots, goes_on, i_n)
        p_h = i_s * h_sn + i_hv.to(gl.int64) * h_sh + i_v * h_sv

    BF16: gl.constexpr = gl.bfloat16
    square_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], BF16)
    value_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], BF16)
    key_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, K], BF16)
    line_tile: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    t_q = gl.allocate_shared_memory(BF16, [STAGES, C, K], key_tile)
    t_k = gl.allocate_shared_memory(BF16, [STAGES, C, K], key_tile)
    t_v = gl.allocate_shared_memory(BF16, [STAGES, C, BV], value_tile)
    t_a = gl.allocate_shared_memory(BF16, [STAGES, C, C], square_tile)
    t_rk = gl.allocate_shared_memory(gl.float32, [STAGES, C], line_tile)
    t_p = gl.allocate_shared_memory(BF16, [2, C, C], square_tile)
    t_rq = gl.allocate_shared_memory(gl.float32, [2, C], line_tile)
    t_o = gl.allocate_shared_memory(BF16, [C, BV], value_tile)
    t_gs = gl.allocate_shared_memory(gl.float32, [STAGES, C], line_tile) if gs is not None else None
    t_f = gl.allocate_shared_memory(gl.float32, [8, C], line_tile) if gs is not None else None

    GROUPS: gl.constexpr = BV // 64
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, C, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, K, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    left_w: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, narrow)
    zero = gl.zeros([BV, C], gl.float32, narrow)
    zero_p = gl.zeros([C, C], gl.float32, square)

    b_s = gl.zeros([BV, K], gl.float32, wide)
    o_k = gl.arange(0, K, gl.SliceLayout(0, wide))
    p_s = p_h + o_k[None, :] * h_sk + gl.arange(0, BV, gl.SliceLayout(1, wide))[:, None] * h_sv
    m_s = gl.full([BV, K], True, gl.int1, wide) & (o_k < KEYS)[None, :]
    if slots is not None:
        b_s = gl.load(h0 + p_s, mask=m_s & reads, other=0.0)
    elif h0 is not None:
        b_s = gl.load(h0 + p_s) if KEYS == K else gl.load(h0 + p_s, mask=m_s, other=0.0)
    for i_c in gl.static_range(STAGES - 1):
        if i_c < NT:
            load_stage(
                t_q, t_k, t_v, t_a, t_rk, t_rq, t_gs, q, k, v, a, rk, rq, gs, i_c, i_c, T, H, HV, q_st, k_st, v_st,
                K, KEYS, BV, EVEN, False,
            )  # fmt: skip
        async_copy.commit_group()
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    b_p = warpgroup_mma(t_q.index(0), t_k.index(0).permute([1, 0]), zero_p, use_acc=False, is_async=True)
    if rk is not None:
        store_query_norms(t_q.index(0), t_rq.index(0), rq, NT > 0, K, u is not None)
    b_p = warpgroup_mma_wait(0, deps=[b_p])
    if gs is not None:
        store_factors(t_f, 0, t_gs.index(0), t_rk.index(0), rk, last_of(t_gs.index(0)))
        b_p = fade_apart(b_p, t_f, 0, t_gs.index(0), last_of(t_gs.index(0)), square)
    store_scores(t_p.index(0), b_p, square)

    for i_c in range(NT):
        slot = i_c % STAGES
        after = (i_c + 1) % STAGES
        t_at = t_a.index(slot).permute([1, 0])
        async_copy.wait_group(STAGES - 3)
        fence_async_shared()
        b_c = b_s.to(BF16)
        b_f = gl.convert_layout(b_c, left)
        # (-rk K S)^T, and U^T = V^T A^T + (-rk K S)^T A^T
        b_x = warpgroup_mma(b_f, t_k.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)
        b_u = warpgroup_mma(t_v.index(slot).permute([1, 0]), t_at, zero, use_acc=False, is_async=True)
        if u is not None:
            store_fragments(s, b_c, BV, K)
        if gs is not None:
            b_s *= last_of(t_f.index(i_c % 2 * 4))
            store_factors(t_f, (i_c + 1) % 2 * 4, t_gs.index(after), t_rk.index(after), rk, last_of(t_gs.index(after)))
        # the output of the chunk before; in the first turn whatever lies there, which the second replaces
        last = gl.maximum(i_c - 1, 0)
        store_tile(o + last.to(gl.int64) * C * HV * V, HV * V, t_o, T - last * C, BV, EVEN, BV)
        if i_c + STAGES - 1 < NT:
            load_stage(
                t_q, t_k, t_v, t_a, t_rk, t_rq, t_gs, q, k, v, a, rk, rq, gs,
                i_c + STAGES - 1, (i_c + STAGES - 1) % STAGES, T, H, HV, q_st, k_st, v_st,
                K, KEYS, BV, EVEN, False,
            )  # fmt: skip
        async_copy.commit_group()
        b_x = warpgroup_mma_wait(1, deps=[b_x])
        if gs is not None:
            b_x *= t_f.index(i_c % 2 * 4 + 1).load(columns)[None, :]
        else:
            b_x = b_x * -t_rk.index(slot).load(columns)[None, :] if rk is not None else -b_x
        b_u = warpgroup_mma(gl.convert_layout(b_x.to(BF16), left), t_at, b_u, is_async=True)
        t_qt = t_q.index(slot).permute([1, 0])
        t_pt = t_p.index(i_c % 2).permute([1, 0])
        # S^T <- S^T + U^T K    O^T = scale rq (S^T Q^T + U^T lower(Q K^T)^T)
        if gs is None:
            b_p = warpgroup_mma(
                t_q.index(after), t_k.index(after).permute([1, 0]), zero_p, use_acc=False, is_async=True
            )
            b_u = warpgroup_mma_wait(1, deps=[b_u])
            b_u = b_u.to(BF16)
            b_s = warpgroup_mma(gl.convert_layout(b_u, left_w), t_k.index(slot), b_s, is_async=True)
            b_o = warpgroup_mma(b_f, t_qt, zero, use_acc=False, is_async=True)
            b_o = warpgroup_mma(gl.convert_layout(b_u, left), t_pt, b_o, is_async=True)
        else:
            # what the state gives to the output fades before the chunk's own is added
            b_o = warpgroup_mma(b_f, t_qt, zero, use_acc=False, is_async=True)
            b_after = t_f.index(i_c % 2 * 4 + 2).load(columns)
            b_u = warpgroup_mma_wait(1, deps=[b_u])
            b_w = gl.convert_layout((b_u * b_after[None, :]).to(BF16), left_w)
            b_u = b_u.to(BF16)
            b_s = warpgroup_mma(b_w, t_k.index(slot), b_s, is_async=True)
            b_before = t_f.index(i_c % 2 * 4).load(columns)
            b_o = warpgroup_mma_wait(1, deps=[b_o])
            b_o *= b_before[None, :]
            b_p = warpgroup_mma(
                t_q.index(after), t_k.index(after).permute([1, 0]), zero_p, use_acc=False, is_async=True
            )
            b_o = warpgroup_mma(gl.convert_layout(b_u, left), t_pt, b_o, is_async=True)
        if u is not None:
            store_fragments(u, b_u, BV, C)
        if rk is not None:
            store_query_norms(t_q.index(after), t_rq.index((i_c + 1) % 2), rq + C * H, i_c + 1 < NT, K, u is not None)
        b_p = warpgroup_mma_wait(3 if gs is None else 1, deps=[b_p])
        if gs is not None:
            b_p = fade_apart(b_p, t_f, (i_c + 1) % 2 * 4, t_gs.index(after), last_of(t_gs.index(after)), square)
        store_scores(t_p.index((i_c + 1) % 2), b_p, square)
        b_s, b_o = warpgroup_mma_wait(0, deps=[b_s, b_o])
        b_o *= (t_rq.index(i_c % 2).load(columns) * scale)[None, :] if rk is not None else scale
        if slots is not None:
            b_o = gl.where(exists, b_o, 0.0)
        t_o.permute([1, 0]).store(b_o.to(BF16))
        if u is not None:
            u += HV * V * C
            s += HV * V * K
        if rk is not None:
            rq += C * H

    if NT > 0:
        store_tile(o + (gl.to_tensor(NT) - 1).to(gl.int64) * C * HV * V, HV * V, t_o, T - (NT - 1) * C, BV, EVEN, BV)
    if ht is not None:
        if slots is not None:
            gl.store(ht + p_s, b_s, mask=m_s & exists)
        elif KEYS == K:
            gl.store(ht + p_s, b_s)
        else:
            gl.store(ht + p_s, b_s, mask=m_s)


# --------------------------------------------------------------------------------------------------------- launchers


def scan(x: Inputs, scratch: Scratch, t: Tables, scale: float, choice: Launch, key_tile: int, o, ht) -> None:
    """Writes o, ht where it is given, and u, s and rq where the scratch has them. K, V and the columns are 64 or
    128. States in a pool go back into it.
    """
    q, k, v, h0 = x.q, x.k, x.v, x.h0
    slots, goes_on = x.pool or (None, None)
    ht = ht if x.pool is None else h0
    H, K = k.shape[2:]
    HV, V = v.shape[2:]
    h_sk, h_sv = (V, 1) if x.pool is None else h0.stride()[2:]
    launch(
        scan_kernel, (V // choice.columns, HV, t.n),
        (
            q, k, v, scratch.a, scratch.rk, scratch.gs, h0, slots, goes_on, o, scratch.u, scratch.s, scratch.rq, ht,
            t.cu_seqlens, t.chunk_offsets,
        ),
        (
            scale, k.shape[1], t.nt, q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2),
            *([None] * 2 if x.pool is None else h0.stride()[:2]),
        ),
        {
            "H": H, "HV": HV, "q_st": q.stride(1), "k_st": k.stride(1), "v_st": v.stride(1),
            "h_sk": h_sk, "h_sv": h_sv,
            "K": key_tile, "KEYS": K, "V": V, "BV": choice.columns, "EVEN": t.even, "STAGES": STAGES[choice.columns],
        },
        {"num_warps": choice.num_warps},
    )  # fmt: skip
