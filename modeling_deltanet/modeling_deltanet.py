"""DeltaNet: a decoder whose layers keep a fixed-size memory by the delta rule, with softmax layers where wanted.

Read from top to bottom: norm, rotary embedding, short convolution and delta rule in the linear mixer, softmax
attention, MLP, layer, model, heads. Letters in shapes: B batch, T time, D hidden size, H key heads, HV value heads,
K and V head sizes, W taps of the convolution.
"""

from .versions_deltanet import check_transformers  # noqa: F401  (first: another release may lack what follows)


# isort: split
import functools
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub, use_kernelized_func
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .after_import import after_import
from .cache_deltanet import CACHE_NAME, can_overwrite, one_cache, prepare_cache
from .configuration_deltanet import DeltaNetConfig
from .cuda_graph import GraphedStep, can_be_captured
from .delta_rule import delta_rule, delta_rule_step
from .kernel_switch import checkpoint_but_for_rule, is_transformed
from .liger_deltanet import apply_liger_kernel_to_deltanet
from .packing_deltanet import check_linear_attention_mask, create_masks, find_packed_documents
from .short_conv import module_short_conv, short_conv, short_conv_step


# For `use_kernels=True` with a `kernel_config` that maps these names to a kernel of the Hub (kernels/CARD.md): where
# this package is not installed, its Triton kernels come that way. Transformers does nothing here without `kernels` >=
# 0.18.2.
delta_rule = use_kernel_forward_from_hub("DeltaRule")(delta_rule)
delta_rule_step = use_kernel_forward_from_hub("DeltaRuleStep")(delta_rule_step)
short_conv = use_kernel_forward_from_hub("ShortConv")(short_conv)
short_conv_step = use_kernel_forward_from_hub("ShortConvStep")(short_conv_step)


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
    `[B, T, D]` are read and written, was 15 (counted in Inductor's code, torch 2.13).
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


class DeltaNetRotaryEmbedding(nn.Module):
    """Cosines and sines, in fp32, for the queries and keys of the layers that rotate them."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: DeltaNetConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies of the plain rotary embedding, and its scaling factor of 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    def _apply(self, fn, recurse=True):
        # `model.bfloat16()` moves parameters and buffers alike, but frequencies that are rounded to bf16 turn the
        # 2000th token too far by up to 4 radians: a hybrid of two layers was 1.3 times as far from its fp32 run, one
        # of three 1.4 times.
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos() * self.attention_scaling, emb.sin() * self.attention_scaling


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_dim: int = 1) -> torch.Tensor:
    """Rotate `[B, heads, T, head_dim]`, or another place of `heads`, by the angles of cos and sin, `[B, T, head_dim]`.

    cos and sin are fp32, hence the arithmetic too, with one rounding at the end: all in bf16 its error was 1.7 times
    that.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos.unsqueeze(heads_dim) + torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(heads_dim)).to(x.dtype)


