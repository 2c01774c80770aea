"""A checkpoint for a runtime other than Transformers: its weights as they are, and beside them what runs them."""

import math
import shutil
from pathlib import Path
from typing import Literal

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM
from modeling_deltanet.rotary_deltanet import DeltaNetRotaryEmbedding

from .checkpoint import (
    Checkpoint,
    Output,
    check_new,
    check_outputs,
    compare,
    expected_tensors,
    fetch,
    fetch_config,
    load_tokenizer,
    new_folder,
    reads_config,
    tokenizer_files,
    unread_head,
    write_checkpoint,
)
from .fla import MODEL_TYPES
from .llama import TEACHERS


MODEL_FILE = "deltanet_mlx.py"  # lies beside this file, and travels
# What the model file knows, which cannot be imported where there is no MLX.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
DTYPES = ("F32", "BF16", "F16")
GROWING_ROTATIONS = ("dynamic", "longrope")  # other frequencies for longer texts; the model file has one set


def export_checkpoint(
    source: str | Path, target: str | Path, to: Literal["mlx"] = "mlx", revision: str | None = None
) -> dict:
    """Write one of our checkpoints, a local folder or a repository on the Hub, as a folder that mlx-lm runs.

    The folder holds the weights, the tokenizer, a configuration in which every field is written out, and the model in
    MLX (`deltanet_mlx.py`), which mlx-lm imports if it is told `trust_remote_code`. One shard is in memory at a time.

    Returns a summary that JSON can hold: runtime, model file, layers, parameters.

    Raises:
        ValueError: what is no language model of this family, or what MLX cannot run; the message names the field.
            Nothing is written.
        OSError: the disk is full; nothing is left.
    """
    if to != "mlx":
        raise ValueError(f"to must be 'mlx', got {to!r}")
    check_new(target)
    _check_is_ours(source, fetch_config(source, revision))
    folder = fetch(source, revision)
    checkpoint = Checkpoint(folder)
    with reads_config():
        config = DeltaNetConfig.from_dict(checkpoint.config)
    _check_mlx_runs(source, config, checkpoint)
    load_tokenizer(folder)  # mlx-lm loads no model without one
    tokenizer_files(folder)  # what may not travel is refused before anything is written
    expected = expected_tensors(config)
    outputs = [Output(name, (name,)) for name in expected]
    check_outputs(checkpoint, outputs, expected, unread_head(config))
    with new_folder(target) as unfinished:
        write_checkpoint(unfinished, checkpoint, outputs, _mlx_config(config))
        compare(checkpoint, outputs, Checkpoint(unfinished))
        shutil.copyfile(Path(__file__).with_name(MODEL_FILE), unfinished / MODEL_FILE)
    return {
        "to": to,
        "model_file": MODEL_FILE,
        "layer_types": config.layer_types,
        "parameters": sum(math.prod(shape) for shape in expected.values()),
    }


def _check_is_ours(source: str | Path, fields: dict) -> None:
    """Refuse what is no language model of this family, before its weights are downloaded."""
    model_type, architectures = fields.get("model_type"), fields.get("architectures")
    if model_type != DeltaNetConfig.model_type:
        hint = " (`deltanet convert` makes one of it)" if model_type in (*MODEL_TYPES, *TEACHERS) else ""
        raise ValueError(f"{source} is {model_type!r}, and what is exported is {DeltaNetConfig.model_type!r}{hint}")
    if architectures not in (None, [DeltaNetForCausalLM.__name__]):
        raise ValueError(f"{source} has architectures: {architectures!r}; wanted [{DeltaNetForCausalLM.__name__!r}]")


def _check_mlx_runs(source: str | Path, config: DeltaNetConfig, checkpoint: Checkpoint) -> None:
    """Refuse, by name, what the model file does not have."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{source} has a quantization_config, which MLX does not read: export the model that was quantised, and "
            "quantise the export by `mlx_lm.convert -q`"
        )
    if not config.linear_use_delta_rule:
        raise ValueError(f"{source} has linear_use_delta_rule = False, a baseline that the model file for MLX lacks")
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)} for MLX, got {config.hidden_act!r}")
    if config.uses_rope and config.rope_parameters["rope_type"] in GROWING_ROTATIONS:
        raise ValueError(
            f"rope_type must be one whose frequencies do not depend on a text's length for MLX, got "
            f"{config.rope_parameters['rope_type']!r}"
        )
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be of {', '.join(DTYPES)} for MLX, got {tensor.dtype}")


def _mlx_config(config: DeltaNetConfig) -> dict:
    """Every field written out, for a reader without defaults, and what the rotary embedding computes from them."""
    frequencies, factor = None, 1.0
    if config.uses_rope:
        rotation = DeltaNetRotaryEmbedding(config)
        frequencies, factor = rotation.inv_freq.tolist(), rotation.attention_scaling
    fields = config.to_dict() | {
        "architectures": [DeltaNetForCausalLM.__name__],
        "linear_use_decay": config.linear_use_decay,  # left out of a dict where it is False
        "model_file": MODEL_FILE,
        "rope_frequencies": frequencies,
        "rope_scaling_factor": factor,
    }
    # Where it names remote code for Transformers, which does not travel with the export.
    fields.pop("auto_map", None)
    return fields
