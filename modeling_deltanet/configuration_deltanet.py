"""DeltaNet's configuration: sizes, layer pattern, and what each kind of layer is made of."""

from .versions_deltanet import check_transformers  # noqa: F401  (first: another release may lack what follows)


# isort: split
import difflib
import functools
import os
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import logging


logger = logging.get_logger(__name__)

LAYER_TYPES = ("linear_attention", "sliding_attention", "full_attention")

# The published sizes ("Parallelizing Linear Transformers with the Delta Rule over Sequence Length", NeurIPS 2024), and
# those of Gated DeltaNet ("Gated Delta Networks: Improving Mamba2 with Delta Rule", ICLR 2025): keys of 3/4 and values
# of 3/2 of the hidden size. The smaller is the authors' (0.47B without embeddings and head), the larger
# flash-linear-attention's default, whose 6 heads of 256 and 512 are 12 of 128 and 256 here: the kernels take heads of
# at most 256.
GATED_HEADS = {
    "linear_use_decay": True, "linear_use_output_gate": True, "linear_key_head_dim": 128, "linear_value_head_dim": 256,
}  # fmt: skip
PRESETS = {
    "340M": {"hidden_size": 1024, "num_hidden_layers": 24, "linear_num_key_heads": 8, "num_attention_heads": 8},
    "1.3B": {"hidden_size": 2048, "num_hidden_layers": 24, "linear_num_key_heads": 16, "num_attention_heads": 16},
    "0.4B-gated": GATED_HEADS | {
        "hidden_size": 1536, "num_hidden_layers": 11, "intermediate_size": 6144, "linear_num_key_heads": 9,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    },
    "1.3B-gated": GATED_HEADS | {"hidden_size": 2048, "num_hidden_layers": 21, "linear_num_key_heads": 12},
}  # fmt: skip

# What Transformers itself writes into a config.json, or takes out of one, besides declared fields and the parameters
# of generation. Everything else is a spelling mistake or belongs to another model: the constructor refuses it. In a
# file another tool, or a later Transformers, may have written it: it is kept, with a warning.
TRANSFORMERS_KEYS = {
    "attn_implementation", "auto_map", "base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan",
    "custom_pipelines", "experts_implementation", "loss_type", "model_type", "name_or_path",
    "num_labels", "output_attentions", "partial_rotary_factor", "per_layer_config", "quantization_config",
    "rope_scaling", "rope_theta", "tie_last_hidden_states", "torch_dtype", "transformers_weights",
}  # fmt: skip

FOREIGN = "_foreign_fields"  # the constructor's argument for what `from_dict` and `from_json_file` keep


# What Transformers computes with when it reads a configuration, and does not check.
INHERITED_TYPES = {
    "architectures": (list,), "auto_map": (dict,), "dtype": (str, torch.dtype), "id2label": (dict,),
    "label2id": (dict,),
    "num_labels": (int,), "partial_rotary_factor": (int, float), "per_layer_config": (dict,), "rope_scaling": (dict,),
    "rope_theta": (int, float), "torch_dtype": (str, torch.dtype),
}  # fmt: skip
MAX_COUNT = 1_000_000  # of layers, or of labels, for each of which an object is made before anything else is looked at


@functools.cache  # asked for each field of a file
def _generation_parameters() -> frozenset[str]:
    return frozenset(GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params())


def _is_finite_number(x) -> bool:
    return isinstance(x, int | float) and -1e300 < x < 1e300


