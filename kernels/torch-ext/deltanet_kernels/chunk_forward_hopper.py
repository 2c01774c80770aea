"""The forward scan of `chunk_forward.py` for Hopper, in Gluon, Triton's language with explicit layouts.

Same formulas, same scratch. Triton waits for each product before it issues the next; here only those wait that need a
result, so that the products off the chain S -> K S -> U -> S (P, Q S, A V) run in its gaps.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_tiles import load_stage, store_fragments, store_tile


@gluon.jit
def scan_kernel(
    # inputs; a and rk as the prepare kernel wrote them; p only with STORED
    q, k, v, a, p, rk, h0,
    # outputs; u and s, in tiles (`store_fragments`), only with SAVE; rq too, which with STORED is an input
    o, u, s, rq, ht,
    # packed sequences
    cu_seqlens, chunk_offsets,
    # sizes and strides
    scale, T, NT, H, HV,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh,
    # constants
    K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, L2NORM: gl.constexpr, PACKED: gl.constexpr, EVEN: gl.constexpr,
    HAS_H0: gl.constexpr, HAS_HT: gl.constexpr, SAVE: gl.constexpr, EPS: gl.constexpr, STORED: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Runs one sequence, value head and block of 64 value columns from the first chunk to the last."""
    i_v = gl.program_id(0)
    i_hv = gl.program_id(1)
    i_n = gl.program_id(2)
    i_h = i_hv // (HV // H)
    row = i_n.to(gl.int64) * T
    i_b = i_n.to(gl.int64)
    bos = i_b * 0
    chunk_0 = i_b * NT
    if PACKED:
        i_b = i_b * 0
        bos = gl.load(cu_seqlens + i_n).to(gl.int64)
        row = bos
        T = (gl.load(cu_seqlens + i_n + 1) - bos).to(gl.int32)
        NT = (T + C - 1) // C
        chunk_0 = gl.load(chunk_offsets + i_n).to(gl.int64)
    NV: gl.constexpr = V // 64
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    v += i_b * v_sb + bos * v_st + i_hv * v_sh + i_v * 64
    o += (row * HV + i_hv) * V + i_v * 64
    u += ((chunk_0 * HV + i_hv) * NV + i_v) * 64 * C
    s += ((chunk_0 * HV + i_hv) * NV + i_v) * 64 * K
    a += (chunk_0 * HV + i_hv) * C * C
    p += (chunk_0 * H + i_h) * C * C
    rk += (chunk_0 * H + i_h) * C
    rq += (chunk_0 * H + i_h) * C
    p_h = (i_n.to(gl.int64) * HV + i_hv) * K * V + i_v * 64

    BF16: gl.constexpr = gl.bfloat16
    narrow_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, 64], BF16)
    key_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, K], BF16)
    line_tile: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    t_q = gl.allocate_shared_memory(BF16, [STAGES, C, K], key_tile)
    t_k = gl.allocate_shared_memory(BF16, [STAGES, C, K], key_tile)
    t_v = gl.allocate_shared_memory(BF16, [STAGES, C, 64], narrow_tile)  # later the chunk's output
    t_a = gl.allocate_shared_memory(BF16, [STAGES, C, C], narrow_tile)
    t_p = gl.allocate_shared_memory(BF16, [STAGES if STORED else 1, C, C], narrow_tile)
    t_rk = gl.allocate_shared_memory(gl.float32, [STAGES, C], line_tile)
    t_rq = gl.allocate_shared_memory(gl.float32, [STAGES if STORED else 1, C], line_tile)

    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, square, 2)
    left_w: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, square)
    o_i = gl.arange(0, C, gl.SliceLayout(1, square))
    o_j = gl.arange(0, C, columns)

    b_s = gl.zeros([64, K], gl.float32, wide)
    p_s = p_h + gl.arange(0, K, gl.SliceLayout(0, wide))[None, :] * V + gl.arange(0, 64, gl.SliceLayout(1, wide))[:, None]
    if HAS_H0:
        b_s = gl.load(h0 + p_s)
    for i_c in gl.static_range(STAGES):
        if i_c < NT:
            load_stage(
                t_q, t_k, t_v, t_a, t_p, t_rk, t_rq, q, k, v, a, p, rk, rq, NT * 0 + i_c, i_c, T, H, HV, q_st, k_st,
                v_st, K, C, L2NORM, EVEN, STORED, STORED,
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
            store_fragments(s, b_c, K)
        b_c = gl.convert_layout(b_c, left)

        # (-rk K S)^T, and U^T = V^T A^T + (-rk K S)^T A^T
        zero = gl.zeros([64, C], gl.float32, square)
        b_x = warpgroup_mma(b_c, t_kt, zero, use_acc=False, is_async=True)
        b_u = warpgroup_mma(t_v.index(slot).permute([1, 0]), t_at, zero, use_acc=False, is_async=True)
        b_x = warpgroup_mma_wait(1, deps=[b_x])
        b_x = b_x * -t_rk.index(slot).load(columns)[None, :] if L2NORM else -b_x
        b_u = warpgroup_mma(gl.convert_layout(b_x.to(BF16), left), t_at, b_u, is_async=True)
        if STORED:
            b_u = warpgroup_mma_wait(0, deps=[b_u])
        else:
            b_p = warpgroup_mma(t_q.index(slot), t_kt, zero, use_acc=False, is_async=True)
            b_u = warpgroup_mma_wait(1, deps=[b_u])
        b_u = b_u.to(BF16)
        if SAVE:
            store_fragments(u, b_u, C)
        # S^T <- S^T + U^T K
        b_s = warpgroup_mma(gl.convert_layout(b_u, left_w), t_k.index(slot), b_s, is_async=True)

        # O^T = scale rq (S^T Q^T) + U^T P^T; a P of this kernel lacks the factor
        b_o = warpgroup_mma(b_c, t_q.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True)
        b_u = gl.convert_layout(b_u, left)
        if STORED:
            b_s, b_o = warpgroup_mma_wait(0, deps=[b_s, b_o])
            b_o *= (t_rq.index(slot).load(columns) * scale)[None, :] if L2NORM else scale
            b_o = warpgroup_mma(b_u, t_p.index(slot).permute([1, 0]), b_o)
        else:
            if L2NORM:
                rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])
                b_q = t_q.index(slot).load(rows).to(gl.float32)
                b_rq = gl.rsqrt(gl.sum(b_q * b_q, 1) + EPS)
                t_rq.index(0).store(b_rq)
                if SAVE:
                    gl.store(rq + gl.arange(0, C, gl.SliceLayout(1, rows)), b_rq)
            b_p = warpgroup_mma_wait(2, deps=[b_p])
            t_p.index(0).store(gl.where(o_i[:, None] >= o_j[None, :], b_p, 0.0).to(BF16))
            fence_async_shared()
            b_o = warpgroup_mma(b_u, t_p.index(0).permute([1, 0]), b_o, is_async=True)
            b_s, b_o = warpgroup_mma_wait(0, deps=[b_s, b_o])
            b_o *= (t_rq.index(0).load(columns) * scale)[None, :] if L2NORM else scale
        t_v.index(slot).permute([1, 0]).store(b_o.to(BF16))
        store_tile(o, HV * V, t_v.index(slot), T - i_c * C, 64, EVEN)

        if i_c + STAGES < NT:
            load_stage(
                t_q, t_k, t_v, t_a, t_p, t_rk, t_rq, q, k, v, a, p, rk, rq, i_c + STAGES, slot, T, H, HV, q_st, k_st,
                v_st, K, C, L2NORM, EVEN, STORED, STORED,
            )  # fmt: skip
        async_copy.commit_group()
        o += C * HV * V
        u += HV * NV * 64 * C
        s += HV * NV * 64 * K
        rq += C * H * (0 if STORED else 1)

    if HAS_HT:
        gl.store(ht + p_s, b_s)
