"""flash-linear-attention's DeltaNet and Gated DeltaNet checkpoints (`model_type: delta_net` and `gated_deltanet`) and
ours: a table for each, read in both directions.

What a tensor holds is the same on both sides, so that only names differ, and a round trip is exact to the bit. Two old
forms are read as well: norms inside the mixer and the MLP (`norm_first`), and an MLP whose gate and up projection are
one tensor (before February 2025). The form that fla 0.6.0 reads is the one that is written.
"""

import logging
import math
from pathlib import Path

import torch
from transformers.configuration_utils import PreTrainedConfig

from modeling_deltanet import DeltaNetConfig

from .checkpoint import Checkpoint, Output, convert, expected_tensors, reads_config, unread_head


logger = logging.getLogger(__name__)

# Parts of a tensor's name, ours and fla's. Whether `attn` is a linear or a softmax layer, the config says.
NAMES = (
    (".embed_tokens.", ".embeddings."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".mlp_norm."),
    (".linear_attn.", ".attn."),
    (".self_attn.", ".attn."),
)
# The same in checkpoints with norms inside (`norm_first: true`), fla's name of today first.
OLD_NAMES = ((".attn_norm.", ".attn.norm."), (".mlp_norm.", ".mlp.norm."))

DELTA_NET, GATED = MODEL_TYPES = "delta_net", "gated_deltanet"
ARCHITECTURES = {DELTA_NET: "DeltaNetForCausalLM", GATED: "GatedDeltaNetForCausalLM"}

# Config fields, ours and fla's, that hold the same value; fla's default stands for a field that a config.json lacks.
SHARED_FIELDS = (
    ("vocab_size", "vocab_size", 32000),
    ("hidden_size", "hidden_size", 2048),
    ("linear_allow_neg_eigval", "allow_neg_eigval", False),
    ("max_position_embeddings", "max_position_embeddings", 2048),
    ("rms_norm_eps", "norm_eps", 1e-6),
    ("initializer_range", "initializer_range", 0.02),
    ("use_cache", "use_cache", True),
    ("tie_word_embeddings", "tie_word_embeddings", False),
    ("pad_token_id", "pad_token_id", None),
    ("bos_token_id", "bos_token_id", 1),
    ("eos_token_id", "eos_token_id", 2),
)
FIELDS = {
    DELTA_NET: SHARED_FIELDS + (
        ("num_hidden_layers", "num_hidden_layers", 24),
        ("linear_num_key_heads", "num_heads", 16),
        ("linear_qk_activation", "qk_activation", "silu"),
        ("linear_qk_norm", "qk_norm", "l2"),
        ("linear_use_beta", "use_beta", True),
        ("linear_use_output_gate", "use_gate", False),
    ),
    GATED: SHARED_FIELDS + (
        ("num_hidden_layers", "num_hidden_layers", 21),
        ("linear_num_key_heads", "num_heads", 6),
        ("linear_key_head_dim", "head_dim", 256),
        ("linear_use_output_gate", "use_gate", True),
    ),
}  # fmt: skip
# Fields that choose among models which we do not have all of: the values that are ours, fla's default first.
SHARED_FIXED = {"hidden_act": ("swish",), "attnres_block_size": (None,), "conv_bias": (False,)}
FIXED = {
    DELTA_NET: SHARED_FIXED | {
        "elementwise_affine": (True,),
        "share_conv_kernel": (False,),
        "use_elu": (False,),
        "use_output_norm": (True,),
    },
    GATED: SHARED_FIXED | {"output_gate_activation": ("swish", "silu")},
}  # fmt: skip
# Fields that are read below, or that say how fla computes and not what.
SHARED_OTHERS = {
    "attn", "attn_mode", "conv_size", "expand_v", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm",
    "fuse_swiglu", "hidden_ratio", "intermediate_size", "norm_first", "use_l2warp", "use_short_conv",
}  # fmt: skip
OTHER_FIELDS = {DELTA_NET: SHARED_OTHERS | {"expand_k"}, GATED: SHARED_OTHERS | {"num_v_heads"}}
# What Transformers writes into any config.json, today's and older ones.
TRANSFORMERS_FIELDS = PreTrainedConfig().to_dict().keys() | {"auto_map", "torch_dtype", "use_bfloat16"}
ATTN_FIELDS = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}


