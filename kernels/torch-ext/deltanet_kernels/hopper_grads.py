"""The gradients of `grads.py` for Hopper, in Gluon, Triton's language with explicit layouts.

Same formulas, same scratch. Where `grads_kernel` needs two programs a chunk, which read most tiles twice, and waits
after each product, here one program loads every tile once, all of them before its first wait, and issues products that
do not depend on each other together. Two such programs share a multiprocessor: one computes while the other loads.

E^T and R^T are not computed: E and R stand in shared memory as they were rounded, and the tensor cores turn them as
they read them.

What goes from warp to warp through shared memory, in a sum or a change of layout, takes the place of a tile that no
line further down names, and Triton does not see what a product on its way still reads. So it happens while every tile
is still named, or where no product is on its way.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from ._launch import launch
from .hopper_beside import chunk_in_order, wait_for_chunk
from .hopper_tiles import C, copy_tile, fade_lower, load_fragments, store_tile
from .layout import Inputs, Scratch, Tables
from .plan import Plan
from .tiles import locate_chunk, norm_backward


LEAST = gl.constexpr(1e-20)  # of factors by which what stands in an accumulator is divided, and multiplied again


# ---------------------------------------------------------------------------------------------------------- kernels


@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def row_products(t_x, b_y):
    """The inner products of the rows of a tile in shared memory and of one in registers."""
    return gl.sum(t_x.load(b_y.type.layout).to(gl.float32) * b_y.to(gl.float32), 1)


@gluon.jit
def grads_kernel(
    # inputs; dv as the reverse scan wrote it; uv may be None; rq and rk None without the L2 norm, gs without a gate;
    # flags where that scan still runs
    q, k, do, a, u, dv, s, ds, uv, rq, rk, gs, flags,
    # outputs, dq and dk with rows of their own for each value head; dg with a gate
    dq, dk, dbeta, dg,
    # packed sequences
    cu_seqlens, chunks,
    # sizes and strides
    scale, T, NT, HV,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, d_sb, d_st, d_sh,
    # constants; G the value heads of a key head; K columns of a tile, of which KEYS are there
    G: gl.constexpr, K: gl.constexpr, KEYS: gl.constexpr, V: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """One chunk and value head: dq, dk, dbeta and, with a gate, dg. Tiles of values have 64 columns, as the scans cut
    them. With eight warps each four have half of the columns of each product.

    With flags the reverse scan still runs (`hopper_beside.py`).
    """
    i_hv = gl.program_id(0)
    i_h = i_hv // G
    i_t = chunk_in_order(NT, cu_seqlens is not None) if flags is not None else gl.program_id(1)
    T_all = T
    i_b, i_c, bos, T = locate_chunk(i_t, chunks, cu_seqlens, T, NT)
    if cu_seqlens is not None and T == 0:  # beyond the last chunk: the host knows only an upper bound
        if flags is not None:
            gdc_wait()
        return
    length = T - i_c * C
    bos += i_c * C
    chunk = i_t.to(gl.int64)
    row = i_b * T_all + bos
    q += i_b * q_sb + bos * q_st + i_h * q_sh
    k += i_b * k_sb + bos * k_st + i_h * k_sh
    do += i_b * d_sb + bos * d_st + i_hv * d_sh
    dv += (row * HV + i_hv) * V
    u += (chunk * HV + i_hv) * V * C
    s += (chunk * HV + i_hv) * V * K
    ds += (chunk * HV + i_hv) * V * K
    a += (chunk * HV + i_hv) * C * C

    NV: gl.constexpr = V // 64
    BF16: gl.constexpr = gl.bfloat16
    value_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, C], BF16)
    key_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, K], BF16)
    line_tile: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    t_do = gl.allocate_shared_memory(BF16, [NV, C, 64], value_tile)
    t_dv = gl.allocate_shared_memory(BF16, [NV, C, 64], value_tile)
    t_u = gl.allocate_shared_memory(BF16, [NV, 64, C], value_tile)  # transposed, as the scans hold it
    t_s = gl.allocate_shared_memory(BF16, [NV, 64, K], key_tile)
    SHARED: gl.constexpr = K * V > 64 * 64  # the leaving state's gradient takes the entering state's place
    t_ds = t_s if SHARED else gl.allocate_shared_memory(BF16, [NV, 64, K], key_tile)
    t_q = gl.allocate_shared_memory(BF16, [C, K], key_tile)
    t_k = gl.allocate_shared_memory(BF16, [C, K], key_tile)
    t_rq = gl.allocate_shared_memory(gl.float32, [C], line_tile)

    GROUPS: gl.constexpr = gl.num_warps() // 4
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, K // GROUPS, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    o_i = gl.arange(0, C, gl.SliceLayout(1, square))
    o_j = gl.arange(0, C, gl.SliceLayout(0, square))
    o_w = gl.arange(0, C, gl.SliceLayout(1, wide))
    # norms along the rows of both kinds of accumulator
    b_rq = gl.full([C], 1.0, gl.float32, gl.SliceLayout(1, wide))
    b_rk = gl.full([C], 1.0, gl.float32, gl.SliceLayout(1, wide))
    b_rk_i = gl.full([C], 1.0, gl.float32, gl.SliceLayout(1, square))
    if rk is not None:
        rq += (chunk * (HV // G) + i_h) * C
        rk += (chunk * (HV // G) + i_h) * C
        b_rq = gl.load(rq + o_w)
        b_rk = gl.load(rk + o_w)
        b_rk_i = gl.load(rk + o_i)
    t_rq.store(b_rq)
    if gs is not None:
        gs += (chunk * HV + i_hv) * C
        t_gs = gl.allocate_shared_memory(gl.float32, [C], line_tile)
        t_gs.store(gl.load(gs + o_i))

    # everything is asked for before anything is waited for, first what the first products read (0.43 ms, was 0.50 the
    # other way round)
    b_u, b_s, b_ds = (), (), ()
    for h in gl.static_range(NV):
        b_u = b_u + (load_fragments(u + h * 64 * C, 64, C, C),)
        b_s = b_s + (load_fragments(s + h * 64 * K, 64, K, KEYS),)
    if flags is not None:
        wait_for_chunk(flags + ((chunk - i_c) * HV + i_hv) * NV, HV * NV, (T + C - 1) // C, i_c, NV)
    for h in gl.static_range(NV):
        copy_tile(t_dv.index(h), dv + h * 64, HV * V, length, 64, EVEN, 64)
        copy_tile(t_do.index(h), do + h * 64, d_st, length, 64, EVEN, 64)
    async_copy.commit_group()
    for h in gl.static_range(NV):
        b_ds = b_ds + (load_fragments(ds + h * 64 * K, 64, K, KEYS),)
    copy_tile(t_k, k, k_st, length, K, EVEN, KEYS)
    copy_tile(t_q, q, q_st, length, K, EVEN, KEYS)
    async_copy.commit_group()
    for h in gl.static_range(NV):
        t_u.index(h).store(b_u[h])
        t_s.index(h).store(b_s[h])
        if not SHARED:
            t_ds.index(h).store(b_ds[h])
    b_a = gl.load(a + o_i * C + o_i, mask=o_i < length, other=1.0).to(gl.float32)
    if uv is not None:
        uv += (chunk * HV + i_hv) * (V // 16) * C + o_i
        b_x = gl.load(uv)
        for i in gl.static_range(1, V // 16):
            b_x += gl.load(uv + i * C)
        gl.store(dbeta + (row + o_i) * HV + i_hv, (b_x / b_a / b_a).to(dbeta.dtype.element_ty), mask=o_i < length)
    if gs is not None:
        b_all = gl.load(gs + C - 1)
        b_before = gl.exp2(gl.load(gs + o_w))
        b_after = gl.maximum(gl.exp2(b_all - gl.load(gs + o_w)), LEAST)
    async_copy.wait_group(1)
    fence_async_shared()

    # 1. what needs the state: dq' = dO S^T, dk' = dV S^T
    b_dk = gl.zeros([C, K], gl.float32, wide)
    b_dq = gl.zeros([C, K], gl.float32, wide)
    for h in gl.static_range(NV):
        b_dk = warpgroup_mma(t_dv.index(h), t_s.index(h), b_dk, is_async=True)
        b_dq = warpgroup_mma(t_do.index(h), t_s.index(h), b_dq, is_async=True)
    if gs is not None:
        # <S, dS>, of the entering and the leaving state; here, so that no product waits for the latter
        b_through = row_products(t_s.index(0), b_ds[0])
        for h in gl.static_range(1, NV):
            b_through += row_products(t_s.index(h), b_ds[h])
    b_dk, b_dq = warpgroup_mma_wait(0, deps=[b_dk, b_dq])
    if SHARED:
        for h in gl.static_range(NV):
            t_ds.index(h).store(b_ds[h])
    if gs is not None:
        b_through = gl.sum(b_through, 0) * gl.exp2(b_all)
    b_dk *= (-b_rk * b_before if gs is not None else -b_rk)[:, None]
    b_dq *= (b_rq * scale * b_before if gs is not None else b_rq * scale)[:, None]

    # 2. E = -strictly_lower(rk dV U^T); its diagonal is dbeta's
    b_e = gl.zeros([C, C], gl.float32, square)
    for h in gl.static_range(NV):
        b_e = warpgroup_mma(t_dv.index(h), t_u.index(h), b_e, is_async=True)
    b_e = warpgroup_mma_wait(0, deps=[b_e])
    # by A's diagonal rk beta as it was rounded, not by rk beta^2: U and dV carry that rounding (error 0.0048, was
    # 0.0060); twice, because its square would leave fp32's range where beta is near its bound
    if uv is None:
        b_x = gl.sum(gl.where(o_i[:, None] == o_j[None, :], b_e, 0.0), 1) / b_a * b_rk_i / b_a
        gl.store(dbeta + (row + o_i) * HV + i_hv, b_x.to(dbeta.dtype.element_ty), mask=o_i < length)
    if gs is not None:
        b_e = fade_lower(b_e, t_gs, square)
    b_e = gl.where(o_i[:, None] > o_j[None, :], b_e * -b_rk_i[:, None], 0.0).to(BF16)
    t_dv.index(0).store(b_e)  # in whose place nothing reads any more
    async_copy.wait_group(0)
    fence_async_shared()
    b_dk = warpgroup_mma(gl.convert_layout(b_e, left), t_k, b_dk, is_async=True)

    # 3. R = lower(rq dO U^T)
    b_r = gl.zeros([C, C], gl.float32, square)
    for h in gl.static_range(NV):
        b_r = warpgroup_mma(t_do.index(h), t_u.index(h), b_r, is_async=True)
    b_dk, b_r = warpgroup_mma_wait(0, deps=[b_dk, b_r])
    if gs is not None:
        b_in = gl.sum(t_k.load(wide).to(gl.float32) * b_dk, 1)  # what comes into a token, but for o's
        b_dk *= (1.0 / b_after)[:, None]
    for h in gl.static_range(NV):
        b_dk = warpgroup_mma(t_u.index(h).permute([1, 0]), t_ds.index(h), b_dk, is_async=True)
    if gs is not None:
        b_r = fade_lower(b_r, t_gs, square)
    b_r *= (t_rq.load(gl.SliceLayout(1, square)) * scale)[:, None]
    b_r = gl.where(o_i[:, None] >= o_j[None, :], b_r, 0.0).to(BF16)
    t_do.index(0).store(b_r)
    fence_async_shared()
    if gs is not None or GROUPS > 1:  # with two groups R goes through shared memory to the product's left operand
        b_dk = warpgroup_mma_wait(0, deps=[b_dk])
    if gs is not None:
        b_dk *= b_after[:, None]
        b_through += gl.sum(gl.sum(t_k.load(wide).to(gl.float32) * b_dk, 1) - b_in, 0)

    # 4. what needs E^T and R
    b_dq = warpgroup_mma(gl.convert_layout(b_r, left), t_k, b_dq, is_async=True)
    b_dk = warpgroup_mma(t_do.index(0).permute([1, 0]), t_q, b_dk, is_async=True)
    b_dk = warpgroup_mma(t_dv.index(0).permute([1, 0]), t_k, b_dk, is_async=True)
    b_dq, b_dk = warpgroup_mma_wait(0, deps=[b_dq, b_dk])
    if gs is not None:
        b_k = t_k.load(wide).to(gl.float32)
        b_q = t_q.load(wide).to(gl.float32)
        b_qq = gl.sum(b_q * b_dq, 1)
        b_kk = gl.sum(b_k * b_dk, 1)
        if rk is not None:  # as `norm_backward`, whose sums these are
            b_dk -= b_k * (b_kk * b_rk * b_rk)[:, None]
            b_dq -= b_q * (b_qq * b_rq * b_rq)[:, None]
        line: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
        b_x = gl.associative_scan(gl.convert_layout(2.0 * b_in - b_kk + b_qq, line), 0, add, reverse=True)
        o_l = gl.arange(0, C, line)
        b_x = (b_x + b_through).to(dg.dtype.element_ty)
        gl.store(dg + (row + o_l) * HV + i_hv, b_x, mask=o_l < length)
    else:
        b_dk = norm_backward(b_dk, t_k.load(wide), b_rk, rk is not None)
        b_dq = norm_backward(b_dq, t_q.load(wide), b_rq, rk is not None)
    p_x = (row * HV + i_hv) * KEYS
    t_k.store(b_dk.to(BF16))
    store_tile(dk + p_x, HV * KEYS, t_k, length, K, EVEN, KEYS)
    t_q.store(b_dq.to(BF16))
    store_tile(dq + p_x, HV * KEYS, t_q, length, K, EVEN, KEYS)
    if flags is not None and i_c == 0:
        gdc_wait()


@triton.jit
def sum_heads_kernel(
    # inputs [2, B, T, H * G, K]: dq and dk of each value head; outputs [B, T, H, K]
    x, dq, dk,
    # packed sequences
    cu_seqlens, chunks,
    T, NT, PART, H,
    # constants; G the value heads of a key head; K columns of a tile, of which KEYS are there
    G: tl.constexpr, K: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Sums over the value heads of a key head, in one chunk; even programs dq, odd ones dk. PART numbers in each."""
    role = tl.program_id(0) % 2
    i_h = tl.program_id(0) // 2
    T_all = T
    i_b, i_c, bos, T = locate_chunk(tl.program_id(1), chunks, cu_seqlens, T, NT)
    if T == 0:
        return
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, K)
    m = (i_c * C + o_c < T)[:, None]
    if KEYS < K:
        m &= (o_k < KEYS)[None, :]
    p = (i_b * T_all + bos + i_c * C + o_c) * H + i_h
    x += (i_h * 0 + role).to(tl.int64) * PART
    b = tl.zeros([C, K], tl.float32)
    for i_g in tl.static_range(G):
        b += tl.load(x + (p * G + i_g)[:, None] * KEYS + o_k[None, :], mask=m, other=0.0).to(tl.float32)
    if role == 0:
        tl.store(dq + p[:, None] * KEYS + o_k[None, :], b.to(dq.dtype.element_ty), mask=m)
    else:
        tl.store(dk + p[:, None] * KEYS + o_k[None, :], b.to(dk.dtype.element_ty), mask=m)


