"""DeltaNet in MLX, as mlx-lm runs it from beside the weights.

`deltanet export --to mlx` copies this file into the folder that it makes, and names it there in config.json
(`model_file`). So it imports only what mlx-lm brings, and its arguments have no defaults: the export writes every one.

Read from top to bottom: arguments, rotation, linear mixer, softmax attention, MLP, layer, model. Letters in shapes: B
batch, T time, H key heads, HV value heads, K and V their sizes, W taps of the convolution.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    create_ssm_mask,
    scaled_dot_product_attention,
)
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache
from mlx_lm.models.gated_delta import gated_delta_kernel, gated_delta_ops
from transformers import AutoConfig, PreTrainedConfig


class DeltaNetConfig(PreTrainedConfig):
    """For the tokenizer, which mlx-lm loads after this module: Transformers warns of a model type that it does not
    know.
    """

    model_type = "deltanet"


AutoConfig.register("deltanet", DeltaNetConfig, exist_ok=True)

L2_NORM_EPS = 1e-6  # added to the squared norm, as in the delta rule that the model was trained with
ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
}


# (No `from __future__ import annotations`: mlx-lm does not enter this module in sys.modules, where a dataclass would
# look its annotations up.)
@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: list[str]
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int | None
    linear_qk_activation: str
    linear_qk_norm: str
    linear_use_beta: bool
    linear_allow_neg_eigval: bool
    linear_use_decay: bool
    linear_use_output_gate: bool
    linear_attention_bias: bool
    linear_use_rope: bool
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int | None
    use_qk_norm: bool
    attention_bias: bool
    attention_out_bias: bool
    hidden_act: str
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_frequencies: list[float] | None  # radians per token of each pair of channels; None for no rotation
    rope_scaling_factor: float  # on cosines and sines (YaRN)


class Rotation(nn.Module):
    """The rotary embedding of queries and keys `[B, heads, T, head_dim]`."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.scale = args.rope_scaling_factor
        self._tokens_per_radian = 1 / mx.array(args.rope_frequencies, mx.float32)

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        dims = x.shape[-1]
        y = mx.fast.rope(
            x, dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._tokens_per_radian
        )
        return y if self.scale == 1 else self.scale * y