def convert_from_fla(
    source: str | Path, target: str | Path, dtype: torch.dtype | None = None, max_shard_size: int | None = None
) -> DeltaNetConfig:
    """Convert a folder with fla's DeltaNet or Gated DeltaNet into one with ours, in the source's dtypes unless `dtype`
    is given.

    Returns the new configuration.

    Raises:
        ValueError: the source is damaged, incomplete, or computes something that our model does not; nothing is
        written. OSError: the disk is full; nothing is left.
    """
    checkpoint = Checkpoint(source)
    config = config_from_fla(checkpoint.config, checkpoint.tensors)
    expected = expected_tensors(config)
    outputs = []
    for ours, shape in expected.items():
        theirs = _name_in(checkpoint, fla_name(ours))
        gate = theirs.replace(".up_proj.", ".gate_proj.")
        if ".mlp." in ours and gate in checkpoint.tensors and checkpoint.tensors[gate].shape[0] == 2 * shape[0]:
            outputs.append(Output(ours, (gate,), _gate_half if ".gate_proj." in ours else _up_half))
        else:
            outputs.append(Output(ours, (theirs,)))
    convert(checkpoint, outputs, expected, config, target, dtype, max_shard_size, unread_head(config))
    return config


def convert_to_fla(
    source: str | Path, target: str | Path, dtype: torch.dtype | None = None, max_shard_size: int | None = None
) -> dict:
    """Convert a folder with our DeltaNet into one that fla 0.6.0 reads; arguments and errors as in `convert_from_fla`.

    Returns fla's configuration.
    """
    checkpoint = Checkpoint(source)
    if checkpoint.config.get("model_type") != DeltaNetConfig.model_type:
        raise ValueError(f"{source} holds model_type {checkpoint.config.get('model_type')!r}, not 'deltanet'")
    with reads_config():
        config = DeltaNetConfig.from_dict(checkpoint.config)
    theirs = config_to_fla(config)
    expected = expected_tensors(config)
    outputs = [Output(fla_name(name), (name,)) for name in expected]
    shapes = {fla_name(name): shape for name, shape in expected.items()}
    convert(checkpoint, outputs, shapes, theirs, target, dtype, max_shard_size, unread_head(config))
    return theirs


def fla_name(ours: str) -> str:
    """fla's name of one of our tensors."""
    for our_part, their_part in NAMES:
        ours = ours.replace(our_part, their_part)
    return ours


def _name_in(checkpoint: Checkpoint, name: str) -> str:
    """A tensor's name in this checkpoint, whose norms may lie inside."""
    for new, old in OLD_NAMES:
        if name not in checkpoint.tensors and name.replace(new, old) in checkpoint.tensors:
            return name.replace(new, old)
    return name


def _gate_half(gate_and_up: torch.Tensor) -> torch.Tensor:
    return gate_and_up.chunk(2)[0]


def _up_half(gate_and_up: torch.Tensor) -> torch.Tensor:
    return gate_and_up.chunk(2)[1]


