"""What the delta rule's functions accept. Shared by the chunked and the token-by-token form.

Messages are put together only when they are needed: torch.compile would take the sizes in them for constants, and
compile again for each length.
"""

import warnings

import torch
from triton import knobs

from .limits import MAX_HEAD_SIZE


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = knobs.runtime.interpret
MANY_HEADS = 256  # more than models have: a time axis, rather. (fla warned where T < H, which a short prompt is, too.)


def check_device(x: torch.Tensor, instead: str) -> None:
    """Raises ValueError where Triton would say "0 active drivers"."""
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            f"the kernels of deltanet_kernels compute on a CUDA device, got tensors on {x.device}: "
            f"call modeling_deltanet.{instead}, which takes the same arguments, or set TRITON_INTERPRET=1 "
            "before the import"
        )


def check_layout(head_first: bool, chunk_size: int | None = None) -> None:
    """fla's arguments that change nothing here, but for the layout that it gave up, too."""
    if head_first:
        raise ValueError("head_first=True is not supported: q, k and v must be [B, T, H, D], got [B, H, T, D]")
    if chunk_size not in (None, 16, 32, 64):
        raise ValueError(f"chunk_size must be 16, 32 or 64, got {chunk_size}")


def as_state(initial_state: torch.Tensor | None) -> torch.Tensor | None:
    """The state in fp32, in which the kernels carry it; autograd brings its gradient back into its dtype."""
    if initial_state is not None and initial_state.dtype in (torch.bfloat16, torch.float16):
        return initial_state.float()
    return initial_state


