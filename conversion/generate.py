"""Text from a checkpoint and a prompt."""

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TextStreamer, set_seed

import modeling_deltanet  # noqa: F401  makes `model_type: deltanet` known to the Auto classes

from .checkpoint import ADAPTER_CONFIG, config_file, fetch_config, has_tokenizer, load_tokenizer
from .files import check_named_files, read_json
from .fla import MODEL_TYPES


def generate_text(
    source: str | Path,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    revision: str | None = None,
    stream: bool = False,
) -> dict:
    """Generate from a local folder or a repository on the Hub, on the GPU if there is one. An adapter is loaded with
    its base.

    Args:
        temperature: 0 for the likeliest token each time.
        top_k: 0 for sampling among all tokens.
        stream: print the text as it comes.

    Returns `prompt`, `text` (what was added) and `tokens` (how many those are).

    Raises:
        ValueError: the prompt has no token, files name others outside their folder, an adapter's base or the tokenizer
            is missing, or it is one of fla's checkpoints.
    """
    if Path(source).is_dir():
        check_named_files(Path(source))
    tokenizer = load_tokenizer(*_tokenizer_of(source, revision))
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs.input_ids.shape[1]
    if length == 0:
        raise ValueError(f"the prompt {prompt!r} has no token to go on from")
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer) if stream else None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )[0, length:]
    return {"prompt": prompt, "text": tokenizer.decode(ids, skip_special_tokens=True), "tokens": len(ids)}


def _tokenizer_of(source: str | Path, revision: str | None) -> tuple[str | Path, str | None]:
    """Where the tokenizer of a source is, which can be loaded: an adapter's with it or with its base."""
    file = config_file(source, revision)
    if file.name != ADAPTER_CONFIG:
        if read_json(file).get("model_type") in MODEL_TYPES:
            raise ValueError(f"{source} is in fla's form: convert it first (deltanet convert)")
        return source, revision
    base = str(read_json(file).get("base_model_name_or_path"))
    try:
        fetch_config(base)
    except ValueError as error:
        raise ValueError(f"{source} is an adapter, and its base is missing: {error}") from error
    if Path(base).is_dir():
        check_named_files(Path(base))
    if Path(source).is_dir() and not has_tokenizer(os.listdir(source)):
        return base, None
    return source, revision