def config_from_fla(theirs: dict, tensor_names=()) -> DeltaNetConfig:
    """Our configuration for a `config.json` of fla's.

    `tensor_names` tell of q/k norms in the softmax layers, which fla's config does not mention.

    Raises:
        ValueError: a field or a combination that our model does not have, with its value.
    """
    model_type = theirs.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be {' or '.join(MODEL_TYPES)}, fla's DeltaNets, got {model_type!r}")
    fixed = FIXED[model_type]
    known = {name for _, name, _ in FIELDS[model_type]} | fixed.keys() | OTHER_FIELDS[model_type] | TRANSFORMERS_FIELDS
    for name, value in theirs.items():
        if name not in known and not name.startswith("_"):
            raise ValueError(
                f"config.json has a field {name!r} ({value!r}) that {model_type} of fla 0.6.0 does not have either; "
                "if the model does not depend on it, remove it"
            )
        if name in fixed and value not in fixed[name]:
            wanted = " or ".join(map(repr, fixed[name]))
            raise ValueError(f"config.json has {name}: {value!r}; only {wanted} can be converted")

    _check_numbers(theirs)
    fields = {ours: theirs.get(name, default) for ours, name, default in FIELDS[model_type]}
    hidden_size, heads = fields["hidden_size"], fields["linear_num_key_heads"]
    if model_type == GATED:
        fields["linear_use_decay"] = True
        fields["linear_num_value_heads"] = theirs.get("num_v_heads")
        fields["linear_value_head_dim"] = int(
            fields["linear_key_head_dim"] * theirs.get("expand_v", 2.0)
        )  # as fla does
    else:
        fields["linear_key_head_dim"] = round(hidden_size * theirs.get("expand_k", 1.0)) // heads
        fields["linear_value_head_dim"] = round(hidden_size * theirs.get("expand_v", 1.0)) // heads
    fields["linear_conv_kernel_dim"] = theirs.get("conv_size", 4) if theirs.get("use_short_conv", True) else None
    fields["intermediate_size"] = theirs.get("intermediate_size")
    if fields["intermediate_size"] is None:
        ratio = theirs.get("hidden_ratio") or 4
        fields["intermediate_size"] = 256 * math.ceil(int(hidden_size * ratio * 2 / 3) / 256)
    # Without softmax layers, their fields mean nothing, but must fit together.
    fields |= {"num_attention_heads": heads, "head_dim": fields["linear_key_head_dim"]}
    fields |= _softmax_fields(theirs.get("attn"), fields["num_hidden_layers"])
    fields["use_qk_norm"] = any(name.endswith(".attn.q_norm.weight") for name in tensor_names)
    if fields["use_qk_norm"] and fields["rms_norm_eps"] != 1e-5:
        logger.warning(
            "the softmax layers' q and k norms have fla's epsilon of 1e-5 there and norm_eps (%s) here",
            fields["rms_norm_eps"],
        )
    with reads_config():
        return DeltaNetConfig(architectures=["DeltaNetForCausalLM"], **fields)


# What the other fields are computed from. DeltaNetConfig looks at those that are only handed on.
WHOLE_NUMBERS = {"hidden_size": 2**31, "num_hidden_layers": 1_000_000, "num_heads": 2**31, "head_dim": 2**31}
RATIOS = ("expand_k", "expand_v", "hidden_ratio")


def _check_numbers(theirs: dict) -> None:
    for name, limit in WHOLE_NUMBERS.items():
        value = theirs.get(name, 1)
        if type(value) is not int or not 0 < value < limit:
            raise ValueError(f"config.json has {name}: {value!r}; wanted a number from 1 to {limit - 1}")
    for name in RATIOS:
        value = theirs.get(name, 1)
        if not (name == "hidden_ratio" and value is None) and (
            type(value) not in (int, float) or not 0 < value < 2**31
        ):
            raise ValueError(f"config.json has {name}: {value!r}; wanted a number greater than 0")


def _check_attn(spec) -> None:
    """A specification of softmax layers, with the fields that are needed, of the right type."""
    if not isinstance(spec, dict):
        raise ValueError(f"attn must describe softmax layers by {', '.join(sorted(ATTN_FIELDS))}, got {spec!r}")
    if unknown := sorted(spec.keys() - ATTN_FIELDS):
        raise ValueError(f"attn has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(ATTN_FIELDS))}")
    layers, theta = spec.get("layers"), spec.get("rope_theta")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"attn has layers: {layers!r}; wanted a list of numbers")
    if type(spec.get("num_heads")) is not int:
        raise ValueError(f"attn has num_heads: {spec.get('num_heads')!r}; wanted a number")
    if theta is not None and (type(theta) not in (int, float) or not abs(theta) < 1e300):
        raise ValueError(f"attn has rope_theta: {theta!r}; wanted a number")


