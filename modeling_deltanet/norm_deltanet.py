"""The root-mean-square norm of the whole model; in compiled training it has a backward of its own."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.integrations import use_kernel_forward_from_hub


@use_kernel_forward_from_hub("RMSNorm")
class DeltaNetRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # One kernel on a GPU, which keeps its input and no fp32 copy of it; but both must have one dtype (under
        # autocast the weight is fp32 and the input may be bf16).
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return self.rms_norm(hidden_states.to(dtype), self.weight.to(dtype), self.variance_epsilon)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The norm of tensors of one dtype, which Liger's kernel replaces."""
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            return _CompiledRMSNorm.apply(x, weight, eps)
        return F.rms_norm(x, weight.shape, weight, eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class _CompiledRMSNorm(torch.autograd.Function):
    """The norm in a compiled training step, with a backward that Inductor makes one kernel of.

    Inductor writes out, in fp32, a product that two results share and that reads more than four tensors. In the
    backward that torch derives, the gradient times the weight is one, where the gradient is a sum over four
    projections of one input. Here no product of the gradient is shared: before a linear mixer 7 activations
    `[B, T, D]` are read and written, was 15 (counted in Inductor's code, torch 2.13, commit 9a179f9).
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        y = wide * rstd * weight
        # (Not `.to` the dtype that it has: compiled by torch 2.11, what such a call returned has no gradient.)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, rstd = ctx.saved_tensors
        dy, wide = gradient.to(rstd.dtype), x.to(rstd.dtype)
        through_rstd = rstd**3 * (dy * (wide * weight)).mean(-1, keepdim=True)
        dx = dy * (rstd * weight) - wide * through_rstd
        dweight = (dy * (wide * rstd)).sum(tuple(range(x.ndim - 1)))
        return dx.to(x.dtype), dweight.to(weight.dtype), None
