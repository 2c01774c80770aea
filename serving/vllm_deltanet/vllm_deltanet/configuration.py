"""DeltaNet's configuration as vLLM reads it: the fields of `modeling_deltanet.DeltaNetConfig`, no more."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


LINEAR, SLIDING, FULL = "linear_attention", "sliding_attention", "full_attention"


@strict
class DeltaNetConfig(PreTrainedConfig):
    """See `modeling_deltanet.DeltaNetConfig`, which documents the fields and writes the files that come here."""

    model_type = "deltanet"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

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
    rope_parameters: dict | None = None
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

    def __post_init__(self, **kwargs):
        unknown = sorted(name for name in kwargs if name.startswith("linear_"))
        if unknown:
            raise ValueError(
                f"vllm-deltanet knows no {', '.join(unknown)} of a linear layer, and would compute another model: got "
                f"{', '.join(f'{name} = {kwargs[name]!r}' for name in unknown)}; install a newer vllm-deltanet"
            )
        if self.intermediate_size is None:
            self.intermediate_size = 256 * -(-(self.hidden_size * 8 // 3) // 256)
        if self.layer_types is None:
            self.layer_types = [LINEAR] * self.num_hidden_layers
        if self.linear_num_key_heads is None:
            self.linear_num_key_heads = max(1, self.hidden_size // 128)
        if self.linear_num_value_heads is None:
            self.linear_num_value_heads = self.linear_num_key_heads
        if self.linear_key_head_dim is None:
            self.linear_key_head_dim = self.hidden_size // self.linear_num_key_heads
        if self.linear_value_head_dim is None:
            self.linear_value_head_dim = self.hidden_size // self.linear_num_value_heads
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.hidden_size // 128)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation: what vLLM would stumble over, or compute wrongly, later."""
        unknown = sorted(set(self.layer_types) - {LINEAR, SLIDING, FULL})
        if unknown or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must hold {self.num_hidden_layers} (num_hidden_layers) of {LINEAR}, {SLIDING}, {FULL}, "
                f"got {self.layer_types}"
            )
        if (SLIDING in self.layer_types) != (self.sliding_window is not None):
            raise ValueError(f"sliding_window is {self.sliding_window}, but layer_types are {set(self.layer_types)}")

    def validate_rope(self):
        """Part of `@strict` validation: a model that rotates nothing may say so by `rope_theta` None, which
        Transformers' own check refuses.
        """
        if self.uses_rope:
            super().validate_rope()

    @property
    def uses_rope(self) -> bool:
        """Whether any layer rotates its queries and keys."""
        may_rotate = self.linear_use_rope or set(self.layer_types) != {LINEAR}
        return may_rotate and self.rope_parameters.get("rope_theta") is not None

    @property
    def layers_block_type(self) -> list[str]:
        """What kind of cache each layer has, by vLLM's names."""
        return [LINEAR if layer_type == LINEAR else "attention" for layer_type in self.layer_types]
