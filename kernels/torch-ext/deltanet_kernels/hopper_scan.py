"""The forward scan of `chunk_forward.py` for Hopper, in Gluon, Triton's language with explicit layouts.

Same formulas, same scratch. Triton waits for each product before it issues the next; here only those wait that need a
result, so that the products off the chain S -> K S -> U -> S (P, Q S, A V) run in its gaps.
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
from .configs import CHUNK, EPS
from .hopper_tiles import STAGES, load_stage, locate_sequence, store_fragments, store_tile


# ---------------------------------------------------------------------------------------------------------- kernels


@gluon.jit
def scan_kernel(
    # inputs; a and rk as the prepare kernel wrote them
    q, k, v, a, rk, h0,
    # outputs; u and s, in tiles (`store_fragments`), only with SAVE; rq too
    o, u, s, rq, ht,
    # packed sequences
    cu_seqlens, chunk_offsets,
    # sizes and strides
    scale, T, NT, H, HV,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh,
    # constants
    K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, L2NORM: gl.constexpr, PACKED: gl.constexpr, EVEN: gl.constexpr,
    HAS_H0: gl.constexpr, HAS_HT: gl.constexpr, SAVE: gl.constexpr, EPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Runs one sequence and value head from the first chunk to the last, 64 value columns a warp group."""
    i_hv = gl.program_id(0)
    i_n = gl.program_id(1)
    i_h = i_hv // (HV // H)
    i_b, bos, row, T, NT, chunk_0 = locate_sequence(cu_seqlens, chunk_offsets, i_n, T, NT, C, PACKED)
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    v += i_b * v_sb + bos * v_st + i_hv * v_sh
    o += (row * HV + i_hv) * V
    u += (chunk_0 * HV + i_hv) * V * C
    s += (chunk_0 * HV + i_hv) * V * K
    a += (chunk_0 * HV + i_hv) * C * C
    rk += (chunk_0 * H + i_h) * C
    rq += (chunk_0 * H + i_h) * C
    p_h = (i_n.to(gl.int64) * HV + i_hv) * K * V

    BF16: gl.constexpr = gl.bfloat16
    square_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], BF16)
    value_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, V], BF16)
    key_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, K], BF16)
    line_tile: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    t_q = gl.allocate_shared_memory(BF16, [STAGES, C, K], key_tile)
    t_k = gl.allocate_shared_memory(BF16, [STAGES, C, K], key_tile)
    t_v = gl.allocate_shared_memory(BF16, [STAGES, C, V], value_tile)  # later the chunk's output
    t_a = gl.allocate_shared_memory(BF16, [STAGES, C, C], square_tile)
    t_p = gl.allocate_shared_memory(BF16, [C, C], square_tile)
    t_rk = gl.allocate_shared_memory(gl.float32, [STAGES, C], line_tile)
    t_rq = gl.allocate_shared_memory(gl.float32, [C], line_tile)

    GROUPS: gl.constexpr = V // 64
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, C, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * GROUPS, 1], [16, K, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    left_w: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, narrow)
    o_i = gl.arange(0, C, gl.SliceLayout(1, square))
    o_j = gl.arange(0, C, gl.SliceLayout(0, square))

    b_s = gl.zeros([V, K], gl.float32, wide)
    p_s = (
        p_h + gl.arange(0, K, gl.SliceLayout(0, wide))[None, :] * V + gl.arange(0, V, gl.SliceLayout(1, wide))[:, None]
    )
    if HAS_H0:
        b_s = gl.load(h0 + p_s)
    for i_c in gl.static_range(STAGES):
        if i_c < NT:
            load_stage(
                t_q, t_k, t_v, t_a, t_rk, t_rq, q, k, v, a, rk, rq, i_c, i_c, T, H, HV, q_st, k_st,
                v_st, K, V, C, L2NORM, EVEN, False,
            )  # fmt: skip
        async_copy.commit_group()

    for i_c in range(NT):
        slot = i_c % STAGES
        t_kt = t_k.index(slot).permute([1, 0])
        t_at = t_a.index(slot).permute([1, 0])
        async_copy.wait_group(STAGES - 1)
        fence_async_shared()
        b_c = b_s.to(BF16)
        if SAVE:
            store_fragments(s, b_c, V, K)
        b_c = gl.convert_layout(b_c, left)

        # (-rk K S)^T, and U^T = V^T A^T + (-rk K S)^T A^T
        zero = gl.zeros([V, C], gl.float32, narrow)
        b_x = warpgroup_mma(b_c, t_kt, zero, use_acc=False, is_async=True)
        b_u = warpgroup_mma(t_v.index(slot).permute([1, 0]), t_at, zero, use_acc=False, is_async=True)
        b_x = warpgroup_mma_wait(1, deps=[b_x])
        b_x = b_x * -t_rk.index(slot).load(columns)[None, :] if L2NORM else -b_x
        b_u = warpgroup_mma(gl.convert_layout(b_x.to(BF16), left), t_at, b_u, is_async=True)
        b_p = gl.zeros([C, C], gl.float32, square)
        b_p = warpgroup_mma(t_q.index(slot), t_kt, b_p, use_acc=False, is_async=True)
        b_u = warpgroup_mma_wait(1, deps=[b_u])
        b_u = b_u.to(BF16)
        if SAVE:
            store_fragments(u, b_u, V, C)
        # S^T <- S^T + U^T K
        b_s = warpgroup_mma(gl.convert_layout(b_u, left_w), t_k.index(slot), b_s, is_async=True)

        # O^T = scale rq (S^T Q^T + U^T lower(Q K^T)^T)
        b_o = warpgroup_mma(b_c, t_q.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)
        if L2NORM:
            rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4 * GROUPS, 1], [1, 0])
            b_q = t_q.index(slot).load(rows).to(gl.float32)
            b_rq = gl.rsqrt(gl.sum(b_q * b_q, 1) + EPS)
            t_rq.store(b_rq)
            if SAVE:
                gl.store(rq + gl.arange(0, C, gl.SliceLayout(1, rows)), b_rq)
        b_p = warpgroup_mma_wait(2, deps=[b_p])
        t_p.store(gl.where(o_i[:, None] >= o_j[None, :], b_p, 0.0).to(BF16))
        fence_async_shared()
        b_o = warpgroup_mma(gl.convert_layout(b_u, left), t_p.permute([1, 0]), b_o, is_async=True)
        b_s, b_o = warpgroup_mma_wait(0, deps=[b_s, b_o])
        b_o *= (t_rq.load(columns) * scale)[None, :] if L2NORM else scale
        t_v.index(slot).permute([1, 0]).store(b_o.to(BF16))
        store_tile(o, HV * V, t_v.index(slot), T - i_c * C, V, EVEN)

        if i_c + STAGES < NT:
            load_stage(
                t_q, t_k, t_v, t_a, t_rk, t_rq, q, k, v, a, rk, rq, i_c + STAGES, slot, T, H, HV, q_st, k_st,
                v_st, K, V, C, L2NORM, EVEN, False,
            )  # fmt: skip
        async_copy.commit_group()
        o += C * HV * V
        u += HV * V * C
        s += HV * V * K
        rq += C * H

    if HAS_HT:
        gl.store(ht + p_s, b_s)


# --------------------------------------------------------------------------------------------------------- launchers


def scan(q, k, v, a, rk, h0, o, u, s, rq, ht, scale, t, cu_seqlens) -> None:
    """Writes o, and u, s, rq and ht where they are given; `t` are the call's Tables. V is 64 or 128, K too."""
    H, K = k.shape[2:]
    HV, V = v.shape[2:]
    launch(
        scan_kernel, (HV, t.n),
        (
            q, k, v, a, a if rk is None else rk, a if h0 is None else h0, o, a if u is None else u, a if s is None else s,
            a if rq is None else rq, a if ht is None else ht, cu_seqlens, t.chunk_offsets,
        ),
        (scale, k.shape[1], t.nt, H, HV, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        {
            "K": K, "V": V, "C": CHUNK, "L2NORM": rk is not None, "PACKED": cu_seqlens is not None, "EVEN": t.even,
            "HAS_H0": h0 is not None, "HAS_HT": ht is not None, "SAVE": u is not None, "EPS": EPS, "STAGES": STAGES,
        },
        {"num_warps": V // 16},
    )  # fmt: skip
