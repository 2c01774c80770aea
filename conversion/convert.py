"""One function for every conversion: it chooses by what the source is."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.serialization._base import parse_size_to_int

from modeling_deltanet import DeltaNetConfig

from .calibrate import Calibration
from .checkpoint import CONFIG, check_new, fetch, fetch_config, new_folder
from .fla import MODEL_TYPES, convert_from_fla, convert_to_fla
from .gguf_source import GGUF, find_gguf, unpacked
from .inspect import inspect_checkpoint
from .llama import TEACHERS, convert_from_llama, is_auto
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
    to: Literal["deltanet", "fla", "transformers"] = "deltanet",
    keep: str | None = None,
    linear_use_rope: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: int | str | None = None,
    verify: bool = False,
    revision: str | None = None,
    linear_use_decay: bool = False,
    calibrate: tuple[str, ...] = (),
    calibration_tokens: int | None = None,
    text_column: str | None = None,
) -> dict:
    """Convert a local folder or a repository on the Hub, by what its `config.json` says it is, or a GGUF file.

    Args:
        source: also a GGUF file of a Llama, Qwen2 or Qwen3, or a folder with one; it is read by Transformers and the
            package `gguf`, and written in float32 unless `dtype` says otherwise.
        to: `"fla"` for one of our checkpoints in fla's form; `"transformers"` for a GGUF file as the folder that
            `align`, `distill` and `evaluate` take for a teacher.
        keep: for a Llama-like source, and required there: which layers keep softmax attention, see `choose_layers`;
            `"auto:25%"` measures on the text of `calibrate` what each layer is worth and keeps the best. What was
            measured lies in `TARGET.scores.json` until the conversion is done, and the same call goes on with it.
        linear_use_rope: for a Llama-like source: whether converted layers keep the rotary embedding.
        linear_use_decay: for a Llama-like source: whether converted layers get a decay, which starts open.
        calibrate: for a Llama-like source: text (see `load_text`; `text_column` of a dataset) that the converted
            layers' output projections are fitted to, by least squares on `calibration_tokens` tokens (8192).
        dtype: what to cast the weights to; by default they stay as they are.
        max_shard_size: bytes, or a size such as `"2GB"`; the source's largest file by default.
        verify: also compare logits, see `logit_difference`. That every written tensor is right is always checked.

    Returns a summary that JSON can hold: source and target type, layers, parameters, and `logits` with `verify`.

    Raises:
        ValueError: what does not fit, see the three functions that this one chooses from, or a model whose layers
        ours are not; nothing is written, and of a repository no weights are downloaded.
        OSError: the disk is full; nothing is left.
    """
    check_new(target)
    file = find_gguf(source)
    if file is not None and revision is not None:
        raise ValueError(f"revision {revision!r} was given, but {source} is a local file")
    gguf = None if file is None else GGUF(file)
    model_type = (fetch_config(source, revision) if gguf is None else gguf.config.to_dict()).get("model_type")
    _check_options(
        source, model_type, to, keep, linear_use_rope, linear_use_decay, calibrate, verify, gguf is not None
    )
    of_text = {"tokens": calibration_tokens, "text_column": text_column}
    of_text = {name: value for name, value in of_text.items() if value is not None}
    if of_text and not calibrate:
        raise ValueError("calibration_tokens and text_column are of the text of calibrate (--calibrate TEXT): give it")
    options = {
        "dtype": None if dtype is None else getattr(torch, dtype),
        "max_shard_size": parse_size_to_int(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size,
    }
    if to == "transformers":
        with new_folder(target) as new:
            gguf.unpack(new, **options)
        return _summary(model_type, target)  # Transformers' own reading: there is nothing to compare it with
    with nullcontext(fetch(source, revision)) if gguf is None else unpacked(gguf, target, options["dtype"]) as folder:
        if to == "fla":
            convert_to_fla(folder, target, **options)
        elif model_type in MODEL_TYPES:
            convert_from_fla(folder, target, **options)
        else:
            name = Path(source).name if Path(source).exists() else str(source)
            scores = Path(f"{target}.scores.json")
            calibration = Calibration(tuple(calibrate), **of_text, work=scores)
            convert_from_llama(
                folder, target, keep, linear_use_rope, **options, linear_use_decay=linear_use_decay,
                teacher_name=name, calibration=calibration if calibrate else None,
            )  # fmt: skip
            if is_auto(keep)[0]:
                scores.unlink(missing_ok=True)
        verified = {"tensors_verified": True} | ({"logits": logit_difference(folder, target)} if verify else {})
        return _summary(model_type, target) | verified


def _summary(model_type: str, target: str | Path) -> dict:
    summary = inspect_checkpoint(target)
    return {
        "from": model_type,
        "to": json.loads((Path(target) / CONFIG).read_text())["model_type"],
        "layer_types": summary["layer_types"],
        "parameters": summary["parameters"],
    }


def _check_options(
    source,
    model_type,
    to: str,
    keep: str | None,
    linear_use_rope: bool,
    linear_use_decay: bool,
    calibrate: tuple[str, ...],
    verify: bool,
    is_gguf: bool,
) -> None:
    """Refuse a model that cannot be converted, and then what does not fit the one that can."""
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ValueError(f"{source} is {model_type!r}, which cannot be converted: {REFUSED[model_type]}")
    known = (DeltaNetConfig.model_type, *MODEL_TYPES, *TEACHERS)
    if model_type not in known:
        raise ValueError(f"{source} is {model_type!r}, which cannot be converted: what can is {', '.join(known)}")
    if to == "fla" and model_type != DeltaNetConfig.model_type:
        raise ValueError(
            f"{source} is {model_type!r}, not {DeltaNetConfig.model_type!r}, and only that is written in fla's form"
        )
    if to == "transformers" and verify:
        raise ValueError("verify (--verify) compares a model with its source: 'transformers' reads a GGUF file itself")
    if to == "transformers" and not is_gguf:
        raise ValueError(f"{source} is no GGUF file, and only that is written for Transformers (--to transformers)")
    if to == "deltanet" and model_type == DeltaNetConfig.model_type:
        raise ValueError(f"{source} is {model_type!r} already: to 'fla' (--to fla) is what it can be converted to")
    is_teacher = model_type in TEACHERS and to != "transformers"
    given = {
        "keep (--keep)": keep is not None,
        "linear_use_rope=False (--no-linear-rope)": not linear_use_rope,
        "linear_use_decay (--linear-decay)": linear_use_decay,
        "calibrate (--calibrate)": bool(calibrate),
    }
    for option, is_given in given.items():
        if is_given and not is_teacher:
            what = "written for Transformers" if to == "transformers" else repr(model_type)
            raise ValueError(f"{option} is for {', '.join(TEACHERS)}; {source} is {what}")
    if is_teacher and keep is None:
        raise ValueError(
            f"{source} is {model_type!r}: keep (--keep) must say which layers keep softmax attention, such as '25%', "
            "'3,7', 'all' or 'none'"
        )
    if is_teacher and is_auto(keep)[0] and not calibrate:
        raise ValueError(
            f"keep (--keep) {keep!r} measures layers on text: calibrate (--calibrate TEXT) must say which"
        )
