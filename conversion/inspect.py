"""What a checkpoint is, told from its config and the headers of its files; no weight is read or downloaded."""

import math
import os
from pathlib import Path

from huggingface_hub import get_safetensors_metadata, list_repo_files

from modeling_deltanet import DeltaNetConfig

from .checkpoint import Checkpoint, fetch_config, has_tokenizer, reads_config
from .files import hub_errors, local_folder
from .fla import MODEL_TYPES, config_from_fla
from .llama import TEACHERS, config_from_llama


BYTES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U8": 1, "BOOL": 1,
}  # fmt: skip
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def inspect_checkpoint(source: str | Path, revision: str | None = None) -> dict:
    """Architecture, layer pattern, sizes, parameters and memory of a local folder or a repository on the Hub.

    For fla's DeltaNet and for Llama-like models, the fields are those of the DeltaNet that it would convert to, with
    every softmax layer kept.

    Returns a dict that JSON can hold. Memory is for one sequence while generating: `state_bytes` whatever its length,
    `kv_bytes_per_token` for each token that full attention has seen (sliding layers stop at their window, and their
    whole window counts as state). `tokenizer` says whether the folder has one.

    Raises:
        ValueError: no checkpoint, an adapter, or of a model type that nothing here converts.
    """
    folder = local_folder(source, revision)
    if folder is not None:
        checkpoint = Checkpoint(folder)
        raw, names, files = checkpoint.config, checkpoint.tensors, os.listdir(folder)
        tensors = [(info.dtype, info.shape) for info in checkpoint.tensors.values()]
    else:
        raw = fetch_config(source, revision)
        with hub_errors(source):
            weights = get_safetensors_metadata(str(source), revision=revision).files_metadata.values()
            files = list_repo_files(str(source), revision=revision)
        names = {name for file in weights for name in file.tensors}
        tensors = [(tensor.dtype, tuple(tensor.shape)) for file in weights for tensor in file.tensors.values()]
    config = _our_config(raw, names)

    parameters: dict[str, int] = {}
    for dtype, shape in tensors:
        parameters[dtype] = parameters.get(dtype, 0) + math.prod(shape)
    architectures = raw.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ValueError(f"config.json has architectures: {architectures!r}; wanted a list of names")
    if unknown := sorted(parameters.keys() - BYTES.keys()):
        raise ValueError(f"{source} holds tensors of {', '.join(unknown)}; known are {', '.join(BYTES)}")
    if not parameters:
        raise ValueError(f"{source} holds no tensor")
    element = BYTES[max(parameters, key=parameters.get)]
    counts = {t: config.layer_types.count(t) for t in dict.fromkeys(config.layer_types)}
    return {
        "model_type": raw["model_type"],
        "architectures": architectures,
        "layers": counts,
        "layer_types": config.layer_types,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "linear_heads": None if "linear_attention" not in counts else {
            "key_heads": config.linear_num_key_heads,
            "value_heads": config.linear_num_value_heads,
            "key_dim": config.linear_key_head_dim,
            "value_dim": config.linear_value_head_dim,
            "delta_rule": config.linear_use_delta_rule,
            "decay": config.linear_use_decay,
        },
        "softmax_heads": None if set(counts) == {"linear_attention"} else {
            "heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "sliding_window": config.sliding_window,
        },
        "parameters": sum(parameters.values()),
        "parameters_by_dtype": {DTYPE_NAMES.get(dtype, dtype): n for dtype, n in parameters.items()},
        "tokenizer": has_tokenizer(files),
        "weight_bytes": sum(BYTES[dtype] * n for dtype, n in parameters.items()),
        **_memory(config, counts, element),
    }  # fmt: skip


def _our_config(raw: dict, tensor_names) -> DeltaNetConfig:
    model_type = raw.get("model_type")
    if model_type == DeltaNetConfig.model_type:
        with reads_config():
            return DeltaNetConfig.from_dict(raw)
    if model_type in MODEL_TYPES:
        return config_from_fla(raw, tensor_names)
    if model_type in TEACHERS:
        return config_from_llama(raw, keep="all")
    known = ", ".join((DeltaNetConfig.model_type, *MODEL_TYPES, *TEACHERS))
    raise ValueError(f"model_type must be one of {known}, got {model_type!r}")


def _memory(config: DeltaNetConfig, counts: dict[str, int], element: int) -> dict[str, int]:
    """Bytes of one sequence's cache: the fp32 state and the convolution's inputs, and keys and values."""
    key_dim = config.linear_num_key_heads * config.linear_key_head_dim
    value_dim = config.linear_num_value_heads * config.linear_value_head_dim
    state = 4 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    convolution = element * (2 * key_dim + value_dim) * ((config.linear_conv_kernel_dim or 1) - 1)
    kv = 2 * element * config.num_key_value_heads * config.head_dim
    return {
        "state_bytes": counts.get("linear_attention", 0) * (state + convolution)
        + counts.get("sliding_attention", 0) * kv * ((config.sliding_window or 1) - 1),
        "kv_bytes_per_token": counts.get("full_attention", 0) * kv,
    }
