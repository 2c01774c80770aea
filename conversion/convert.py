"""One function for every conversion: it chooses by what the source is."""

import json
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.serialization._base import parse_size_to_int

from .checkpoint import CONFIG, Checkpoint, fetch
from .fla import MODEL_TYPES, convert_from_fla, convert_to_fla
from .inspect import inspect_checkpoint
from .llama import TEACHERS, convert_from_llama
from .verify import logit_difference


# Models whose linear layers are ours and whose other layers are not.
REFUSED = {
    "olmo_hybrid": "its softmax layers have their norms after the attention and the MLP (post_attention_layernorm, "
    "post_feedforward_layernorm) and norm q and k over all heads at once (q_norm, k_norm); ours have them before, and "
    "norm each head",
}


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    to: Literal["deltanet", "fla"] = "deltanet",
    keep: str | None = None,
    linear_use_rope: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: int | str | None = None,
    verify: bool = False,
    revision: str | None = None,
    linear_use_decay: bool = False,
) -> dict:
    """Convert a local folder or a repository on the Hub, by what its `config.json` says it is.

    Args:
        to: `"fla"` for one of our checkpoints in fla's form.
        keep: for a Llama-like source, and required there: which layers keep softmax attention, see `choose_layers`.
        linear_use_rope: for a Llama-like source: whether converted layers keep the rotary embedding.
        linear_use_decay: for a Llama-like source: whether converted layers get a decay, which starts open.
        dtype: what to cast the weights to; by default they stay as they are.
        max_shard_size: bytes, or a size such as `"2GB"`; the source's largest file by default.
        verify: also compare logits, see `logit_difference`. That every written tensor is right is always checked.

    Returns a summary that JSON can hold: source and target type, layers, parameters, and `logits` with `verify`.

    Raises:
        ValueError: what does not fit, see the three functions that this one chooses from, or a model whose layers
        ours are not; nothing is written.
        OSError: the disk is full; nothing is left.
    """
    folder = fetch(source, revision)
    options = {
        "dtype": None if dtype is None else getattr(torch, dtype),
        "max_shard_size": parse_size_to_int(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size,
    }
    model_type = Checkpoint(folder).config.get("model_type")
    if keep is not None and model_type not in TEACHERS:
        raise ValueError(f"keep ({keep!r}) is for {', '.join(TEACHERS)}; {source} is {model_type!r}")
    if linear_use_decay and model_type not in TEACHERS:
        raise ValueError(f"linear_use_decay is for {', '.join(TEACHERS)}; {source} is {model_type!r}")
    if to == "fla":
        convert_to_fla(folder, target, **options)
    elif model_type in MODEL_TYPES:
        convert_from_fla(folder, target, **options)
    elif model_type in TEACHERS:
        if keep is None:
            raise ValueError(f"{source} is {model_type!r}: say by keep which layers keep softmax attention")
        name = Path(source).name if Path(source).is_dir() else str(source)
        convert_from_llama(
            folder, target, keep, linear_use_rope, **options, linear_use_decay=linear_use_decay, teacher_name=name
        )
    else:
        if isinstance(model_type, str) and model_type in REFUSED:
            raise ValueError(f"{source} is {model_type!r}, which cannot be converted: {REFUSED[model_type]}")
        known = ", ".join((*MODEL_TYPES, *TEACHERS))
        raise ValueError(f"{source} is {model_type!r}; what can be converted is {known}")
    summary = inspect_checkpoint(target)
    result = {
        "from": model_type,
        "to": json.loads((Path(target) / CONFIG).read_text())["model_type"],
        "layer_types": summary["layer_types"],
        "parameters": summary["parameters"],
        "tensors_verified": True,
    }
    return result | ({"logits": logit_difference(folder, target)} if verify else {})
