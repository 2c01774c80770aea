"""The models that are compared: one family, told apart by fields of its configuration."""

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM


# Fields beside the defaults, and which of the published hybrids.
MODELS = {
    "transformer": {"layer_types": "full_attention"},
    "additive": {"linear_use_delta_rule": False},
    "2021 form": {"linear_qk_activation": "elu", "linear_qk_norm": "sum", "linear_conv_kernel_dim": None},
    "DeltaNet": {},
    "DeltaNet, no convolution": {"linear_conv_kernel_dim": None},
    "additive, no convolution": {"linear_use_delta_rule": False, "linear_conv_kernel_dim": None},
    "DeltaNet + sliding window": {"layer_types": "sliding"},
    "DeltaNet + global attention": {"layer_types": "global"},
    "DeltaNet, beta to 2": {"linear_allow_neg_eigval": True},
    "DeltaNet, no convolution, beta to 2": {"linear_allow_neg_eigval": True, "linear_conv_kernel_dim": None},
    "DeltaNet with a decay": {"linear_use_decay": True},
    "Gated DeltaNet": {"linear_use_decay": True, "linear_use_output_gate": True},
}


def make_config(name: str, width: int, layers: int, heads: int, vocab_size: int, **fields) -> DeltaNetConfig:
    """`name`'s configuration. All mixers have the same width and number of heads, and so the same parameters, but for
    what a model has besides (convolution, beta, gate).
    """
    own = dict(MODELS[name])
    pattern = own.pop("layer_types", None)
    if pattern == "full_attention":
        own["layer_types"] = ["full_attention"] * layers
    elif pattern is not None:
        own["layer_types"] = DeltaNetConfig.hybrid_layer_types(pattern, layers)
    if pattern != "sliding":
        fields.pop("sliding_window", None)
    return DeltaNetConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "linear_num_key_heads": heads,
            "num_attention_heads": heads,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        | fields
        | own
    )


def make_model(name: str, **sizes) -> DeltaNetForCausalLM:
    return DeltaNetForCausalLM(make_config(name, **sizes))
