"""Triton kernels of the delta rule (DeltaNet): `chunk_delta_rule` and its relatives. Needs torch and triton only."""

from . import layers, limits  # noqa: F401 (`kernels` looks layers up in the former, the model limits in the latter)
from .accelerate import accelerate, restore
from .chunk import chunk_delta_rule, chunk_gated_delta_rule, explain
from .convolution import short_conv, short_conv_step
from .fla_backend import register_with_fla
from .keep import keep_results, keep_results_compiled
from .recurrent import fused_recurrent_delta_rule, fused_recurrent_gated_delta_rule
from .step import delta_rule_step, gated_delta_rule_step


__all__ = [
    "accelerate",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "delta_rule_step",
    "explain",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_rule_step",
    "keep_results",
    "keep_results_compiled",
    "register_with_fla",
    "restore",
    "short_conv",
    "short_conv_step",
]
