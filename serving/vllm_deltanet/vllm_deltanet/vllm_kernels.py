"""The gated delta rule and the short convolution by vLLM's Triton kernels, on its pools of states.

A module of its own, imported on a GPU alone: vLLM for a CPU has other kernels.
"""

import torch
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule


MAX_HEAD_DIM = 256
MAX_TAPS = 4


def take(x: torch.Tensor, config) -> bool:
    """Half precision alone, up to their sizes."""
    return (
        x.dtype != torch.float32
        and max(config.linear_key_head_dim, config.linear_value_head_dim) <= MAX_HEAD_DIM
        and (config.linear_conv_kernel_dim or 2) <= MAX_TAPS
    )


class Batch:
    """vLLM's own description of a batch."""

    def __init__(self, metadata):
        self.metadata = metadata


def short_conv(x: torch.Tensor, weight: torch.Tensor, pool: torch.Tensor, batch: Batch) -> torch.Tensor:
    metadata, pool = batch.metadata, pool.mT
    slots = metadata.non_spec_state_indices_tensor
    if metadata.num_prefills:
        return causal_conv1d_fn(
            x.mT,
            weight,
            None,
            activation=None,
            conv_states=pool,
            has_initial_state=metadata.has_initial_state,
            cache_indices=slots,
            query_start_loc=metadata.non_spec_query_start_loc,
            metadata=metadata,
        ).mT
    # The kernel writes over its input.
    return causal_conv1d_update(x.clone(), pool, weight, None, None, conv_state_indices=slots[: metadata.num_decodes])


def delta_rule(q, k, v, g, beta, pool: torch.Tensor, batch: Batch, l2_norm: bool) -> torch.Tensor:
    metadata = batch.metadata
    slots, borders = metadata.non_spec_state_indices_tensor, metadata.non_spec_query_start_loc
    q, k, v, g, beta = (x.contiguous().unsqueeze(0) for x in (q, k, v, g, beta))
    if metadata.num_prefills:
        state = pool[slots]
        state[~metadata.has_initial_state] = 0
        o, state = chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=state, output_final_state=True, cu_seqlens=borders,
            use_qk_l2norm_in_kernel=l2_norm,
        )  # fmt: skip
        pool[slots] = state.to(pool.dtype)
    else:
        o, _ = fused_recurrent_gated_delta_rule(
            q, k, v, g, beta, initial_state=pool, inplace_final_state=True,
            cu_seqlens=borders[: metadata.num_decodes + 1], ssm_state_indices=slots, use_qk_l2norm_in_kernel=l2_norm,
        )  # fmt: skip
    return o.squeeze(0)