class LinearAttention(nn.Module):
    """The delta-rule mixer: project, convolve, feature map (and rotation) on q and k, delta rule (with or without
    decay), norm (and gate), project.

    Its cache holds, along the batch, the fp32 state `[B, HV, V, K]`, then the convolution's last W - 1 inputs if there
    is one, then the next position `[B]` if queries and keys are rotated.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.key_dim = args.linear_num_key_heads * args.linear_key_head_dim
        value_dim = args.linear_num_value_heads * args.linear_value_head_dim
        hidden, bias = args.hidden_size, args.linear_attention_bias
        self.q_proj = nn.Linear(hidden, self.key_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.key_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, value_dim, bias=bias)
        if args.linear_use_beta:
            self.b_proj = nn.Linear(hidden, args.linear_num_value_heads, bias=False)
        if args.linear_use_decay:
            self.a_proj = nn.Linear(hidden, args.linear_num_value_heads, bias=False)
            self.A_log = mx.zeros(args.linear_num_value_heads)
            self.dt_bias = mx.zeros(args.linear_num_value_heads)
        if args.linear_use_output_gate:
            self.g_proj = nn.Linear(hidden, value_dim, bias=False)
        if args.linear_conv_kernel_dim is not None:
            channels = 2 * self.key_dim + value_dim
            self.conv1d = nn.Conv1d(channels, channels, args.linear_conv_kernel_dim, groups=channels, bias=False)
        if args.linear_use_rope:
            self.rotation = Rotation(args)
        self.o_norm = nn.RMSNorm(args.linear_value_head_dim, args.rms_norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden, bias=False)

    def make_cache(self) -> ArraysCache:
        return ArraysCache(1 + (self.args.linear_conv_kernel_dim is not None) + self.args.linear_use_rope)

    def __call__(self, x: mx.array, mask: mx.array | None, cache: ArraysCache | None) -> mx.array:
        args = self.args
        B, T, _ = x.shape
        cache = self.make_cache() if cache is None else cache
        qkv = mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        if args.linear_conv_kernel_dim is not None:
            qkv = self._convolve(qkv, mask, cache)
        q, k, v = mx.split(qkv, [self.key_dim, 2 * self.key_dim], axis=-1)
        v = nn.silu(v).reshape(B, T, -1, args.linear_value_head_dim).astype(mx.float32)
        q, k = (self._features(x.reshape(B, T, -1, args.linear_key_head_dim)) for x in (q, k))
        if args.linear_use_rope:
            start = self._advance_position(B, T, cache)
            q, k = (self.rotation(x.swapaxes(1, 2), start).swapaxes(1, 2) for x in (q, k))
        if args.linear_qk_norm == "l2":
            q, k = (x * mx.rsqrt(mx.square(x).sum(-1, keepdims=True) + L2_NORM_EPS) for x in (q, k))
        q = q * args.linear_key_head_dim**-0.5

        beta = alpha = mx.ones(v.shape[:3])
        if args.linear_use_beta:
            beta = mx.sigmoid(self.b_proj(x).astype(mx.float32))
            beta = 2 * beta if args.linear_allow_neg_eigval else beta
        if args.linear_use_decay:
            a = self.a_proj(x).astype(mx.float32) + self.dt_bias
            alpha = mx.exp(-mx.exp(self.A_log) * nn.softplus(a))

        state = cache[0]
        if state is None:
            state = mx.zeros((B, *v.shape[2:], args.linear_key_head_dim))
        # The kernel is Metal's, takes keys of a multiple of 32 only, and has no gradients.
        on_metal = mx.default_device() == mx.gpu and mx.metal.is_available()
        has_kernel = on_metal and args.linear_key_head_dim % 32 == 0 and not self.training
        rule = gated_delta_kernel if has_kernel else gated_delta_ops
        o, cache[0] = rule(q, k, v, alpha, beta, state, mask)
        cache.advance(T)

        o = self.o_norm(o.astype(x.dtype))
        if args.linear_use_output_gate:
            o = o * nn.silu(self.g_proj(x).reshape(o.shape))
        return self.o_proj(o.reshape(B, T, -1))

    def _convolve(self, x: mx.array, mask: mx.array | None, cache: ArraysCache) -> mx.array:
        """The short causal convolution along time, from the cache's inputs on."""
        B, T, channels = x.shape
        before = self.args.linear_conv_kernel_dim - 1
        history = cache[1]
        if history is None:
            history = mx.zeros((B, before, channels), x.dtype)
        if mask is not None:
            x = mx.where(mask[..., None], x, 0)
        padded = mx.concatenate([history, x], axis=1)
        if cache.lengths is None:
            cache[1] = mx.contiguous(padded[:, -before:])
        else:  # padding stands behind each prompt's tokens
            ends = mx.clip(cache.lengths, 0, T)
            cache[1] = mx.take_along_axis(padded, (ends[:, None] + mx.arange(before))[..., None], axis=1)
        return self.conv1d(padded)

    def _advance_position(self, B: int, T: int, cache: ArraysCache) -> mx.array:
        """The position of the first of T tokens in each row, `[B]`; the cache gets that of the next after them."""
        place = len(cache.cache) - 1
        start = cache[place]
        if start is None:
            start = mx.zeros(B, mx.int32)
            if cache.left_padding is not None:
                start = start - cache.left_padding
        cache[place] = start + (T if cache.lengths is None else mx.clip(cache.lengths, 0, T))
        return start

    def _features(self, x: mx.array) -> mx.array:
        """Feature map and sum norm of queries or keys, in fp32."""
        activation = self.args.linear_qk_activation
        if activation == "silu":
            x = nn.silu(x)
        elif activation == "relu":
            x = nn.relu(x)
        elif activation == "elu":
            x = nn.elu(x) + 1
        x = x.astype(mx.float32)
        return x / (x.sum(-1, keepdims=True) + 1e-6) if self.args.linear_qk_norm == "sum" else x


