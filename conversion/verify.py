"""The logits of two checkpoints on the same tokens: what a conversion changed, and what it should not have."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from .checkpoint import Checkpoint
from .fla import MODEL_TYPES


TOKENS = 64  # fla computes in fp32 on up to 64 tokens only


def logit_difference(source: str | Path, target: str | Path, seed: int = 0) -> dict:
    """Load two local checkpoints in fp32 and compare their logits on 64 random tokens.

    Returns the largest difference, `max_difference`, and the standard deviation of the source's logits, to compare it
    with. fla's models run on a GPU and with fla installed only: without, the reason is returned as `skipped`.
    """
    source, target = Path(source), Path(target)
    is_fla = any(Checkpoint(folder).config.get("model_type") in MODEL_TYPES for folder in (source, target))
    if is_fla:
        try:
            import fla  # noqa: F401  it registers its models
        except ImportError:
            return {"skipped": "the logits of fla's model need fla installed; every tensor was compared"}
        if not torch.cuda.is_available():
            return {"skipped": "the logits of fla's model need a GPU; every tensor was compared"}
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
    return {"max_difference": (wanted - got).abs().max().item(), "logit_std": wanted.std().item(), "device": device}
