"""What the delta rule's functions accept. Shared by the chunked and the token-by-token form.

Messages are put together only when they are needed: torch.compile would take the sizes in them for constants, and
compile again for each length.
"""

import torch


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_SIZE = 256


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> float:
    """Raises ValueError for what the kernels cannot take; returns the scale. Reads no tensor's contents (no sync)."""
    if q.dim() != 4:
        raise ValueError(f"q must be [B, T, H, K], got {list(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q {list(q.shape)}, got {list(k.shape)}")
    B, T, H, K = q.shape
    if v.dim() != 4 or v.shape[0] != B or v.shape[1] != T:
        raise ValueError(f"v must be [{B}, {T}, HV, V], got {list(v.shape)}")
    _, _, HV, V = v.shape
    if H == 0 or HV == 0 or HV % H:
        raise ValueError(f"v must have a multiple of q's {H} heads, got {HV}")
    if beta.shape != (B, T, HV):
        raise ValueError(f"beta must be [{B}, {T}, {HV}], got {list(beta.shape)}")
    if not (1 <= K <= MAX_HEAD_SIZE and 1 <= V <= MAX_HEAD_SIZE):
        raise ValueError(f"head sizes must be 1 to {MAX_HEAD_SIZE}, got {K} for q and k, {V} for v")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"k and v must be {q.dtype} like q, got {k.dtype} and {v.dtype}")
    if not beta.is_floating_point():
        raise ValueError(f"beta must be a floating-point tensor, got {beta.dtype}")
    device = q.device
    for name, x in (("k", k), ("v", v), ("beta", beta), ("initial_state", initial_state), ("cu_seqlens", cu_seqlens)):
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
    if initial_state is not None and initial_state.shape != (n, HV, K, V):
        raise ValueError(f"initial_state must be {[n, HV, K, V]}, got {list(initial_state.shape)}")
    if initial_state is not None and initial_state.dtype != torch.float32:
        raise ValueError(f"initial_state must be float32, got {initial_state.dtype}")
    return K**-0.5 if scale is None else float(scale)