def check_values(tensors: dict[str, torch.Tensor | None], cu_seqlens: torch.Tensor | None, T: int) -> None:
    """For DELTANET_KERNELS=check: borders that fit T tokens, finite values, and decays. Waits for the GPU."""
    if torch.compiler.is_compiling():
        return
    if cu_seqlens is not None:
        borders = cu_seqlens.tolist()
        if borders[0] < 0 or borders[-1] > T or any(a > b for a, b in zip(borders, borders[1:])):
            raise ValueError(f"cu_seqlens must stay within 0 to T = {T} and never go back, got {borders}")
    for name, x in tensors.items():
        if x is not None and not x.isfinite().all():
            first = (~x.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name} must be finite, got {x[tuple(first)].item()} at {first}")
        if name == "g" and x is not None and (x > 0).any():  # a decay between two tokens is taken for at most 1
            raise ValueError(f"g must be at most 0, the log of a decay, got {x.max().item()}")


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    g: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
) -> float:
    """Raises ValueError for what the kernels cannot take; returns the scale. Reads no tensor's contents (no sync)."""
    if q.dim() != 4:
        raise ValueError(f"q must be [B, T, H, K], got {list(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q {list(q.shape)}, got {list(k.shape)}")
    B, T, H, K = q.shape
    if T < H and H > MANY_HEADS and not torch.compiler.is_compiling():
        warnings.warn(
            f"q has {T} tokens and {H} heads: is it [B, H, T, K]? The kernels want [B, T, H, K]", stacklevel=4
        )
    if v.dim() != 4 or v.shape[0] != B or v.shape[1] != T:
        raise ValueError(f"v must be [{B}, {T}, HV, V], got {list(v.shape)}")
    _, _, HV, V = v.shape
    if H == 0 or HV == 0 or HV % H:
        raise ValueError(f"v must have a multiple of q's {H} heads, got {HV}")
    if beta.shape != (B, T, HV):
        raise ValueError(f"beta must be [{B}, {T}, {HV}], got {list(beta.shape)}")
    if not (1 <= K <= MAX_HEAD_SIZE and 1 <= V <= MAX_HEAD_SIZE):
        raise ValueError(
            f"head sizes must be 1 to {MAX_HEAD_SIZE}, got {K} for q and k, {V} for v: "
            "modeling_deltanet.delta_rule.torch_chunk_delta_rule takes any"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"k and v must be {q.dtype} like q, got {k.dtype} and {v.dtype}")
    if not beta.is_floating_point():
        raise ValueError(f"beta must be a floating-point tensor, got {beta.dtype}")
    if g is not None and not (g.shape == beta.shape and g.is_floating_point()):
        raise ValueError(f"g must be [{B}, {T}, {HV}], a floating-point tensor, got {list(g.shape)} in {g.dtype}")
    device = q.device
    for name, x in (
        ("k", k),
        ("v", v),
        ("beta", beta),
        ("g", g),
        ("initial_state", initial_state),
        ("cu_seqlens", cu_seqlens),
    ):
        if x is not None and x.device != device:
            raise ValueError(f"{name} must be on q's device {device}, got {x.device}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 and x.shape[3] != 1 and x.numel() != 0:
            raise ValueError(f"{name} must be contiguous in its last dimension, got stride {x.stride(3)}")
    n = B
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"packed sequences (cu_seqlens) need B = 1, got {B}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must be [N + 1], got {list(cu_seqlens.shape)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        n = cu_seqlens.shape[0] - 1
    if state_indices is not None or has_initial_state is not None:
        check_pool(initial_state, state_indices, has_initial_state, n, (HV, K, V), torch.float32, device)
    elif initial_state is not None and initial_state.shape != (n, HV, K, V):
        raise ValueError(f"initial_state must be {[n, HV, K, V]}, got {list(initial_state.shape)}")
    elif initial_state is not None and initial_state.dtype != torch.float32:
        raise ValueError(f"initial_state must be float32, bfloat16 or float16, got {initial_state.dtype}")
    return K**-0.5 if scale is None else float(scale)


def check_pool(
    pool: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    n: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises ValueError for what is no pool of states `[slots, *shape]`, or does not say where those of n sequences
    are. Reads no tensor's contents.
    """
    if state_indices is None or pool is None:
        given, missing = ("has_initial_state", "state_indices") if pool is not None else ("state_indices", "pool")
        raise ValueError(f"{given} is for states in a pool, got no {missing}")
    if state_indices.shape != (n,) or state_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"state_indices must be int32 or int64 [{n}], got {state_indices.dtype} {list(state_indices.shape)}"
        )
    if has_initial_state is not None and (has_initial_state.shape != (n,) or has_initial_state.dtype != torch.bool):
        raise ValueError(
            f"has_initial_state must be bool [{n}], got {has_initial_state.dtype} {list(has_initial_state.shape)}"
        )
    if pool.dim() != len(shape) + 1 or pool.shape[1:] != shape or pool.dtype != dtype:
        raise ValueError(
            f"with state_indices the states must be {dtype} [slots, {str(list(shape))[1:]}, "
            f"got {pool.dtype} {list(pool.shape)}"
        )
    for name, x in (("state_indices", state_indices), ("has_initial_state", has_initial_state), ("the pool", pool)):
        if x is not None and x.device != device:
            raise ValueError(f"{name} must be on {device} as the other tensors, got {x.device}")


def refuse_gradients(function: str, *tensors: torch.Tensor | None) -> None:
    """Raise where a gradient is asked of what works on states in place."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(f"{function} has no backward: call it under torch.no_grad(), got requires_grad inputs")


def check_indices(pool: torch.Tensor, state_indices: torch.Tensor, has_initial_state: torch.Tensor | None):
    """For DELTANET_KERNELS=check: the states that a call reads from a pool. ValueError for an index outside of it, and
    for one that comes twice. Waits for the GPU.
    """
    if torch.compiler.is_compiling():
        return None
    indices, slots = state_indices.tolist(), pool.shape[0]
    for i, index in enumerate(indices):
        if not -1 <= index < slots:
            raise ValueError(f"state_indices must be -1 to {slots - 1}, one of the pool's slots, got {index} at {i}")
        if index >= 0 and index in indices[:i]:
            raise ValueError(f"state_indices must name a slot once, got {index} at {indices.index(index)} and {i}")
    read = state_indices >= 0
    return pool[state_indices[read if has_initial_state is None else read & has_initial_state]]


def refuse_transforms(function: str) -> None:
    """Raise where a transformation of `torch.func` is at work; torch itself speaks of a method that is missing
    here.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise ValueError(
            f"{function} cannot be transformed by torch.func (grad, vmap, jacrev, ...), since its kernels need "
            "tensors with memory: use torch.autograd, or the delta rule in torch's own operators"
        )
