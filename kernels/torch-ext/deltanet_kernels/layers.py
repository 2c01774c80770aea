"""What `use_kernels=True` puts in the place of the model's torch code: one layer for each function that has a kernel.

`kernels` asks for classes without a constructor whose forward has the signature of what it replaces, here of the
functions of the same purpose in `modeling_deltanet/`.
"""

import torch.nn as nn

from .chunk import chunk_delta_rule, chunk_gated_delta_rule
from .convolution import short_conv, short_conv_step
from .step import delta_rule_step, gated_delta_rule_step


class DeltaRule(nn.Module):
    """For `delta_rule`."""

    can_torch_compile = True

    def forward(
        self, q, k, v, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
        cu_seqlens=None, *, g=None,
    ):  # fmt: skip
        options = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
        if g is None:
            return chunk_delta_rule(q, k, v, beta, *options)
        return chunk_gated_delta_rule(q, k, v, g, beta, *options)


class DeltaRuleStep(nn.Module):
    """For `delta_rule_step`, which the model calls without gradients only."""

    can_torch_compile = True

    def forward(self, q, k, v, beta, state, scale=None, use_qk_l2norm_in_kernel=False, *, g=None):
        if g is None:
            return delta_rule_step(q, k, v, beta, state, scale, use_qk_l2norm_in_kernel)
        return gated_delta_rule_step(q, k, v, g, beta, state, scale, use_qk_l2norm_in_kernel)


class ShortConv(nn.Module):
    """For `short_conv`."""

    can_torch_compile = True

    def forward(
        self, xs, weights, activation="silu", initial_state=None, output_final_state=False, cu_seqlens=None
    ):  # fmt: skip
        return short_conv(xs, weights, activation, initial_state, output_final_state, cu_seqlens)


class ShortConvStep(nn.Module):
    """For `short_conv_step`, which the model calls without gradients only."""

    can_torch_compile = True

    def forward(self, xs, weights, state, activation="silu"):
        return short_conv_step(xs, weights, state, activation)
