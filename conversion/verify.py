"""The logits of two checkpoints on the same tokens: what a conversion changed, and what it should not have."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from .checkpoint import Checkpoint
from .fla import MODEL_TYPES
from .llama import TEACHERS


TOKENS = 64  # fla computes in fp32 on up to 64 tokens only
# Tolerances, times the logits' standard deviation: for the same weights in fp32 (fla's logits and ours are at most
# 9e-6 apart, in benchmarks/results/fla_parity.json), and for weights that were cast to another dtype.
EXACT, CAST = 1e-3, 0.1


def logit_difference(source: str | Path, target: str | Path, seed: int = 0) -> dict:
    """Load two local checkpoints in fp32 and compare their logits on 64 random tokens.

    Returns a `verdict`: "equal" or "different", or why there is none. Then the largest difference, `max_difference`,
    the standard deviation of the source's logits, and the `tolerance` for the former. fla's models run on a GPU and
    with fla installed only, and where layers got new mixers, logits differ until these have learned.
    """
    source, target = Path(source), Path(target)
    configs = [Checkpoint(folder).config for folder in (source, target)]
    if any(config.get("model_type") in MODEL_TYPES for config in configs):
        try:
            import fla  # noqa: F401  it registers its models
        except ImportError:
            return {"verdict": "not compared: fla's model needs fla installed; every tensor was compared"}
        if not torch.cuda.is_available():
            return {"verdict": "not compared: fla's model needs a GPU; every tensor was compared"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = []
    for folder in (source, target):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator).to(device)
        with torch.no_grad():
            logits.append(model(ids, use_cache=False).logits.float().cpu())
        del model
    wanted, got = logits
    difference, size = (wanted - got).abs().max().item(), wanted.std().item()
    dtypes = [config.get("dtype") or config.get("torch_dtype") or "float32" for config in configs]
    tolerance = size * (EXACT if dtypes[0] == dtypes[1] else CAST)
    types = configs[1].get("layer_types") or []
    if configs[0].get("model_type") in TEACHERS and "linear_attention" in types:
        verdict = (
            f"not comparable: the mixers of {types.count('linear_attention')} of {len(types)} layers are new, and "
            "learn in `deltanet align`"
        )
    else:
        verdict = "equal" if difference <= tolerance else "different"
    return {
        "verdict": verdict, "max_difference": difference, "logit_std": size, "tolerance": tolerance, "device": device,
    }  # fmt: skip