@use_kernelized_func([delta_rule, delta_rule_step, short_conv, short_conv_step])
class DeltaNetLinearAttention(nn.Module):
    """The delta-rule mixer: project, convolve, feature map (and rotation) on q and k, delta rule, norm (and gate),
    project.
    """

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_k_dim = config.linear_key_head_dim
        self.head_v_dim = config.linear_value_head_dim
        self.num_v_heads = config.linear_num_value_heads
        self.qk_activation = config.linear_qk_activation
        self.qk_norm = config.linear_qk_norm
        self.allow_neg_eigval = config.linear_allow_neg_eigval
        key_dim = config.linear_num_key_heads * self.head_k_dim
        value_dim = self.num_v_heads * self.head_v_dim

        self.use_rope = config.linear_use_rope
        self.q_proj = nn.Linear(config.hidden_size, key_dim, bias=config.linear_attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=config.linear_attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, value_dim, bias=config.linear_attention_bias)
        self.b_proj = nn.Linear(config.hidden_size, self.num_v_heads, bias=False) if config.linear_use_beta else None
        self.g_proj = nn.Linear(config.hidden_size, value_dim, bias=False) if config.linear_use_output_gate else None
        self.conv_size = config.linear_conv_kernel_dim
        if self.conv_size is not None:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                nn.Conv1d(dim, dim, self.conv_size, groups=dim, bias=False) for dim in (key_dim, key_dim, value_dim)
            )
        self.o_norm = DeltaNetRMSNorm(self.head_v_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(value_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Mix `[B, T, D]` along time.

        `attention_mask` `[B, T]` is 0 where a token is padding: such a token writes nothing, and no convolution sees
        it. `cu_seqlens` `[N + 1]` holds the borders of packed documents on the flattened time axis of all B rows.
        `position_embeddings` are the rotary cosines and sines, `[B, T, K]`, which only `linear_use_rope` reads.
        `recompute`, without a cache: backward computes again what lies between the projections, but for the delta
        rule's kernels (see the layer).
        """
        B, T, _ = hidden_states.shape
        if cu_seqlens is not None:
            hidden_states = hidden_states.flatten(0, 1).unsqueeze(0)
        qkv = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        b = None if self.b_proj is None else self.b_proj(hidden_states)
        g = None if self.g_proj is None else self.g_proj(hidden_states)
        if self.use_rope:
            # As many rows of angles as there are rows of q, which packing has flattened into one.
            position_embeddings = tuple(
                x.expand(B, -1, -1).reshape(*hidden_states.shape[:2], -1) for x in position_embeddings
            )
        inputs = *qkv, b, g, attention_mask, past_key_values, cu_seqlens, position_embeddings
        # With the last projection in it: what that one reads is computed again too, not its product (see the MLP).
        o = checkpoint_but_for_rule(self._mix, *inputs) if recompute else self._mix(*inputs)
        return o.view(B, T, -1)

    def _mix(self, q, k, v, b, g, attention_mask, past_key_values, cu_seqlens, position_embeddings) -> torch.Tensor:
        """What comes after the projections of the input."""
        T = q.shape[1]
        state = None if past_key_values is None else past_key_values.get_recurrent_state(self.layer_idx)
        # v always passes through SiLU; where q and k do too, the three share it.
        activation = "silu" if self.qk_activation == "silu" else None
        if self.conv_size is not None:
            q, k, v = self._convolve((q, k, v), activation, attention_mask, past_key_values, cu_seqlens)
        elif activation == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        if activation is None:
            v = F.silu(v)
        q, k = (self._features(x.unflatten(-1, (-1, self.head_k_dim))) for x in (q, k))
        v = v.unflatten(-1, (-1, self.head_v_dim))
        if self.use_rope:
            q, k = (rotate(x, *position_embeddings, heads_dim=2) for x in (q, k))

        if b is not None:
            beta = b.sigmoid()
            if self.allow_neg_eigval:
                beta = 2 * beta
        else:
            beta = v.new_ones(v.shape[:3])
        if attention_mask is not None:
            beta = beta * attention_mask.unsqueeze(-1).to(beta.dtype)

        l2norm = self.qk_norm == "l2"
        if _is_decoding(state, T, attention_mask):
            o = delta_rule_step(q, k, v, beta, state, use_qk_l2norm_in_kernel=l2norm)
        else:
            o, state = delta_rule(
                q,
                k,
                v,
                beta,
                initial_state=state,
                output_final_state=past_key_values is not None,
                use_qk_l2norm_in_kernel=l2norm,
                cu_seqlens=cu_seqlens,
            )
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx, new_tokens=T)

        o = self.o_norm(o)
        if g is not None:
            o = o * F.silu(g.unflatten(-1, (-1, self.head_v_dim)))
        return self.o_proj(o.flatten(-2))

    @force_accelerate_hooks(["q_conv1d", "k_conv1d", "v_conv1d"])
    def _convolve(self, xs, activation, attention_mask, past_key_values, cu_seqlens):
        """The short convolution over q, k and v, from the cache's inputs on."""
        convs = self.q_conv1d, self.k_conv1d, self.v_conv1d
        is_plain = all(_is_plain(conv) for conv in convs)
        if is_plain:
            weights = tuple(_local(conv.weight).squeeze(1) for conv in convs)
        history = None if past_key_values is None else past_key_values.get_conv_state(self.layer_idx)
        if is_plain and _is_decoding(history, xs[0].shape[1], attention_mask):
            return short_conv_step(xs, weights, history, activation)
        if attention_mask is not None:
            xs, history, unsort = _real_tokens_last(xs, attention_mask, history)
        if not is_plain:
            ys, tail = module_short_conv(xs, convs, self.conv_size, activation, history, cu_seqlens)
        elif past_key_values is None and torch.is_grad_enabled() and torch.compiler.is_compiling():
            # Compiled training: the delta rule's backward does not read v, so where backward computes the convolution
            # again, the compiler drops v's, if that is a call of its own: a third of 0.21 ms a layer (8 x 4096 x 2048,
            # H200).
            (q, k), _ = short_conv(xs[:2], weights[:2], activation, cu_seqlens=cu_seqlens)
            (v,), _ = short_conv(xs[2:], weights[2:], activation, cu_seqlens=cu_seqlens)
            ys = q, k, v
        else:
            ys, tail = short_conv(xs, weights, activation, history, past_key_values is not None, cu_seqlens)
        if past_key_values is not None:
            past_key_values.update_conv_state(tail, self.layer_idx, conv_kernel_size=self.conv_size - 1)
        return ys if attention_mask is None else tuple(unsort(y) for y in ys)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map (SiLU stands with the convolution) and sum norm; the L2 norm is the delta rule's own."""
        if self.qk_activation == "relu":
            x = F.relu(x)
        elif self.qk_activation == "elu":
            x = F.elu(x) + 1
        if self.qk_norm == "sum":
            # In fp32, and safe where a ReLU leaves nothing.
            x = (x.float() / (x.float().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return x


def _is_plain(conv: nn.Module) -> bool:
    """Whether a convolution is its weight and no more: no adapter, no hook, no other class in its place."""
    hooks = conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks
    return type(conv) is nn.Conv1d and not any(hooks)


def _local(weight: torch.Tensor) -> torch.Tensor:
    """The part of a weight that this process holds: under tensor parallelism it is a DTensor, which only a module's
    own forward would unwrap."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _is_decoding(state, new_tokens, attention_mask) -> bool:
    """Whether a state moves on by one real token, without gradients: then it can do so in place."""
    if state is None or new_tokens != 1 or attention_mask is not None or torch.is_grad_enabled():
        return False
    return can_overwrite(state) and not is_transformed()


def _real_tokens_last(xs, attention_mask, history):
    """Move padding to the front of each row, so that a convolution over the rest is the one without padding.

    The inputs of before (`history`, `[B, D, W - 1]`) go between the two. Returns the reordered tensors, None for the
    history that they now contain, and the function that undoes the reordering on an output.
    """
    xs = [x * attention_mask.unsqueeze(-1).to(x.dtype) for x in xs]
    past = 0
    if history is not None:
        past = history.shape[-1]
        xs = [torch.cat(pair, dim=1) for pair in zip(history.mT.split([x.shape[-1] for x in xs], dim=-1), xs)]
        attention_mask = F.pad(attention_mask, (past, 0), value=1)
    order = attention_mask.bool().to(torch.uint8).argsort(dim=1, stable=True)
    rows = torch.arange(order.shape[0], device=order.device).unsqueeze(1)
    inverse = order.argsort(dim=1)[:, past:]
    return tuple(x[rows, order] for x in xs), None, lambda y: y[rows, inverse]


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeat each key or value head of `[B, heads, T, head_dim]` for the query heads that share it."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in plain torch, the interface's `eager`: the one that can return its weights."""
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    weights = query @ key.mT * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DeltaNetAttention(nn.Module):
    """Softmax attention, full or within a sliding window, with grouped heads, rotary embedding and q/k norm if
    asked.
    """

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

        q_dim, kv_dim = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = DeltaNetRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = DeltaNetRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.flatten(-2)), weights


class DeltaNetMLP(nn.Module):
    """SwiGLU, or the same with another activation."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        # Backward computes again what `down_proj` reads (see the layer), not the product by `down_proj`'s own weight:
        # torch stops as soon as it has what it needs.
        return checkpoint(self._down, gate, up, use_reentrant=False) if recompute else self._down(gate, up)

    def _down(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.glu(gate, up))

    def glu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The gated activation, which Liger's kernel replaces."""
        return self.act_fn(gate) * up


class DeltaNetDecoderLayer(GradientCheckpointingLayer):
    """A mixer of the layer's type and an MLP, each behind a norm and beside a residual."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == "linear_attention":
            self.linear_attn = DeltaNetLinearAttention(config, layer_idx)
        else:
            self.self_attn = DeltaNetAttention(config, layer_idx)
        self.mlp = DeltaNetMLP(config)
        self.input_layernorm = DeltaNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeltaNetRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        past_key_values = one_cache(past_key_values, cache, kwargs)
        recompute = self._recomputes(hidden_states, past_key_values)
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        if self.layer_type == "linear_attention":
            hidden_states = self.linear_attn(
                hidden_states, attention_mask, past_key_values, cu_seqlens, position_embeddings, recompute
            )
        else:
            hidden_states, _ = self.self_attn(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), recompute)

    def _recomputes(self, hidden_states: torch.Tensor, past_key_values: Cache | None) -> bool:
        """Whether backward computes again what lies between a linear mixer's projections, and between the MLP's.

        Of the 24 activations `[B, T, D]` that a layer of the 1.3B size would keep, 17 are left: 12.5 of norms and
        projections, and 4.5 of the delta rule's kernels (o 1, A 0.5, U 1, states 2), which backward does not run
        again. What it computes again, convolution, SiLU, output norm and SwiGLU, has no matrix product. A step of 8 x
        4096 tokens on an H200: with Liger 64 GB and 504 ms, compiled 66 GB and 476 ms; before the 4.5 were kept, 53 GB
        and 536 ms with Liger, and 82 GB and 509 ms with all 24. On a CPU memory is not what is short. A cache would be
        written twice. A layer that is computed again as a whole (by Transformers' gradient checkpointing) need not do
        so with its parts.
        """
        if not hidden_states.is_cuda or not torch.is_grad_enabled() or past_key_values is not None:
            return False
        checkpointed = self.gradient_checkpointing and self.training
        return not checkpointed and not is_transformed()  # (`torch.func` knows no checkpoints)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs):
        # PEFT loads an adapter with strict=False: one for another architecture would leave this layer without any.
        foreign = "self_attn." if self.layer_type == "linear_attention" else "linear_attn."
        came = [name for name in state_dict if name.startswith(prefix + foreign)]
        if came:
            error_msgs.append(
                f"weights for another architecture: {prefix[:-1]} is a {self.layer_type} layer, got {', '.join(came)}"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs)


@auto_docstring
class DeltaNetPreTrainedModel(PreTrainedModel):
    config: DeltaNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeltaNetDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = True
    _can_record_outputs = {
        "hidden_states": DeltaNetDecoderLayer,
        "attentions": DeltaNetAttention,
    }

    def _resolve_parallel_plans(self, distributed_config):
        # Transformers splits a projection at any column, also within a head.
        for layers, name in (("linear_attn", "linear_num_key_heads"), ("self_attn", "num_key_value_heads")):
            heads, processes = getattr(self.config, name), distributed_config.tp_size
            if f"layers.*.{layers}.o_proj" in self.config.base_model_tp_plan and heads % processes:
                raise ValueError(f"{name} ({heads}) must be a multiple of the tensor-parallel size ({processes})")
        return super()._resolve_parallel_plans(distributed_config)


@auto_docstring
class DeltaNetModel(DeltaNetPreTrainedModel):
    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        config.validate()  # fields may have been changed since the config was made
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DeltaNetDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DeltaNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DeltaNetRotaryEmbedding(config) if config.uses_rope else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        past_key_values (`Cache`, *optional*):
            What the model has read so far, which the tokens of this call continue.
        cache (`Cache`, *optional*):
            The same as `past_key_values`, by the name that it has from Transformers 5.24 on.
        """
        past_key_values = one_cache(past_key_values, cache, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        cu_seqlens, document_positions = find_packed_documents(
            inputs_embeds, attention_mask, position_ids, past_key_values, **kwargs
        )
        if past_key_values is not None:
            if self.training and self.gradient_checkpointing:
                raise ValueError(
                    "under gradient checkpointing a model in training mode cannot read or write a cache, got "
                    "past_key_values: call model.eval() to generate, or train on segments without checkpointing"
                )
            prepare_cache(past_key_values, self.config)
        elif use_cache and cu_seqlens is None:
            past_key_values = prepare_cache(DynamicCache(config=self.config), self.config)
        if position_ids is None:
            position_ids = document_positions
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        position_embeddings = None if self.rotary_emb is None else self.rotary_emb(inputs_embeds, position_ids)

        if cu_seqlens is not None:
            # Softmax layers find the documents by positions that start again, and only where there is no 2d mask.
            position_ids = document_positions
            attention_mask = attention_mask | {"linear_attention": None} if isinstance(attention_mask, dict) else None
            # Flash attention looks at the positions of a single row only: it is told the borders. Its longest document
            # is an upper bound, which the host knows without waiting for the GPU.
            if (longest := kwargs.get("max_length_q")) is None:
                longest = position_ids.numel()
            kwargs["cu_seq_lens_q"] = kwargs["cu_seq_lens_k"] = cu_seqlens.to(torch.int32)
            kwargs["max_length_q"] = kwargs["max_length_k"] = longest
        if isinstance(masks := attention_mask, dict):
            check_linear_attention_mask(masks.get("linear_attention"))
        else:
            masks = create_masks(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)

        hidden_states = inputs_embeds
        # Not layer.layer_type: in a pipeline, other stages' layers are replaced by identities.
        for layer, layer_type in zip(self.layers, self.config.layer_types):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                cu_seqlens=cu_seqlens,
                position_ids=position_ids,
                # By this name Transformers' gradient checkpointing takes it away from a layer.
                **{CACHE_NAME: past_key_values},
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: past_key_values if use_cache else None}
        )


@auto_docstring
class DeltaNetForCausalLM(DeltaNetPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        self.model = DeltaNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        names = {name: model_kwargs.pop(name, None) for name in ("past_key_values", "cache")}
        if (came := one_cache(**names, others=model_kwargs)) is not None:
            model_kwargs[CACHE_NAME] = came
        # `generate` asks the cache for its length before the first forward, which an all-linear stock cache refuses.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get(CACHE_NAME) is not None:
            prepare_cache(model_kwargs[CACHE_NAME], self.config)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads the signature
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        # PEFT, which stands in for this method, asks for `past_key_values` (in 0.21): without one, it would put a
        # learned prompt before each new token.
        if CACHE_NAME in inputs and "prepare_inputs_for_generation" in vars(self):
            inputs["past_key_values"] = inputs[CACHE_NAME]
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values=None, position_ids=None, cache=None, **kwargs
    ):
        # `generate` makes the masks itself where the cache could be compiled: by default with Transformers' linear
        # mask.
        past_key_values = one_cache(past_key_values, cache, kwargs)
        return create_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)

    def get_compiled_call(self, compile_config):
        # What `generate` calls for each token with a static cache. Whoever passes a `compile_config` gets
        # torch.compile.
        if compile_config is None and can_be_captured(self):
            return GraphedStep(self.__call__)
        return super().get_compiled_call(compile_config)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        past_key_values (`Cache`, *optional*):
            What the model has read so far, which the tokens of this call continue.
        cache (`Cache`, *optional*):
            The same as `past_key_values`, by the name that it has from Transformers 5.24 on.

        Example:

        ```python
        >>> import modeling_deltanet  # registers the family
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> model = AutoModelForCausalLM.from_pretrained("path/to/a/deltanet")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/a/deltanet")
        >>> inputs = tokenizer("The delta rule", return_tensors="pt")
        >>> print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
        ```"""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


class DeltaNetForSequenceClassification(GenericForSequenceClassification, DeltaNetPreTrainedModel):
    def __init__(self, config: DeltaNetConfig):
        # Not through GenericForSequenceClassification: its AutoModel does not know a model that is remote code.
        DeltaNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeltaNetModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class DeltaNetForTokenClassification(GenericForTokenClassification, DeltaNetPreTrainedModel):
    def __init__(self, config: DeltaNetConfig):
        DeltaNetPreTrainedModel.__init__(self, config)  # as in DeltaNetForSequenceClassification
        self.num_labels = config.num_labels
        self.model = DeltaNetModel(config)
        self.dropout = nn.Dropout(0.1)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "b_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _register_with_peft(constants) -> None:
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[DeltaNetConfig.model_type] = LORA_TARGETS


def _register_with_liger(monkey_patch) -> None:
    """For `TrainingArguments(use_liger_kernel=True)`."""
    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[DeltaNetConfig.model_type] = apply_liger_kernel_to_deltanet


after_import("peft.utils.constants", _register_with_peft)
after_import("liger_kernel.transformers.monkey_patch", _register_with_liger)


__all__ = [
    "DeltaNetForCausalLM",
    "DeltaNetForSequenceClassification",
    "DeltaNetForTokenClassification",
    "DeltaNetModel",
    "DeltaNetPreTrainedModel",
]