def _softmax_fields(attn: dict | list | None, num_hidden_layers: int) -> dict:
    """Our fields for fla's `attn`: None, or one specification of softmax layers, or a list of them."""
    specs = [] if attn is None else attn if isinstance(attn, list) else [attn]
    layer_types = ["linear_attention"] * num_hidden_layers
    shared: dict = {}
    for spec in specs:
        _check_attn(spec)
        window = spec.get("window_size")
        for layer in spec["layers"]:
            if not 0 <= layer < num_hidden_layers:
                raise ValueError(f"attn names layer {layer}, but there are {num_hidden_layers}")
            layer_types[layer] = "full_attention" if window is None else "sliding_attention"
        fields = {
            "num_attention_heads": spec["num_heads"],
            "num_key_value_heads": spec.get("num_kv_heads") or spec["num_heads"],
            "head_dim": None,
            "attention_bias": spec.get("qkv_bias", False),
            "rope_parameters": {"rope_theta": float(spec.get("rope_theta") or 10000.0), "rope_type": "default"},
        } | ({} if window is None else {"sliding_window": window})
        for name, value in fields.items():
            if shared.setdefault(name, value) != value:
                raise ValueError(
                    f"attn gives softmax layers different {name}: {shared[name]} and {value}; ours share it"
                )
    return {"layer_types": layer_types, **shared}


def config_to_fla(config: DeltaNetConfig) -> dict:
    """The `config.json` with which fla 0.6.0 builds the same model.

    Raises:
        ValueError: fla's DeltaNet has no such model; the message names the fields.
    """
    model_type = GATED if config.linear_use_decay else DELTA_NET
    theirs = {name: getattr(config, ours) for ours, name, _ in FIELDS[model_type]} | {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "hidden_act": "swish",
        "intermediate_size": config.intermediate_size,
        **_expansions(config),
        "use_short_conv": config.linear_conv_kernel_dim is not None,
        "conv_size": config.linear_conv_kernel_dim or 4,
        "attn": _attn(config),
    }
    # Whatever fla cannot say, our own reading of it gets wrong.
    back = config_from_fla(theirs)
    lost = [name for name in DeltaNetConfig.__annotations__ if _meaning(config, name) != _meaning(back, name)]
    if lost:
        fields = ", ".join(f"{name} = {getattr(config, name)!r}" for name in lost)
        raise ValueError(f"fla's {'Gated ' * config.linear_use_decay}DeltaNet has no model with {fields}")
    return theirs


def _expansions(config: DeltaNetConfig) -> dict[str, float]:
    """Head sizes as fla has them: of all heads by the hidden size or, gated, of a value head by the key head's."""
    K, V = config.linear_key_head_dim, config.linear_value_head_dim
    if not config.linear_use_decay:
        heads, hidden_size = config.linear_num_key_heads, config.hidden_size
        return {"expand_k": heads * K / hidden_size, "expand_v": heads * V / hidden_size}
    expand_v = V / K
    if int(K * expand_v) != V:  # fla cuts off what follows the point
        expand_v = math.nextafter(expand_v, math.inf)
    return {"num_v_heads": config.linear_num_value_heads, "expand_v": expand_v}


def _attn(config: DeltaNetConfig) -> list[dict] | dict | None:
    """fla's `attn`: one specification for each type of softmax layer that there is."""
    specs = []
    for layer_type, window in (("full_attention", None), ("sliding_attention", config.sliding_window)):
        layers = [i for i, name in enumerate(config.layer_types) if name == layer_type]
        if layers:
            specs.append(
                {
                    "layers": layers,
                    "num_heads": config.num_attention_heads,
                    "num_kv_heads": config.num_key_value_heads,
                    "qkv_bias": config.attention_bias,
                    "window_size": window,
                    "rope_theta": config.rope_parameters.get("rope_theta"),
                }
            )
    return specs if len(specs) > 1 else specs[0] if specs else None


def _meaning(config: DeltaNetConfig, name: str):
    """A field's value as far as the model depends on it."""
    softmax_only = ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "attention_bias",
                    "attention_out_bias", "use_qk_norm")  # fmt: skip
    if name in softmax_only and set(config.layer_types) == {"linear_attention"}:
        return None
    if name == "hidden_act":
        return {"swish": "silu"}.get(config.hidden_act, config.hidden_act)
    return getattr(config, name)