@strict
class DeltaNetConfig(PreTrainedConfig):
    r"""
    Configuration of a DeltaNet: linear-attention layers that follow the delta rule, with softmax layers where
    `layer_types` asks for them. The defaults are the published 1.3B model without softmax layers.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000):
            Number of tokens that the embeddings and the head know.
        hidden_size (`int`, *optional*, defaults to 2048):
            Width of the residual stream.
        intermediate_size (`int`, *optional*):
            Width of the SwiGLU MLP; 8/3 of `hidden_size`, rounded up to a multiple of 256, by default.
        num_hidden_layers (`int`, *optional*, defaults to 24):
            Number of layers.
        layer_types (`list[str]`, *optional*):
            For each layer `"linear_attention"` (the delta rule), `"sliding_attention"` or `"full_attention"`. All
            linear by default; [`DeltaNetConfig.hybrid_layer_types`] makes the two published hybrid patterns.
        linear_num_key_heads (`int`, *optional*):
            Query and key heads of a linear layer; `hidden_size // 128` by default, at least 1.
        linear_num_value_heads (`int`, *optional*):
            Value heads of a linear layer, a multiple of `linear_num_key_heads` and equal to it by default.
        linear_key_head_dim (`int`, *optional*):
            Size of a query or key head; `hidden_size // linear_num_key_heads` by default.
        linear_value_head_dim (`int`, *optional*):
            Size of a value head; `hidden_size // linear_num_value_heads` by default.
        linear_conv_kernel_dim (`int` or `None`, *optional*, defaults to 4):
            Taps of the short causal convolution on q, k and v; `None` for no convolution.
        linear_qk_activation (`str`, *optional*, defaults to `"silu"`):
            Feature map of q and k: `"silu"`, `"relu"`, `"elu"` (1 + ELU) or `"identity"`.
        linear_qk_norm (`str`, *optional*, defaults to `"l2"`):
            Norm of q and k over a head: `"l2"`, or `"sum"` (divide by the sum; for feature maps that are positive).
        linear_use_beta (`bool`, *optional*, defaults to `True`):
            Whether the step size beta is learned, a sigmoid per token and value head; otherwise it is 1.
        linear_allow_neg_eigval (`bool`, *optional*, defaults to `False`):
            Double beta, to a range of (0, 2): negative eigenvalues, which learn parity and permutations.
        linear_use_delta_rule (`bool`, *optional*, defaults to `True`):
            Whether a write first subtracts what its key already retrieves. Without it a write only adds, as in a plain
            linear transformer: the baseline that the delta rule is compared with.
        linear_use_decay (`bool`, *optional*, defaults to `False`):
            Let the memory fade before each token writes (Gated DeltaNet): every value head multiplies its state by
            alpha = exp(-exp(`A_log`) * softplus(`a_proj`(x) + `dt_bias`)), learned per token. Not to be confused with
            `linear_use_output_gate`; the published Gated DeltaNet has both.
        linear_use_output_gate (`bool`, *optional*, defaults to `False`):
            Multiply a linear layer's normalised output by SiLU of a projection.
        linear_attention_bias (`bool`, *optional*, defaults to `False`):
            Bias in a linear layer's q, k and v projections, as a layer converted from softmax attention may bring.
        linear_use_rope (`bool`, *optional*, defaults to `False`):
            Rotate a linear layer's queries and keys by `rope_parameters`, after their feature map. Published DeltaNets
            do not; layers converted from softmax attention lose quality without it. Needs heads of `head_dim`.
        num_attention_heads (`int`, *optional*):
            Query heads of a softmax layer; `hidden_size // 128` by default, at least 1.
        num_key_value_heads (`int`, *optional*):
            Key and value heads of a softmax layer, a divisor of `num_attention_heads` and equal to it by default.
        head_dim (`int`, *optional*):
            Size of a softmax layer's head; `hidden_size // num_attention_heads` by default.
        sliding_window (`int`, *optional*):
            Tokens that a sliding layer sees, itself included, at least 2. Required with such layers, refused without.
        rope_parameters (`dict`, *optional*):
            Rotary embedding of the softmax layers (and the linear ones, see `linear_use_rope`); theta 10000 by
            default, `{"rope_theta": None}` for none.
        use_qk_norm (`bool`, *optional*, defaults to `False`):
            RMSNorm on each query and key head of a softmax layer (as in Qwen3).
        attention_bias (`bool`, *optional*, defaults to `False`):
            Bias in a softmax layer's q, k and v projections.
        attention_out_bias (`bool`, *optional*, defaults to `False`):
            Bias in a softmax layer's output projection.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on a softmax layer's attention weights.
        max_position_embeddings (`int`, *optional*, defaults to 2048):
            Length that the rotary embedding was trained for. The linear layers have no limit.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the MLP.
        rms_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of every RMSNorm.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns its cache.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the head shares the embeddings' weight.

    Raises:
        ValueError: a field that does not exist (what a file has of these is kept, with a warning), or a size that its
        heads do not divide. huggingface_hub.errors.StrictDataclassError: a field of another type, or fields that
        contradict each other, named
            with their values.

    Example:

    ```python
    >>> from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM

    >>> config = DeltaNetConfig.preset("340M", hybrid="sliding")  # every other layer a window of 2048 tokens
    >>> model = DeltaNetForCausalLM(config)
    ```
    """

    model_type = "deltanet"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    layer_types: list[str] | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int | None = 4
    linear_qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu"
    linear_qk_norm: Literal["l2", "sum"] = "l2"
    linear_use_beta: bool = True
    linear_allow_neg_eigval: bool = False
    linear_use_delta_rule: bool = True
    linear_use_decay: bool = False
    linear_use_output_gate: bool = False
    linear_attention_bias: bool = False
    linear_use_rope: bool = False
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    rope_parameters: RopeParameters | dict | None = None
    use_qk_norm: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    attention_dropout: int | float = 0.0
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    @classmethod
    def preset(
        cls,
        size: Literal["340M", "1.3B", "0.4B-gated", "1.3B-gated"],
        hybrid: Literal["sliding", "global"] | None = None,
        **overrides,
    ) -> "DeltaNetConfig":
        """The published `"340M"` or `"1.3B"` DeltaNet, or the `"0.4B-gated"` or `"1.3B-gated"` Gated DeltaNet, pure or
        as one of DeltaNet's two hybrids; `overrides` are config fields.
        """
        if size not in PRESETS:
            raise ValueError(f"there is no preset {size!r}, only {', '.join(PRESETS)}")
        fields = dict(PRESETS[size])
        if hybrid is not None:
            fields["layer_types"] = cls.hybrid_layer_types(
                hybrid, overrides.get("num_hidden_layers", fields["num_hidden_layers"])
            )
        if hybrid == "sliding":
            fields["sliding_window"] = 2048
        return cls(**{**fields, **overrides})

    @staticmethod
    def hybrid_layer_types(hybrid: Literal["sliding", "global"], num_hidden_layers: int) -> list[str]:
        """The paper's hybrids: `"sliding"` has a sliding window in every other layer, beginning with layer 1;
        `"global"` has full attention in layers 1 and `num_hidden_layers // 2` (counted from 0)."""
        softmax_layers = {
            "sliding": dict.fromkeys(range(1, num_hidden_layers, 2), "sliding_attention"),
            "global": dict.fromkeys((1, num_hidden_layers // 2), "full_attention"),
        }
        if hybrid not in softmax_layers:
            raise ValueError(f"there is no hybrid {hybrid!r}, only {', '.join(softmax_layers)}")
        return [softmax_layers[hybrid].get(i, "linear_attention") for i in range(num_hidden_layers)]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """What a file holds; see [`PreTrainedConfig.from_dict`]."""
        return super().from_dict(cls._keeping_unknown(config_dict), **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "DeltaNetConfig":
        """What a file holds; see [`PreTrainedConfig.from_json_file`]."""
        return cls(**cls._keeping_unknown(cls._dict_from_json_file(json_file)))

    def __post_init__(self, **kwargs):
        # Before anything else: what reads these must not take them for fields.
        foreign = kwargs.pop(FOREIGN, {})
        self._refuse_unknown(kwargs)
        self._check_inherited(kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 256 * -(-(self.hidden_size * 8 // 3) // 256)
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] * self.num_hidden_layers
        if self.linear_num_key_heads is None:
            self.linear_num_key_heads = max(1, self.hidden_size // 128)
        if self.linear_num_value_heads is None:
            self.linear_num_value_heads = self.linear_num_key_heads
        if self.linear_key_head_dim is None:
            self.linear_key_head_dim = self._divide("hidden_size", "linear_num_key_heads")
        if self.linear_value_head_dim is None:
            self.linear_value_head_dim = self._divide("hidden_size", "linear_num_value_heads")
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.hidden_size // 128)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self._divide("hidden_size", "num_attention_heads")
        super().__post_init__(**kwargs, **foreign)
        # TRL reads it of each model that Transformers does not hold. Not of the class, whose dict all instances would
        # share.
        self.auto_map = getattr(self, "auto_map", None) or {}

    def to_dict(self) -> dict[str, Any]:
        """As [`PreTrainedConfig.to_dict`], without the `auto_map` of a model that is no remote code, and without those
        fields at their defaults of which older versions would warn.
        """
        fields = super().to_dict()
        for name, default in (("auto_map", {}), ("linear_use_decay", False), ("linear_use_delta_rule", True)):
            if fields[name] == default:
                del fields[name]
        return fields

    def _check_inherited(self, kwargs: dict) -> None:
        """Refuse values of Transformers' fields that it would stumble over, as `num_labels` of any size or type."""
        fields = {name: kwargs.get(name, vars(self).get(name)) for name in INHERITED_TYPES}
        for name, types in INHERITED_TYPES.items():
            if fields[name] is not None and (not isinstance(fields[name], types) or isinstance(fields[name], bool)):
                wanted = " or ".join(t.__name__ for t in types)
                raise ValueError(f"{name} must be {wanted}, got {fields[name]!r}")
        for name in ("dtype", "torch_dtype"):
            dtype = fields[name]
            if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"{name} must name a dtype of torch, got {dtype!r}")
        if not 0 <= (fields["num_labels"] or 0) <= MAX_COUNT:
            raise ValueError(f"num_labels must be from 0 to {MAX_COUNT}, got {fields['num_labels']}")
        if not self.num_hidden_layers <= MAX_COUNT:
            raise ValueError(f"num_hidden_layers must be at most {MAX_COUNT}, got {self.num_hidden_layers}")
        quantization = kwargs.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict) and not hasattr(quantization, "to_dict"):
            raise ValueError(f"quantization_config must be dict, got {quantization!r}")
        for name in kwargs:
            taken = name.startswith("__") or name in ("_auto_class", "_post_init_done")
            if taken or callable(getattr(type(self), name, None)):
                raise ValueError(f"{name!r} cannot be a field of a configuration: something else has that name")
        for key in fields["id2label"] or {}:
            if not str(key).removeprefix("-").isdecimal() or len(str(key)) > 20:
                raise ValueError(f"id2label must have numbers as keys, got {key!r}")

    def _divide(self, size: str, parts: str) -> int:
        """A head size that was not given, from the two fields that determine it."""
        total, count = getattr(self, size), getattr(self, parts)
        if count < 1 or total % count:
            raise ValueError(f"{size} ({total}) must be a multiple of {parts} ({count}), or the head size be given")
        return total // count

    @classmethod
    def _keeping_unknown(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the constructor for `fields` from a file, unknown ones included."""
        if fields.get("model_type", cls.model_type) != cls.model_type:  # another model's file
            return fields
        foreign = {name: fields[name] for name in fields if not cls._knows(name) and not hasattr(cls, name)}
        if not foreign:
            return fields
        named = ", ".join(f"{name!r} ({value!r}{cls._hint(name)})" for name, value in foreign.items())
        logger.warning_once(f"DeltaNetConfig keeps, and does not read, fields that it does not have: {named}")
        return {name: value for name, value in fields.items() if name not in foreign} | {FOREIGN: foreign}

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        for name, value in kwargs.items():
            if not self._knows(name):
                raise ValueError(f"DeltaNetConfig has no field {name!r} (got {value!r}){self._hint(name)}")

    @classmethod
    def _knows(cls, name: str) -> bool:
        return (
            name.startswith("_")
            or name in cls.__dataclass_fields__
            or name in TRANSFORMERS_KEYS
            or name in _generation_parameters()
        )

    @classmethod
    def _hint(cls, name: str) -> str:
        close = difflib.get_close_matches(name, list(cls.__dataclass_fields__), n=1, cutoff=0.75)
        return f"; did you mean {close[0]!r}?" if close else ""

    def validate_architecture(self):
        """Part of `@strict` validation: refuses what contradicts itself, naming both values."""
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "linear_num_key_heads",
            "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "num_attention_heads",
            "num_key_value_heads", "head_dim",
        ):  # fmt: skip
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} must be at least 1, and below 2^31, got {getattr(self, name)}")
        for name, low, high in (
            ("rms_norm_eps", 0, 1), ("initializer_range", 0, 1e9), ("attention_dropout", 0, 1),
            ("max_position_embeddings", 1, 2**62), ("pad_token_id", -self.vocab_size, self.vocab_size - 1),
        ):  # fmt: skip
            if getattr(self, name) is not None and not low <= getattr(self, name) <= high:  # nor NaN
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        for multiple, of in (
            ("linear_num_value_heads", "linear_num_key_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            if getattr(self, multiple) % getattr(self, of):
                raise ValueError(
                    f"{multiple} ({getattr(self, multiple)}) must be a multiple of {of} ({getattr(self, of)})"
                )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, but num_hidden_layers is {self.num_hidden_layers}"
            )
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types may hold {', '.join(LAYER_TYPES)}, got {', '.join(unknown)}")
        has_sliding_layers = "sliding_attention" in self.layer_types
        if has_sliding_layers and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention layers, but sliding_window is None")
        if not has_sliding_layers and self.sliding_window is not None:
            raise ValueError(
                f"sliding_window is {self.sliding_window}, but no layer in layer_types is sliding_attention"
            )
        if has_sliding_layers and self.sliding_window < 2:  # for 1, Transformers' cache keeps everything ([-0:])
            raise ValueError(f"sliding_window must be at least 2, got {self.sliding_window}")
        if self.linear_conv_kernel_dim is not None and not 2 <= self.linear_conv_kernel_dim < 2**31:
            raise ValueError(
                f"linear_conv_kernel_dim must be at least 2, or None for no convolution, got "
                f"{self.linear_conv_kernel_dim}"
            )
        if self.linear_qk_norm == "sum" and self.linear_qk_activation not in ("relu", "elu"):
            raise ValueError(
                f"linear_qk_norm is 'sum', which needs positive features, but linear_qk_activation is "
                f"{self.linear_qk_activation!r}; take 'relu' or 'elu'"
            )
        if self.linear_allow_neg_eigval and not self.linear_use_beta:
            raise ValueError(
                "linear_allow_neg_eigval is True, but linear_use_beta is False: a fixed beta has no range to double"
            )
        for name in ("linear_allow_neg_eigval", "linear_use_decay"):
            if getattr(self, name) and not self.linear_use_delta_rule:
                raise ValueError(
                    f"{name} is True, but linear_use_delta_rule is False: it belongs to the delta rule, and a memory "
                    "that only adds has none"
                )
        if self.linear_use_rope and self.rope_parameters.get("rope_theta") is None:
            raise ValueError("linear_use_rope is True, but rope_parameters has no rope_theta to rotate by")
        if self.linear_use_rope and self.linear_key_head_dim != self.head_dim:
            raise ValueError(
                f"linear_use_rope is True, but linear_key_head_dim ({self.linear_key_head_dim}) is not head_dim "
                f"({self.head_dim}), the size that the rotary embedding is made for"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}, got {self.hidden_act!r}")
        for name, only in (("partial_rotary_factor", 1), *((layer_type, None) for layer_type in LAYER_TYPES)):
            if self.rope_parameters.get(name, only) != only:
                raise ValueError(
                    f"rope_parameters has {name}: {self.rope_parameters[name]}, but all softmax layers share one "
                    "rotary embedding of whole heads"
                )
        rope_types = ("default", *ROPE_INIT_FUNCTIONS)
        if self.uses_rope and self.rope_parameters["rope_type"] not in rope_types:
            raise ValueError(
                f"rope_type must be one of {', '.join(rope_types)}, got {self.rope_parameters['rope_type']!r}"
            )
        if self.uses_rope and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for the rotary embedding")

    def validate_rope(self):
        """Part of `@strict` validation: Transformers' own checks, which an odd head without rotation need not pass.
        They warn of numbers that are none, and end in a KeyError where one is missing."""
        for name, value in self.rope_parameters.items():
            numbers = value if isinstance(value, list) else [value]
            if name not in ("rope_type", "type") and not all(x is None or _is_finite_number(x) for x in numbers):
                raise ValueError(f"rope_parameters must hold finite numbers, got {name} = {value!r}")
        theta = self.rope_parameters.get("rope_theta")
        if theta is not None and (isinstance(theta, list) or theta <= 0):
            raise ValueError(f"rope_theta must be greater than 0, got {theta}")
        if self.uses_rope:
            try:
                super().validate_rope()
            except KeyError as error:
                raise ValueError(error.args[0]) from error

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor parallelism: every mixer by its heads, the MLP by its width. Names what this configuration has and
        no more, because Transformers warns of a rule that matches nothing."""
        plan = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
        if "linear_attention" in self.layer_types:
            columns = ["q_proj", "k_proj", "v_proj"]
            columns += ["b_proj"] * self.linear_use_beta + ["g_proj"] * self.linear_use_output_gate
            columns += ["a_proj", "A_log", "dt_bias"] * self.linear_use_decay
            plan |= {f"linear_attn.{name}": "colwise" for name in columns}
            if self.linear_conv_kernel_dim is not None:
                # The style that splits the first dimension of any weight; colwise splits a convolution's second.
                plan |= {f"linear_attn.{name}_conv1d": "embedding_rowwise" for name in "qkv"}
            plan |= {"linear_attn.o_norm": "replicated_with_grad_allreduce", "linear_attn.o_proj": "rowwise"}
        if set(self.layer_types) != {"linear_attention"}:
            plan |= {f"self_attn.{name}_proj": "colwise" for name in "qkv"}
            if self.use_qk_norm:
                plan |= {f"self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
            plan |= {"self_attn.o_proj": "rowwise"}
        return {f"layers.*.{name}": style for name, style in plan.items()}

    @property
    def uses_rope(self) -> bool:
        """Whether any layer rotates its queries and keys."""
        may_rotate = self.linear_use_rope or set(self.layer_types) != {"linear_attention"}
        return may_rotate and self.rope_parameters.get("rope_theta") is not None


__all__ = ["DeltaNetConfig"]
