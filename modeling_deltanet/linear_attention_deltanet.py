"""The linear mixer: what a linear-attention layer has in the place of softmax attention.

Letters in shapes: B batch, T time, D hidden size, K key head size, W taps of the convolution.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations import use_kernel_forward_from_hub, use_kernelized_func
from transformers.integrations.accelerate import force_accelerate_hooks

from .cache_deltanet import can_overwrite
from .configuration_deltanet import DeltaNetConfig
from .delta_rule import additive, delta_rule, delta_rule_step
from .kernel_switch import checkpoint_but_for_rule, is_transformed
from .norm_deltanet import DeltaNetRMSNorm
from .rotary_deltanet import rotate
from .short_conv import module_short_conv, short_conv, short_conv_step


# For `use_kernels=True` with a `kernel_config` that maps these names to a kernel of the Hub (kernels/CARD.md): where
# this package is not installed, its Triton kernels come that way. Transformers does nothing here without `kernels` >=
# 0.18.2.
delta_rule = use_kernel_forward_from_hub("DeltaRule")(delta_rule)
delta_rule_step = use_kernel_forward_from_hub("DeltaRuleStep")(delta_rule_step)
short_conv = use_kernel_forward_from_hub("ShortConv")(short_conv)
short_conv_step = use_kernel_forward_from_hub("ShortConvStep")(short_conv_step)


@use_kernelized_func([delta_rule, delta_rule_step, short_conv, short_conv_step])
class DeltaNetLinearAttention(nn.Module):
    """The delta-rule mixer: project, convolve, feature map (and rotation) on q and k, delta rule (with or without
    decay), norm (and gate), project.
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
        self.use_delta_rule = config.linear_use_delta_rule
        key_dim = config.linear_num_key_heads * self.head_k_dim
        value_dim = self.num_v_heads * self.head_v_dim

        self.use_rope = config.linear_use_rope
        self.q_proj = nn.Linear(config.hidden_size, key_dim, bias=config.linear_attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=config.linear_attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, value_dim, bias=config.linear_attention_bias)
        self.b_proj = nn.Linear(config.hidden_size, self.num_v_heads, bias=False) if config.linear_use_beta else None
        self.a_proj = nn.Linear(config.hidden_size, self.num_v_heads, bias=False) if config.linear_use_decay else None
        self.g_proj = nn.Linear(config.hidden_size, value_dim, bias=False) if config.linear_use_output_gate else None
        if config.linear_use_decay:
            # In fp32 whatever dtype the model is made or loaded in, and `_apply` keeps them there.
            self.A_log, self.dt_bias = (nn.Parameter(torch.empty(self.num_v_heads, dtype=torch.float32)) for _ in "Ad")
            self.draw_decay()
        self.conv_size = config.linear_conv_kernel_dim
        if self.conv_size is not None:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                nn.Conv1d(dim, dim, self.conv_size, groups=dim, bias=False) for dim in (key_dim, key_dim, value_dim)
            )
        self.o_norm = DeltaNetRMSNorm(self.head_v_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(value_dim, config.hidden_size, bias=False)

    @torch.no_grad()
    def draw_decay(self) -> None:
        """Draw the decay's parameters as published: A uniform in (0, 16], and dt_bias such that the softplus of it is
        log-uniform in [0.001, 0.1].
        """
        dt = (math.log(0.001) + math.log(100) * torch.rand_like(self.dt_bias)).exp()
        init.copy_(self.A_log, (16 - 16 * torch.rand_like(self.A_log)).log())
        init.copy_(self.dt_bias, dt + (-torch.expm1(-dt)).log())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # The parameters of the module itself are the decay's. Optimizers that look for this mark do not decay them;
        # it has to be renewed because loading a checkpoint replaces parameters.
        super().register_parameter(name, param)
        if param is not None:
            param._no_weight_decay = True

    def _apply(self, fn, recurse=True):
        # `model.bfloat16()`, `.half()` and `.to(dtype)` leave the decay's parameters in fp32: exp(A_log) in bf16 would
        # be off by up to 1 %, which a memory of hundreds of tokens multiplies.
        if recurse:
            for child in self.children():
                child._apply(fn)

        def moved(x):
            y = fn(x)
            return x.to(y.device) if y.dtype != x.dtype and torch.finfo(y.dtype).bits < 32 else y

        return super()._apply(moved, recurse=False)

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

        `attention_mask` `[B, T]` is 0 where a token is padding: such a token writes nothing, lets nothing decay, and
        no convolution sees it. `cu_seqlens` `[N + 1]` holds the borders of packed documents on the flattened time axis
        of all B rows. `position_embeddings` are the rotary cosines and sines, `[B, T, K]`, which only
        `linear_use_rope` reads. `recompute`, without a cache: backward computes again what lies between the
        projections, but for the delta rule's kernels (see the layer).
        """
        B, T, _ = hidden_states.shape
        if cu_seqlens is not None:
            hidden_states = hidden_states.flatten(0, 1).unsqueeze(0)
        qkv = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        b = None if self.b_proj is None else self.b_proj(hidden_states)
        a = None if self.a_proj is None else self.a_proj(hidden_states)
        gate = None if self.g_proj is None else self.g_proj(hidden_states)
        if self.use_rope:
            # As many rows of angles as there are rows of q, which packing has flattened into one.
            position_embeddings = tuple(
                x.expand(B, -1, -1).reshape(*hidden_states.shape[:2], -1) for x in position_embeddings
            )
        inputs = *qkv, b, a, gate, attention_mask, past_key_values, cu_seqlens, position_embeddings
        # With the last projection in it: what that one reads is computed again too, not its product (see the MLP).
        o = checkpoint_but_for_rule(self._mix, *inputs) if recompute else self._mix(*inputs)
        return o.view(B, T, -1)

    def _mix(
        self, q, k, v, b, a, gate, attention_mask, past_key_values, cu_seqlens, position_embeddings
    ) -> torch.Tensor:
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

        dtype = v.dtype
        if not self.use_delta_rule:
            q, k, v, beta = additive(q, k, v, beta)

        options = {"use_qk_l2norm_in_kernel": self.qk_norm == "l2"}
        if a is not None:
            options["g"] = self._log_decay(a, attention_mask)
        if _is_decoding(state, T, attention_mask):
            o = delta_rule_step(q, k, v, beta, state, **options)
        else:
            o, state = delta_rule(
                q,
                k,
                v,
                beta,
                initial_state=state,
                output_final_state=past_key_values is not None,
                cu_seqlens=cu_seqlens,
                **options,
            )
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx, new_tokens=T)

        o = self.o_norm(o.to(dtype))
        if gate is not None:
            o = o * F.silu(gate.unflatten(-1, (-1, self.head_v_dim)))
        return self.o_proj(o.flatten(-2))

    def _log_decay(self, a: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """log alpha = -A softplus(a + dt_bias), `[B, T, HV]` in fp32: at most 0, and 0 for padding."""
        wide = torch.promote_types(a.dtype, torch.float32)
        A, dt_bias = _local(self.A_log).to(wide).exp(), _local(self.dt_bias).to(wide)
        # -softplus(x) is log sigmoid(-x). Compiled by anything but Inductor, the backward of softplus fails on strides
        # (torch 2.13).
        g = A * F.logsigmoid(-(a.to(wide) + dt_bias))
        return g if attention_mask is None else g * attention_mask.unsqueeze(-1).to(g.dtype)

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
            # again, the compiler drops v's, if that is a call of its own: a third of 0.21 ms per layer (8 x 4096 x
            # 2048, H200, commit c7784e6).
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
