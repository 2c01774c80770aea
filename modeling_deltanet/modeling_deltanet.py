"""DeltaNet: a decoder whose layers keep a fixed-size memory by the delta rule, with softmax layers where wanted.

Read from top to bottom: softmax attention, MLP, layer, model, heads. The other mixer stands in
`linear_attention_deltanet.py`, what both use in `norm_deltanet.py` and `rotary_deltanet.py`. Letters in shapes: B
batch, T time, D hidden size.
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
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .after_import import after_import
from .cache_deltanet import CACHE_NAME, one_cache, prepare_cache
from .configuration_deltanet import DeltaNetConfig
from .cuda_graph import GraphedStep, can_be_captured
from .kernel_switch import is_transformed
from .liger_deltanet import apply_liger_kernel_to_deltanet
from .linear_attention_deltanet import DeltaNetLinearAttention
from .norm_deltanet import DeltaNetRMSNorm
from .packing_deltanet import check_linear_attention_mask, create_masks, find_packed_documents
from .rotary_deltanet import DeltaNetRotaryEmbedding, rotate


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
        4096 tokens on an H200: with Liger 64 GB and 504 ms, compiled 66 GB and 476 ms (commit 9cfbe21). With
        Liger it was 53 GB and 536 ms where the 4.5 were not kept, 82 GB and 509 ms with all 24 (commit cfac000). On a
        CPU memory is not what is short. A cache would be written twice. A layer that is computed again as a whole (by
        Transformers' gradient checkpointing) need not do so with its parts.
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

    def __init__(self, config: DeltaNetConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self._was_made_to_cache = config.use_cache

    @functools.wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(self, *args, **kwargs):
        # Trainer turns `use_cache` off and leaves it off (in 5.23). That is for training: whoever loads the folder
        # would get no `past_key_values`.
        use_cache = self.config.use_cache
        self.config.use_cache = use_cache or self._was_made_to_cache
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.config.use_cache = use_cache

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The name by which PEFT asks (in 0.21). Transformers' own property of this name warns."""
        return self.is_activation_checkpointing

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeltaNetLinearAttention) and module.a_proj is not None:
            module.draw_decay()

    def _resolve_parallel_plans(self, distributed_config):
        # Transformers splits a projection at any column, also within a head.
        for layers, name in (("linear_attn", "linear_num_key_heads"), ("self_attn", "num_key_value_heads")):
            heads, processes = getattr(self.config, name), distributed_config.tp_size
            if f"layers.*.{layers}.o_proj" in self.config.base_model_tp_plan and heads % processes:
                raise ValueError(f"{name} ({heads}) must be a multiple of the tensor-parallel size ({processes})")
        return super()._resolve_parallel_plans(distributed_config)


# Transformers takes a model's name for its docstring from the folder of its own source tree
@auto_docstring(custom_intro="DeltaNet without a head: the hidden states of its last layer.")
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


@auto_docstring(custom_intro="DeltaNet with a language-modelling head.")
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


LORA_TARGETS = [
    "q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
]  # fmt: skip


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
