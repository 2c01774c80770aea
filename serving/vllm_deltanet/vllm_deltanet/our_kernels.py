"""The delta rule and the short convolution by `deltanet_kernels`, which find the requests' states in vLLM's pools by
index: nothing is gathered before a call and scattered after it.

A batch is flat: decoding requests first, one token each, then the prompts' parts, one after another.
"""

import torch


try:
    import deltanet_kernels
except ImportError:  # optional: then vLLM's kernels compute
    deltanet_kernels = None


def take(x: torch.Tensor, conv_state: torch.Tensor, memory: torch.Tensor, config) -> bool:
    """Whether they are there, for this GPU and this layer."""
    if deltanet_kernels is None or not x.is_cuda:
        return False
    limits = deltanet_kernels.limits
    taps = config.linear_conv_kernel_dim
    return (
        torch.cuda.get_device_capability(x.device) >= limits.LEAST_CAPABILITY
        and max(config.linear_key_head_dim, config.linear_value_head_dim) <= limits.MAX_HEAD_SIZE
        and (taps is None or (limits.MIN_TAPS <= taps <= limits.MAX_TAPS and conv_state.dtype == x.dtype))
        and memory.dtype == torch.float32
    )


class Batch:
    """Where in the pools the states of a batch's requests lie: those of decoding ones, and those of prompts' parts."""

    def __init__(self, metadata):
        self.num_decodes, self.num_prefills = metadata.num_decodes, metadata.num_prefills
        self.decoding = _places(metadata.non_spec_state_indices_tensor[: self.num_decodes])
        if self.num_prefills:
            self.prompts = {
                "cu_seqlens": metadata.prefill_query_start_loc[: self.num_prefills + 1],
                "state_indices": _places(metadata.prefill_state_indices[: self.num_prefills]),
                "has_initial_state": metadata.prefill_has_initial_state[: self.num_prefills],
            }

    def both(self, decode, prefill, *tensors: torch.Tensor) -> torch.Tensor:
        """Of `decode`'s tokens `[B, 1, ...]` and `prefill`'s `[1, T, ...]` one `[N, ...]`, as the tensors are."""
        n, parts = self.num_decodes, []
        if n:
            parts.append(decode(*(x[:n].unsqueeze(1) for x in tensors)).squeeze(1))
        if self.num_prefills:
            parts.append(prefill(*(x[n:].unsqueeze(0) for x in tensors)).squeeze(0))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _places(slots: torch.Tensor) -> torch.Tensor:
    """vLLM pads with its null block, 0, which holds nobody's state; the kernels with -1."""
    return torch.where(slots > 0, slots, -1)


def short_conv(x: torch.Tensor, weight: torch.Tensor, pool: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Convolve `[N, D]` by `[D, W]` along time; the last inputs in `pool` `[slots, W - 1, D]` move on."""
    pool = pool.mT

    def decode(x):
        return deltanet_kernels.short_conv_step([x], [weight], pool, None, state_indices=batch.decoding)[0]

    def prefill(x):
        return deltanet_kernels.short_conv([x], [weight], None, pool, **batch.prompts)[0][0]

    return batch.both(decode, prefill, x)


def delta_rule(q, k, v, g, beta, pool: torch.Tensor, batch: Batch, l2_norm: bool) -> torch.Tensor:
    """The rule for q and k `[N, H, K]`, v `[N, HV, V]`, beta and g `[N, HV]`, the log of the decay or None: returns
    `[N, HV, V]`; the states in `pool` `[slots, HV, V, K]` move on.
    """
    options = {"use_qk_l2norm_in_kernel": l2_norm}
    pool, kernels = pool.mT, deltanet_kernels

    def decode(q, k, v, beta, *g):
        step = kernels.gated_delta_rule_step if g else kernels.delta_rule_step
        return step(q, k, v, *g, beta, pool, state_indices=batch.decoding, **options)

    def prefill(q, k, v, beta, *g):
        rule = kernels.chunk_gated_delta_rule if g else kernels.chunk_delta_rule
        return rule(q, k, v, *g, beta, initial_state=pool, **batch.prompts, **options)[0]

    return batch.both(decode, prefill, q, k, v, beta, *([] if g is None else [g]))