class Attention(nn.Module):
    """Softmax attention, full or within a sliding window."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        q_dim, kv_dim = args.num_attention_heads * args.head_dim, args.num_key_value_heads * args.head_dim
        self.q_proj = nn.Linear(args.hidden_size, q_dim, bias=args.attention_bias)
        self.k_proj = nn.Linear(args.hidden_size, kv_dim, bias=args.attention_bias)
        self.v_proj = nn.Linear(args.hidden_size, kv_dim, bias=args.attention_bias)
        self.o_proj = nn.Linear(q_dim, args.hidden_size, bias=args.attention_out_bias)
        self.use_qk_norm = args.use_qk_norm
        if args.use_qk_norm:
            self.q_norm = nn.RMSNorm(args.head_dim, args.rms_norm_eps)
            self.k_norm = nn.RMSNorm(args.head_dim, args.rms_norm_eps)
        self.rotation = None if args.rope_frequencies is None else Rotation(args)

    def __call__(self, x: mx.array, mask, cache) -> mx.array:
        B, T, _ = x.shape
        q, k, v = (y.reshape(B, T, -1, self.head_dim) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        if self.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
        if self.rotation is not None:
            offset = 0 if cache is None else cache.offset
            q, k = self.rotation(q, offset), self.rotation(k, offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        o = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.head_dim**-0.5, mask=mask)
        return self.o_proj(o.swapaxes(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU, or the same with another activation."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)
        self.act_fn = ACTIVATIONS[args.hidden_act]

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A mixer of the layer's type and an MLP, each behind a norm and beside a residual."""

    def __init__(self, args: ModelArgs, layer_type: str):
        super().__init__()
        self.is_linear = layer_type == "linear_attention"
        if self.is_linear:
            self.linear_attn = LinearAttention(args)
        else:
            self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)

    def __call__(self, x: mx.array, mask, cache) -> mx.array:
        mixer = self.linear_attn if self.is_linear else self.self_attn
        x = x + mixer(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeltaNetModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args, layer_type) for layer_type in args.layer_types]
        self.norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache=None) -> mx.array:
        x = self.embed_tokens(inputs)
        cache = [None] * len(self.layers) if cache is None else cache
        masks = {}
        for layer_type, layer_cache in zip(self.args.layer_types, cache):
            if layer_type not in masks:  # those of all layers of a type are equal
                masks[layer_type] = self._mask(x, layer_type, layer_cache)
        for layer, layer_type, layer_cache in zip(self.layers, self.args.layer_types, cache):
            x = layer(x, masks[layer_type], layer_cache)
        return self.norm(x)

    def _mask(self, x: mx.array, layer_type: str, cache):
        if layer_type == "linear_attention":
            return create_ssm_mask(x, cache)
        window = self.args.sliding_window if layer_type == "sliding_attention" else None
        return create_attention_mask(x, cache, window_size=window)


class Model(nn.Module):
    """What mlx-lm asks of a model: logits, caches, and what to do with weights as they lie in the files."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = DeltaNetModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache=None) -> mx.array:
        x = self.model(inputs, cache)
        return self.model.embed_tokens.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers

    def make_cache(self) -> list:
        def made(layer: DecoderLayer, layer_type: str):
            if layer.is_linear:
                return layer.linear_attn.make_cache()
            return RotatingKVCache(self.args.sliding_window) if layer_type == "sliding_attention" else KVCache()

        return [made(*pair) for pair in zip(self.layers, self.args.layer_types)]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """One convolution over q, k and v, with MLX's order of axes: `[channels, W, 1]`. Weights that have it, which
        `mlx_lm.convert` wrote, stay.
        """
        weights = dict(weights)
        for name in [name for name in weights if name.endswith(".q_conv1d.weight")]:
            prefix = name.removesuffix("q_conv1d.weight")
            parts = [weights.pop(f"{prefix}{x}_conv1d.weight") for x in "qkv"]
            weights[f"{prefix}conv1d.weight"] = mx.concatenate(parts).swapaxes(1, 2)
        return weights

    @property
    def cast_predicate(self):
        """`mlx_lm.convert --dtype` leaves the decay in fp32: exp(A_log) in bf16 would be off by up to 1 %, which a
        memory of hundreds of tokens multiplies.
        """
        return lambda name: not name.endswith((".A_log", ".dt_bias"))
