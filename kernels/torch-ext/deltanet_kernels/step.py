"""One token of decoding: a single launch that reads the state once and writes it once, in place.

e = v - S^T k        S <- S + k (beta e)^T        o = scale S^T q

With a gate S is exp(g) S, to begin with.
"""

import functools

import torch
import triton
import triton.language as tl

from . import _switch
from ._checks import (
    check_arguments,
    check_device,
    check_indices,
    check_values,
    refuse_gradients,
    refuse_transforms,
)
from ._launch import launch
from .limits import NORM_EPS
from .plan import multiprocessors
from .pools import find_state


__all__ = ["delta_rule_step", "gated_delta_rule_step"]

# The step is bound by memory: a 32-column block reads whole 128-byte lines, and 1024 elements a warp are eight
# 16-byte loads in flight in each thread (as many again in the other resident programs). When that leaves
# multiprocessors idle (batch 1), 16 columns double the programs for the price of half lines.
STEP_BLOCK, STEP_BLOCK_FEW, STEP_ELEMENTS_PER_WARP = 32, 16, 1024


@triton.jit
def _step_kernel(
    # inputs; g [B, 1, HV] or None; h [B, HV, K, V], or a pool for slots, is also an output, updated in place
    q, k, v, beta, g, h, slots,
    # output
    o,
    # sizes and strides
    scale, s_qb, s_qh, s_kb, s_kh, s_vb, s_vh, s_bb, s_bh, s_hb, s_hh, s_hk, s_hv,
    # constants
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_hv = pid % NV, (pid // NV) % HV
    i_h = i_hv // (HV // H)
    i_b = (pid // NV // HV).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_h = m_k[:, None] & m_v[None, :]

    if slots is None:
        p_h = h + i_b * s_hb + i_hv * s_hh + o_k[:, None] * s_hk + o_v[None, :]
    else:
        i_s, exists, _ = find_state(slots, None, i_b)
        p_h = h + i_s * s_hb + i_hv.to(tl.int64) * s_hh + o_k[:, None] * s_hk + o_v[None, :] * s_hv
        m_h = m_h & exists
    # The state first: its loads are the ones worth waiting for, the others arrive in their shadow.
    b_h = tl.load(p_h, mask=m_h, other=0.0)
    b_k = tl.load(k + i_b * s_kb + i_h * s_kh + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_q = tl.load(q + i_b * s_qb + i_h * s_qh + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(v + i_b * s_vb + i_hv * s_vh + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_beta = tl.load(beta + i_b * s_bb + i_hv * s_bh).to(tl.float32)
    if NORM:
        b_k *= tl.rsqrt(tl.sum(b_k * b_k, 0) + EPS)
        b_q *= tl.rsqrt(tl.sum(b_q * b_q, 0) + EPS)
    if g is not None:
        b_h *= tl.exp(tl.load(g + i_b * HV + i_hv).to(tl.float32))
    b_hk = tl.sum(b_h * b_k[:, None], 0)
    b_hq = tl.sum(b_h * b_q[:, None], 0)
    b_u = b_beta * (b_v - b_hk)
    tl.store(p_h, b_h + b_k[:, None] * b_u[None, :], mask=m_h)
    b_o = scale * (b_hq + tl.sum(b_k * b_q, 0) * b_u)
    if slots is not None:
        b_o = tl.where(exists, b_o, 0.0)
    tl.store(o + (i_b * HV + i_hv) * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)


def _launch_step(q, k, v, beta, g, state, scale, norm, slots):
    """o [B, 1, HV, V]; state is overwritten."""
    B, _, H, K = q.shape
    HV, V = v.shape[2:]
    o = torch.empty(B, 1, HV, V, device=v.device, dtype=v.dtype)
    BK, BV, columns, warps = _step_blocks(K, V, B * HV, q.device)
    launch(
        _step_kernel, (columns * B * HV,),
        (q, k, v, beta, g, state, slots, o),
        (
            scale, *[s for x in (q, k, v, beta) for s in x.stride()[0:3:2]], *state.stride()[:3],
            None if slots is None else state.stride(3),
        ),
        {"H": H, "HV": HV, "K": K, "V": V, "BK": BK, "BV": BV, "NORM": norm, "EPS": NORM_EPS},
        {"num_warps": warps},
    )  # fmt: skip
    return o


@functools.cache
def _step_blocks(K: int, V: int, rows: int, device: torch.device) -> tuple[int, int, int, int]:
    """Key rows and value columns of a program, programs along V, warps: `rows` states on this device."""
    BK = triton.next_power_of_2(K)
    BV = STEP_BLOCK if rows * triton.cdiv(V, STEP_BLOCK) >= multiprocessors(device.index) else STEP_BLOCK_FEW
    return BK, BV, triton.cdiv(V, BV), _step_warps(BK, BV)


def _step_warps(BK: int, BV: int) -> int:
    return max(1, min(8, BK * BV // STEP_ELEMENTS_PER_WARP))


@torch.library.custom_op("deltanet_kernels::delta_rule_step", mutates_args={"state"})
def _step_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None,
    state: torch.Tensor, scale: float, norm: bool, slots: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return _launch_step(q, k, v, beta, g, state, scale, norm, slots)


@_step_op.register_fake
def _(q, k, v, beta, g, state, scale, norm, slots):
    return v.new_empty(v.shape)


def delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token of decoding: one launch that reads the state once, writes it once, in place. Not differentiable.

    Args:
        q, k: [B, 1, H, K], float32, bfloat16 or float16; K at most 256.
        v: [B, 1, HV, V], HV a multiple of H, V at most 256.
        beta: [B, 1, HV].
        state: [B, HV, K, V] float32, last dimension contiguous; overwritten with the state after the token.
        scale: factor on q; K ** -0.5 by default.
        use_qk_l2norm_in_kernel: divide q and k by their lengths, x * rsqrt(sum x^2 + 1e-6).
        state_indices: [B] int32 or int64 on the device: `state` is a pool [slots, HV, K, V] float32 of any strides
            ([slots, HV, V, K] in memory: pass `pool.mT`), where row b's state has the place state_indices[b]. Of -1,
            padding, nothing is read or written, and o is zero. The host does not read them: none may lie outside of
            the pool, and of two rows with the same one it is left open what either reads and which state stays
            (`DELTANET_KERNELS=check` looks for both).

    Returns:
        o [B, 1, HV, V] in v's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, for T != 1, for a state that cannot be updated
            in place, and when a gradient is asked of it.
    """
    return _step("delta_rule_step", q, k, v, beta, None, state, scale, use_qk_l2norm_in_kernel, state_indices)


def gated_delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token of the gated rule, as `delta_rule_step`; g [B, 1, HV] is the log of the decay, at most 0."""
    return _step("gated_delta_rule_step", q, k, v, beta, g, state, scale, use_qk_l2norm_in_kernel, state_indices)


def _step(name, q, k, v, beta, g, state, scale, norm, state_indices):
    refuse_transforms(name)
    check_device(q, "delta_rule.delta_rule_step")
    scale = check_arguments(q, k, v, beta, scale, state, None, g, state_indices)
    if _switch.CHECKS:
        read = state if state_indices is None else check_indices(state, state_indices, None)
        check_values({"q": q, "k": k, "v": v, "beta": beta, "g": g, "state": read}, None, 1)
    if q.shape[1] != 1:
        raise ValueError(f"{name} takes one token, T = 1, got T = {q.shape[1]}")
    if state_indices is not None:
        state_indices = state_indices.contiguous()
    elif state.stride(3) != 1 and state.shape[3] != 1:
        raise ValueError(f"state must be contiguous in its last dimension, got strides {state.stride()}")
    refuse_gradients(name, q, k, v, beta, g, state)
    g = None if g is None else g.contiguous()
    step = _step_op if torch.compiler.is_compiling() else _launch_step
    return step(q, k, v, beta, g, state, scale, norm, state_indices)
