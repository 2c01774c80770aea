"""Folders that are fit to be published, and a process that speaks to a given Hub."""

import os
import subprocess
import sys
from pathlib import Path

from loopback import TOKEN
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from tiny import VOCAB, tiny_model  # noqa: E402

from deltanet_conversion.card import make_card, write_card  # noqa: E402


REPO = "me/tiny"


def client(script: str, hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python in a process whose Hub is this one: huggingface_hub reads its settings when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder / "hf_home"),
    }
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def write_checkpoint(folder: Path, **overrides) -> Path:
    """A tiny model, saved as any training run saves it: without its code."""
    tiny_model(**overrides).save_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w1").save_pretrained(folder)
    return folder


def add_card(folder: Path, repo_id: str = REPO, **fields) -> Path:
    """A complete card."""
    texts = {"license": "apache-2.0", "summary": "A tiny model.", "limits": "It is random."}
    write_card(make_card(folder, repo_id, **texts | fields), folder / "README.md")
    return folder
