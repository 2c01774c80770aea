"""The reverse scan of `reverse.py` for Hopper, in Gluon; see `hopper_scan.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._launch import launch
from .hopper_beside import let_dependents_start, say_all_written, say_written
from .hopper_tiles import (
    STAGES,
    C,
    fade_lower,
    last_of,
    load_fragments,
    load_stage,
    store_factors,
    store_fragments,
    store_scores,
    store_tile,
)
from .layout import Inputs, Scratch, Tables
from .plan import Launch
from .tiles import locate_sequence


# ---------------------------------------------------------------------------------------------------------- kernels


@gluon.jit
def store_sums(p, b_v, b_u):
    """Sums of b_v * b_u over 16 rows, which one warp holds: no warp waits for another."""
    R: gl.constexpr = b_v.shape[0] // 16
    b_x = gl.sum(gl.reshape(b_v * b_u.to(gl.float32), [R, 16, C]), 1)
    o_r = gl.arange(0, R, gl.SliceLayout(1, b_x.type.layout))
    o_c = gl.arange(0, C, gl.SliceLayout(0, b_x.type.layout))
    gl.store(p + o_r[:, None] * C + o_c[None, :], b_x)


# with the one chunk as a constant Triton 3.6 fails an assertion
@gluon.jit(do_not_specialize=["NT"])
def reverse_kernel(
    # inputs; a, rq, rk, gs and u as forward left them, or None: rq and rk without the L2 norm, gs without a gate, u
    # without uv
    q, k, do, a, rq, rk, gs, u, dht,
    # outputs or None; ds, in tiles like s: gradient of the state leaving a chunk; uv: parts of
    # diag(dV U^T); flags: the gradients run meanwhile
    dv, ds, uv, dh0, flags,
    # packed sequences
    cu_seqlens, chunk_offsets,
    # sizes and strides
    scale, T, NT, q_sb, q_sh, k_sb, k_sh, d_sb, d_sh,
    # dv's stride is a number: as a constant it led ptxas to work out lower()'s mask anew for each chunk (1.5 % of all)
    dv_st,
    # constants; heads and a token's strides among them, see `hopper_scan.py`
    H: gl.constexpr, HV: gl.constexpr, q_st: gl.constexpr, k_st: gl.constexpr, d_st: gl.constexpr,
    K: gl.constexpr, KEYS: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, EVEN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Runs one sequence, value head and block of BV = 64 value columns from the last chunk to the first.

    Without dv only dh0 is written (first pass of a segmented scan). With flags the gradients run meanwhile.
    """
    i_v = gl.program_id(0) * BV
    i_hv = gl.program_id(1)
    i_n = gl.program_id(2)
    i_h = i_hv // (HV // H)
    i_b, bos, row, T, NT, chunk_0 = locate_sequence(i_n, chunk_offsets, cu_seqlens, T, NT)
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    do += i_b * d_sb + bos * d_st + i_hv * d_sh + i_v
    a += (chunk_0 * HV + i_hv) * C * C
    if dv is not None:
        dv += (row * HV + i_hv) * V + i_v
        ds += ((chunk_0 * HV + i_hv) * V + i_v) * K
    if uv is not None:
        u += ((chunk_0 * HV + i_hv) * V + i_v) * C
        uv += ((chunk_0 * HV + i_hv) * V + i_v) // 16 * C
    FLAGS: gl.constexpr = HV * (V // BV)  # of a chunk
    if flags is not None:
        flags += chunk_0 * FLAGS + i_hv * (V // BV) + gl.program_id(0)
    if gs is not None:
        gs += (chunk_0 * HV + i_hv) * C
    if rk is not None:
        rk += (chunk_0 * H + i_h) * C
        rq += (chunk_0 * H + i_h) * C
    p_h = (i_n.to(gl.int64) * HV + i_hv) * KEYS * V + i_v

    BF16: gl.constexpr = gl.bfloat16
    square_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], BF16)
    value_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], BF16)
    key_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, K], BF16)
    line_tile: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    t_q = gl.allocate_shared_memory(BF16, [STAGES, C, K], key_tile)
    t_k = gl.allocate_shared_memory(BF16, [STAGES, C, K], key_tile)
    t_do = gl.allocate_shared_memory(BF16, [STAGES, C, BV], value_tile)
    t_a = gl.allocate_shared_memory(BF16, [STAGES, C, C], square_tile)
    t_p = gl.allocate_shared_memory(BF16, [2, C, C], square_tile)
    t_dv = gl.allocate_shared_memory(BF16, [C, BV], value_tile)
    t_rk = gl.allocate_shared_memory(gl.float32, [STAGES, C], line_tile)
    t_rq = gl.allocate_shared_memory(gl.float32, [STAGES, C], line_tile)
    t_gs = gl.allocate_shared_memory(gl.float32, [STAGES, C], line_tile) if gs is not None else None
    t_f = gl.allocate_shared_memory(gl.float32, [6, C], line_tile) if gs is not None else None

    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    left_w: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, narrow)
    zero = gl.zeros([BV, C], gl.float32, narrow)

    b_s = gl.zeros([BV, K], gl.float32, wide)
    o_k = gl.arange(0, K, gl.SliceLayout(0, wide))
    p_s = p_h + o_k[None, :] * V + gl.arange(0, BV, gl.SliceLayout(1, wide))[:, None]
    m_s = gl.full([BV, K], True, gl.int1, wide) & (o_k < KEYS)[None, :]
    if dht is not None:
        b_s = gl.load(dht + p_s) if KEYS == K else gl.load(dht + p_s, mask=m_s, other=0.0)
    for i in gl.static_range(STAGES - 1):
        if i < NT:
            load_stage(
                t_q, t_k, t_do, t_a, t_rk, t_rq, t_gs, q, k, do, a, rk, rq, gs, NT - 1 - i, i,
                T, H, HV, q_st, k_st, d_st, K, KEYS, BV, EVEN, True,
            )  # fmt: skip
        async_copy.commit_group()
    if flags is not None:
        let_dependents_start(flags, FLAGS, NT)
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    b_p = warpgroup_mma(t_q.index(0), t_k.index(0).permute([1, 0]), zero, use_acc=False, is_async=True)
    b_p = warpgroup_mma_wait(0, deps=[b_p])
    if gs is not None:
        b_p = fade_lower(b_p, t_gs.index(0), narrow)
        if rk is None:
            b_p *= scale
    store_scores(t_p.index(0), b_p, narrow)
    if gs is not None:
        store_factors(t_f, 0, t_gs.index(0), t_rk.index(0), rk, last_of(t_gs.index(0)))

    for i in range(NT):
        i_c = NT - 1 - i
        slot = i % STAGES
        after = (i + 1) % STAGES
        async_copy.wait_group(STAGES - 3)
        fence_async_shared()
        if flags is not None:
            say_written(flags, FLAGS, NT, i)
        b_c = b_s.to(BF16)
        # dU^T = dS^T K^T + dO'^T lower(Q K^T) with dO' = scale rq dO; with a gate but no norm lower() holds the
        # scale, so that dO is not rounded again
        b_u = warpgroup_mma(
            gl.convert_layout(b_c, left), t_k.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True
        )
        if dv is not None:
            store_fragments(ds + i_c.to(gl.int64) * HV * V * K, b_c, BV, K)
        b_do = t_do.index(slot).permute([1, 0]).load(left)
        b_dq = b_do.to(gl.float32)
        b_dq = (
            b_dq * (t_rq.index(slot).load(gl.SliceLayout(0, left)) * scale)[None, :]
            if rk is not None
            else b_dq * scale
        )
        if gs is not None:
            b_s *= last_of(t_f.index(i % 2 * 3))
            b_faded = (b_dq * t_f.index(i % 2 * 3).load(gl.SliceLayout(0, left))[None, :]).to(BF16)
            b_do = b_dq.to(BF16) if rk is not None else b_do
            b_dq = b_faded
        else:
            b_do = b_dq.to(BF16)
            b_dq = b_do
            b_u = warpgroup_mma(b_do, t_p.index(i % 2), b_u, is_async=True)
        # dS^T <- dS^T + dO'^T Q - (rk dV)^T K
        b_s = warpgroup_mma(gl.convert_layout(b_dq, left_w), t_q.index(slot), b_s, is_async=True)
        if dv is not None:
            # dV of the chunk before; in the first turn whatever lies there, which the second replaces
            last = gl.minimum(i_c + 1, NT - 1)
            # unsigned: of a signed stride the upper halves of four offsets stay in registers, and others are spilled
            row_st = dv_st if gs is None else dv_st.to(gl.uint32)
            store_tile(dv + last.to(gl.int64) * C * dv_st, row_st, t_dv, T - last * C, BV, EVEN, BV)
        if i + STAGES - 1 < NT:
            load_stage(
                t_q, t_k, t_do, t_a, t_rk, t_rq, t_gs, q, k, do, a, rk, rq, gs,
                i_c - STAGES + 1, (i + STAGES - 1) % STAGES, T, H, HV, q_st, k_st, d_st, K, KEYS, BV, EVEN, True,
            )  # fmt: skip
        async_copy.commit_group()
        if uv is not None:  # not at the start of the turn, where registers are scarce: 72 bytes would be spilled
            b_uu = load_fragments(u + i_c.to(gl.int64) * HV * V * C, BV, C, C)
        if gs is not None:
            b_after = t_f.index(i % 2 * 3 + 2).load(columns)
            b_u = warpgroup_mma_wait(1, deps=[b_u])
            b_u *= b_after[None, :]
            b_u = warpgroup_mma(b_do, t_p.index(i % 2), b_u, is_async=True)
            b_s, b_u = warpgroup_mma_wait(0, deps=[b_s, b_u])
        else:
            b_u = warpgroup_mma_wait(1, deps=[b_u])
        # dV^T = dU^T A
        b_v = warpgroup_mma(gl.convert_layout(b_u.to(BF16), left), t_a.index(slot), zero, use_acc=False, is_async=True)
        b_p = warpgroup_mma(t_q.index(after), t_k.index(after).permute([1, 0]), zero, use_acc=False, is_async=True)
        if gs is not None:
            b_x = t_f.index(i % 2 * 3 + 1).load(columns)
        b_s, b_v = warpgroup_mma_wait(1, deps=[b_s, b_v])
        if gs is not None:
            b_w = b_v * b_x[None, :]
        else:
            b_w = b_v * -t_rk.index(slot).load(columns)[None, :] if rk is not None else -b_v
        b_s = warpgroup_mma(gl.convert_layout(b_w.to(BF16), left_w), t_k.index(slot), b_s, is_async=True)
        if dv is not None:
            t_dv.permute([1, 0]).store(b_v.to(BF16))
        if uv is not None:
            store_sums(
                uv + i_c.to(gl.int64) * HV * (V // 16) * C, b_v, gl.convert_layout(b_uu, narrow, assert_trivial=True)
            )
        if gs is not None:
            store_factors(t_f, (i + 1) % 2 * 3, t_gs.index(after), t_rk.index(after), rk, last_of(t_gs.index(after)))
        b_p = warpgroup_mma_wait(1, deps=[b_p])
        if gs is not None:
            b_p = fade_lower(b_p, t_gs.index(after), narrow)
            if rk is None:
                b_p *= scale
        store_scores(t_p.index((i + 1) % 2), b_p, narrow)
        b_s = warpgroup_mma_wait(0, deps=[b_s])

    if dv is not None and NT > 0:
        store_tile(dv, dv_st, t_dv, T, BV, EVEN, BV)
        if flags is not None:
            say_all_written(flags, FLAGS, NT)
    if dh0 is not None:
        if KEYS == K:
            gl.store(dh0 + p_s, b_s)
        else:
            gl.store(dh0 + p_s, b_s, mask=m_s)


# --------------------------------------------------------------------------------------------------------- launchers


def reverse(
    x: Inputs, do, scratch: Scratch, t: Tables, scale: float, choice: Launch, key_tile: int,
    dht, dv, ds, uv, dh0, flags,
) -> None:  # fmt: skip
    """Writes dv and ds, or neither, and uv and dh0 where they are given. With flags, `hopper_grads.grads` must be next
    in the stream.
    """
    q, k = x.q, x.k
    H, K = k.shape[2:]
    HV, V = do.shape[2:]
    launch(
        reverse_kernel, (V // choice.columns, HV, t.n),
        (
            q, k, do, scratch.a, scratch.rq, scratch.rk, scratch.gs, None if uv is None else scratch.u, dht,
            dv, ds, uv, dh0, flags, t.cu_seqlens, t.chunk_offsets,
        ),
        (
            scale, k.shape[1], t.nt, q.stride(0), q.stride(2), k.stride(0), k.stride(2), do.stride(0), do.stride(2),
            HV * V,
        ),
        {
            "H": H, "HV": HV, "q_st": q.stride(1), "k_st": k.stride(1), "d_st": do.stride(1),
            "K": key_tile, "KEYS": K, "V": V, "BV": choice.columns, "EVEN": t.even, "STAGES": STAGES[choice.columns],
        },
        {"num_warps": choice.num_warps},
    )  # fmt: skip