# --------------------------------------------------------------------------------------------------------- launchers


def grads(
    x: Inputs, do, scratch: Scratch, t: Tables, plan: Plan, scale: float, dv, ds, uv, flags, dq, dk, dbeta, dg
) -> None:
    """Writes dq, dk, dbeta and, with a gate, dg. `flags` as `hopper_reverse.reverse` was given them."""
    q, k = x.q, x.k
    H, K = k.shape[2:]
    HV, V = do.shape[2:]
    a, _, rq, rk, u, s, gs = scratch
    G = HV // H
    parts = q.new_empty(2, *q.shape[:2], HV, K) if G > 1 else None
    dq_heads, dk_heads = (dq, dk) if parts is None else (parts[0], parts[1])  # unpacked, a call is never played again
    launch(
        grads_kernel, (HV, t.n_chunks),
        (
            q, k, do, a, u, dv, s, ds, uv, rq, rk, gs, flags, dq_heads, dk_heads, dbeta, dg,
            t.cu_seqlens, t.chunks,
        ),
        (scale, q.shape[1], t.nt, HV, *q.stride()[:3], *k.stride()[:3], *do.stride()[:3]),
        {"G": G, "K": plan.key_tile, "KEYS": K, "V": V, "EVEN": t.even},
        {"num_warps": plan.grads.num_warps, "maxnreg": plan.grads.maxnreg, "launch_pdl": flags is not None},
    )  # fmt: skip
    if parts is not None:
        launch(
            sum_heads_kernel, (2 * H, t.n_chunks),
            (parts, dq, dk, t.cu_seqlens, t.chunks),
            (q.shape[1], t.nt, dq_heads.numel(), H),
            {"G": G, "K": plan.key_tile, "KEYS": K},
            {"num_warps": 4},
        )  # fmt: skip
