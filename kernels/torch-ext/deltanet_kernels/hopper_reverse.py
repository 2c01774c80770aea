"""The reverse scan of `chunk_backward.py` for Hopper, in Gluon; see `hopper_scan.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._launch import launch
from .configs import CHUNK
from .hopper_tiles import STAGES, load_stage, locate_sequence, store_fragments, store_tile


# ---------------------------------------------------------------------------------------------------------- kernels


@gluon.jit
def reverse_kernel(
    # inputs; a, rq and rk as forward left them
    q, k, do, a, rq, rk, dht,
    # outputs; ds, in tiles like s: gradient of the state leaving a chunk
    dv, ds, dh0,
    # packed sequences
    cu_seqlens, chunk_offsets,
    # sizes and strides
    scale, T, NT, H, HV, HV_ALL,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, d_sb, d_st, d_sh,
    # constants
    K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, L2NORM: gl.constexpr, PACKED: gl.constexpr, EVEN: gl.constexpr,
    HAS_DHT: gl.constexpr, HAS_DH0: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Runs one sequence and value head from the last chunk to the first, 64 value columns a warp group."""
    i_hv = gl.program_id(0)
    i_n = gl.program_id(1)
    i_h = i_hv // (HV // H)
    i_b, bos, row, T, NT, chunk_0 = locate_sequence(cu_seqlens, chunk_offsets, i_n, T, NT, C, PACKED)
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    do += i_b * d_sb + bos * d_st + i_hv * d_sh
    dv += (row * HV_ALL + i_hv) * V
    ds += (chunk_0 * HV + i_hv) * V * K
    a += (chunk_0 * HV + i_hv) * C * C
    rk += (chunk_0 * H + i_h) * C
    rq += (chunk_0 * H + i_h) * C
    p_h = (i_n.to(gl.int64) * HV_ALL + i_hv) * K * V

    BF16: gl.constexpr = gl.bfloat16
    square_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], BF16)
    value_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, V], BF16)
    key_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, K], BF16)
    line_tile: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    t_q = gl.allocate_shared_memory(BF16, [STAGES, C, K], key_tile)
    t_k = gl.allocate_shared_memory(BF16, [STAGES, C, K], key_tile)
    t_do = gl.allocate_shared_memory(BF16, [STAGES, C, V], value_tile)  # later the chunk's dv
    t_a = gl.allocate_shared_memory(BF16, [STAGES, C, C], square_tile)
    t_p = gl.allocate_shared_memory(BF16, [C, C], square_tile)
    t_rk = gl.allocate_shared_memory(gl.float32, [STAGES, C], line_tile)
    t_rq = gl.allocate_shared_memory(gl.float32, [STAGES, C], line_tile)

    GROUPS: gl.constexpr = V // 64
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, C, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, K, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    left_w: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    o_i = gl.arange(0, C, gl.SliceLayout(1, square))
    o_j = gl.arange(0, C, gl.SliceLayout(0, square))

    b_s = gl.zeros([V, K], gl.float32, wide)
    p_s = (
        p_h + gl.arange(0, K, gl.SliceLayout(0, wide))[None, :] * V + gl.arange(0, V, gl.SliceLayout(1, wide))[:, None]
    )
    if HAS_DHT:
        b_s = gl.load(dht + p_s)
    for i in gl.static_range(STAGES):
        if i < NT:
            load_stage(
                t_q, t_k, t_do, t_a, t_rk, t_rq, q, k, do, a, rk, rq, NT - 1 - i, i, T, H, HV, q_st, k_st, d_st,
                K, V, C, L2NORM, EVEN, True,
            )  # fmt: skip
        async_copy.commit_group()

    for i in range(NT):
        i_c = NT - 1 - i
        slot = i % STAGES
        t_kt = t_k.index(slot).permute([1, 0])
        async_copy.wait_group(STAGES - 1)
        fence_async_shared()
        b_c = b_s.to(BF16)
        store_fragments(ds + i_c.to(gl.int64) * HV * V * K, b_c, V, K)
        b_c = gl.convert_layout(b_c, left)

        # dU^T = dO'^T lower(Q K^T) + dS^T K^T with dO' = scale rq dO
        zero = gl.zeros([V, C], gl.float32, narrow)
        b_p = gl.zeros([C, C], gl.float32, square)
        b_p = warpgroup_mma(t_q.index(slot), t_kt, b_p, use_acc=False, is_async=True)
        b_u = warpgroup_mma(b_c, t_kt, zero, use_acc=False, is_async=True)
        b_do = t_do.index(slot).permute([1, 0]).load(left).to(gl.float32)
        b_do = b_do * (t_rq.index(slot).load(gl.SliceLayout(0, left)) * scale)[None, :] if L2NORM else b_do * scale
        b_do = b_do.to(BF16)
        b_p = warpgroup_mma_wait(1, deps=[b_p])
        t_p.store(gl.where(o_i[:, None] >= o_j[None, :], b_p, 0.0).to(BF16))
        fence_async_shared()
        b_u = warpgroup_mma(b_do, t_p, b_u, is_async=True)
        # dS^T <- dS^T + dO'^T Q - (rk dV)^T K
        b_s = warpgroup_mma(gl.convert_layout(b_do, left_w), t_q.index(slot), b_s, is_async=True)
        b_u = warpgroup_mma_wait(1, deps=[b_u])
        # dV^T = dU^T A
        b_v = warpgroup_mma(gl.convert_layout(b_u.to(BF16), left), t_a.index(slot), zero, use_acc=False, is_async=True)
        b_s, b_v = warpgroup_mma_wait(0, deps=[b_s, b_v])
        b_w = b_v * -t_rk.index(slot).load(gl.SliceLayout(0, narrow))[None, :] if L2NORM else -b_v
        b_w = gl.convert_layout(b_w.to(BF16), left_w)
        b_s = warpgroup_mma(b_w, t_k.index(slot), b_s, is_async=True)
        t_do.index(slot).permute([1, 0]).store(b_v.to(BF16))
        p_v = dv + i_c.to(gl.int64) * C * HV_ALL * V
        store_tile(p_v, HV_ALL * V, t_do.index(slot), T - i_c * C, V, EVEN)
        b_s = warpgroup_mma_wait(0, deps=[b_s])

        if i + STAGES < NT:
            load_stage(
                t_q, t_k, t_do, t_a, t_rk, t_rq, q, k, do, a, rk, rq, i_c - STAGES, slot, T, H, HV, q_st, k_st,
                d_st, K, V, C, L2NORM, EVEN, True,
            )  # fmt: skip
        async_copy.commit_group()

    if HAS_DH0:
        gl.store(dh0 + p_s, b_s)


# --------------------------------------------------------------------------------------------------------- launchers


def reverse(q, k, do, a, rq, rk, dht, dv, ds, dh0, scale, t, cu_seqlens) -> None:
    """Writes dv and ds, and dh0 where it is given; the heads of dv, dht and dh0 may be a slice of more."""
    H, K = k.shape[2:]
    HV, V = do.shape[2:]
    launch(
        reverse_kernel, (HV, t.n),
        (
            q, k, do, a, a if rq is None else rq, a if rk is None else rk, a if dht is None else dht, dv, ds,
            a if dh0 is None else dh0, cu_seqlens, t.chunk_offsets,
        ),
        (scale, k.shape[1], t.nt, H, HV, dv.stride(1) // V, *q.stride()[:3], *k.stride()[:3], *do.stride()[:3]),
        {
            "K": K, "V": V, "C": CHUNK, "L2NORM": rk is not None, "PACKED": cu_seqlens is not None, "EVEN": t.even,
            "HAS_DHT": dht is not None, "HAS_DH0": dh0 is not None, "STAGES": STAGES,
        },
        {"num_warps": V // 16},
    )  # fmt: skip
