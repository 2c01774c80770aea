"""What the delta rule's functions accept. Shared by the chunked and the token-by-token form."""

import torch


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_SIZE = 256


def _want(condition: bool, what: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{what}, got {got}")


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
    _want(q.dim() == 4, "q must be [B, T, H, K]", list(q.shape))
    _want(k.shape == q.shape, f"k must have the shape of q {list(q.shape)}", list(k.shape))
    B, T, H, K = q.shape
    _want(v.dim() == 4 and v.shape[:2] == q.shape[:2], f"v must be [{B}, {T}, HV, V]", list(v.shape))
    HV, V = v.shape[2:]
    _want(H > 0 and HV > 0 and HV % H == 0, f"v must have a multiple of q's {H} heads", HV)
    _want(beta.shape == v.shape[:3], f"beta must be [{B}, {T}, {HV}]", list(beta.shape))
    _want(1 <= K <= MAX_HEAD_SIZE, f"the head size of q and k must be 1 to {MAX_HEAD_SIZE}", K)
    _want(1 <= V <= MAX_HEAD_SIZE, f"the head size of v must be 1 to {MAX_HEAD_SIZE}", V)
    _want(q.dtype in DTYPES, "q must be bfloat16, float16 or float32", q.dtype)
    _want(k.dtype == q.dtype and v.dtype == q.dtype, f"k and v must be {q.dtype} like q", (k.dtype, v.dtype))
    _want(beta.is_floating_point(), "beta must be a floating-point tensor", beta.dtype)
    for name, x in (("k", k), ("v", v), ("beta", beta), ("initial_state", initial_state), ("cu_seqlens", cu_seqlens)):
        _want(
            x is None or x.device == q.device, f"{name} must be on q's device {q.device}", x is not None and x.device
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        _want(
            x.stride(3) == 1 or x.numel() == 0 or x.shape[3] == 1,
            f"{name} must be contiguous in its last dimension",
            f"stride {x.stride(3)}",
        )
    n = B
    if cu_seqlens is not None:
        _want(B == 1, "packed sequences (cu_seqlens) need B = 1", B)
        _want(cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0, "cu_seqlens must be [N + 1]", list(cu_seqlens.shape))
        _want(cu_seqlens.dtype in (torch.int32, torch.int64), "cu_seqlens must be int32 or int64", cu_seqlens.dtype)
        n = cu_seqlens.numel() - 1
    if initial_state is not None:
        shape = [n, HV, K, V]
        _want(list(initial_state.shape) == shape, f"initial_state must be {shape}", list(initial_state.shape))
        _want(initial_state.dtype == torch.float32, "initial_state must be float32", initial_state.dtype)
    return K**-0.5 if scale is None else float(scale)
