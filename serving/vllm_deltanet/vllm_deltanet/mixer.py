"""The linear mixer in vLLM: projections by heads, and one operator around what depends on the batch."""

import torch
import torch.nn.functional as F
from torch import nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
    is_conv_state_dim_first,
)
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from . import our_kernels, rule


def state_shapes(config, tp_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a request's convolution inputs and of its memory, on one device.

    Without a convolution the first is there, but nothing reads it: vLLM copies the same number of states for every
    model of a class.
    """
    conv, memory = MambaStateShapeCalculator.gated_delta_net_state_shape(
        tp_size,
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim or 2,
    )
    return ((1, 2) if config.linear_conv_kernel_dim is None else conv), memory


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
    cache = vllm_config.cache_config
    return MambaStateDtypeCalculator.gated_delta_net_state_dtype(
        vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
    )


class ShortConv(nn.Module):
    """The weights of the convolutions over q, k and v, `[D, 1, W]` one below another, by heads."""

    def __init__(self, sizes: tuple[int, ...], taps: int, tp_size: int):
        super().__init__()
        self.sizes, self.tp_size = sizes, tp_size
        self.weight = nn.Parameter(torch.empty(sum(sizes) // tp_size, 1, taps), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self.load})

    def load(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        index = loaded.shard_id  # vLLM writes it there: see `orig_to_new_stacked` of the model
        size = self.sizes[index] // self.tp_size
        start = sum(self.sizes[:index]) // self.tp_size
        part = loaded.narrow(0, get_tensor_model_parallel_rank() * size, size)
        assert parameter.shape[1:] == part.shape[1:], (parameter.shape, part.shape)
        parameter.data[start : start + size].copy_(part)


class DeltaNetMixer(nn.Module, MambaBase):
    """Project, convolve, feature map (and rotation) on q and k, delta rule (with or without decay), norm (and gate),
    project; see `modeling_deltanet.linear_attention_deltanet`.
    """

    def __init__(self, vllm_config: VllmConfig, rotary_emb: nn.Module | None, prefix: str):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.config, self.prefix = config, prefix
        self.tp_size = get_tensor_model_parallel_world_size()
        self.dtypes = state_dtypes(vllm_config)
        self.rotary_emb = rotary_emb if config.linear_use_rope else None
        self.key_dim = config.linear_num_key_heads * config.linear_key_head_dim
        self.value_dim = config.linear_num_value_heads * config.linear_value_head_dim
        self.num_v_heads = config.linear_num_value_heads // self.tp_size

        def columns(name: str, size: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                config.hidden_size, size, bias=False, quant_config=quant_config, prefix=f"{prefix}.{name}"
            )

        sizes = self.key_dim, self.key_dim, self.value_dim
        self.qkv_proj = MergedColumnParallelLinear(
            config.hidden_size,
            list(sizes),
            bias=config.linear_attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.b_proj = columns("b_proj", config.linear_num_value_heads) if config.linear_use_beta else None
        if not config.linear_use_delta_rule:
            raise ValueError("linear_use_delta_rule is False: vLLM serves the delta rule, not the baseline without it")
        self.a_proj = columns("a_proj", config.linear_num_value_heads) if config.linear_use_decay else None
        self.g_proj = columns("g_proj", self.value_dim) if config.linear_use_output_gate else None
        if config.linear_use_decay:
            self.A_log, self.dt_bias = (
                nn.Parameter(torch.empty(self.num_v_heads, dtype=torch.float32), requires_grad=False) for _ in "Ad"
            )
            for parameter in (self.A_log, self.dt_bias):
                set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
        taps = config.linear_conv_kernel_dim
        self.conv1d = None if taps is None else ShortConv(sizes, taps, self.tp_size)
        self.o_norm = RMSNorm(config.linear_value_head_dim, eps=config.rms_norm_eps)
        self.o_proj = RowParallelLinear(
            self.value_dim, config.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )

        layers = get_current_vllm_config().compilation_config.static_forward_context
        assert prefix not in layers, prefix
        layers[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return state_shapes(self.config, self.tp_size)

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        return self.dtypes

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix `[N, hidden_size]`, the tokens of all requests."""
        qkv, _ = self.qkv_proj(hidden_states)
        heads = (hidden_states.shape[0], self.num_v_heads)
        if self.b_proj is None:
            beta = hidden_states.new_ones(heads)
        else:
            beta = self.b_proj(hidden_states)[0].sigmoid()
            if self.config.linear_allow_neg_eigval:
                beta = 2 * beta
        if self.a_proj is None:
            g = hidden_states.new_zeros(heads, dtype=torch.float32)
        else:
            g = -self.A_log.exp() * F.softplus(self.a_proj(hidden_states)[0].float() + self.dt_bias)
        # Zeros: where vLLM only tries out how much memory a batch takes, nothing is written.
        o = hidden_states.new_zeros(*heads, self.config.linear_value_head_dim)
        torch.ops.vllm.deltanet_mix(qkv, g, beta, positions, o, self.prefix)
        o = self.o_norm(o.flatten(0, 1)).view(hidden_states.shape[0], -1)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(hidden_states)[0])
        return self.o_proj(o)[0]

    def mix(self, qkv, g, beta, positions, o) -> None:
        """Write into `o` `[N, HV, V]` what the requests' memories answer, and move those on."""
        metadata = get_forward_context().attn_metadata
        metadata = None if metadata is None else metadata.get(self.prefix)
        if metadata is None:
            return
        assert isinstance(metadata, GDNAttentionMetadata) and metadata.spec_sequence_masks is None
        n = metadata.num_actual_tokens
        if n == 0:
            return
        qkv, g, beta, positions, o = qkv[:n], g[:n], beta[:n], positions[:n], o[:n]
        config = self.config
        conv_state, memory = self.kv_cache
        if is_conv_state_dim_first() and self.conv1d is not None:
            conv_state = conv_state.mT
        kernels = self._kernels(qkv, conv_state, memory)
        batch = kernels.Batch(metadata)
        if self.conv1d is not None:
            qkv = kernels.short_conv(qkv, self.conv1d.weight.squeeze(1), conv_state, batch)
        key_dim, value_dim = self.key_dim // self.tp_size, self.value_dim // self.tp_size
        q, k, v = qkv.split((key_dim, key_dim, value_dim), dim=-1)
        q, k, v = (x.unflatten(-1, (-1, size)) for x, size in (
            (q, config.linear_key_head_dim), (k, config.linear_key_head_dim), (v, config.linear_value_head_dim)
        ))  # fmt: skip
        q, k = (rule.features(x, config.linear_qk_activation, config.linear_qk_norm) for x in (q, k))
        v = F.silu(v)
        if self.rotary_emb is not None:
            shape = q.shape
            q, k = self.rotary_emb(positions, q.reshape(n, -1), k.reshape(n, -1))
            q, k = q.view(shape), k.view(shape)
        l2_norm = config.linear_qk_norm == "l2"
        if kernels is our_kernels and self.a_proj is None:
            g = None
        o.copy_(kernels.delta_rule(q, k, v, g, beta, memory, batch, l2_norm))

    def _kernels(self, qkv: torch.Tensor, conv_state: torch.Tensor, memory: torch.Tensor):
        """The module that computes: with our kernels, with vLLM's for a GPU, or in torch."""
        if our_kernels.take(qkv, conv_state, memory, self.config):
            return our_kernels
        if qkv.is_cuda:
            from . import vllm_kernels

            if vllm_kernels.take(qkv, self.config):
                return vllm_kernels
        return rule


@eager_break_during_capture
def deltanet_mix(
    qkv: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    positions: torch.Tensor,
    o: torch.Tensor,
    layer_name: str,
) -> None:
    """The operator that the compiler does not look into: [`DeltaNetMixer.mix`] of the layer of that name."""
    get_forward_context().no_compile_layers[layer_name].mix(qkv, g, beta, positions, o)


def _deltanet_mix_fake(qkv, g, beta, positions, o, layer_name) -> None:
    return None


direct_register_custom_op("deltanet_mix", deltanet_mix, mutates_args=["o"], fake_impl=_deltanet_mix_fake)
