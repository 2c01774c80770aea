"""A Hub on loopback for each test, and folders that are fit to be published."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback import TOKEN, loopback_hub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from tiny import VOCAB, tiny_model  # noqa: E402

import modeling_deltanet  # noqa: E402
from deltanet_conversion.card import make_card, write_card  # noqa: E402
from deltanet_conversion.push import prepare  # noqa: E402
from modeling_deltanet import DeltaNetConfig  # noqa: E402


REPO = "me/tiny"
MODELS = [name for name in modeling_deltanet.__all__ if name.endswith(("Model", "LM", "Classification"))]


@pytest.fixture(autouse=True)
def unmarked():
    """Publishing marks the classes for remote code, for the life of the process: other suites must not see it."""
    classes = [DeltaNetConfig, *(getattr(modeling_deltanet, name) for name in MODELS)]
    before = [cls._auto_class for cls in classes]
    yield
    for cls, auto_class in zip(classes, before):
        cls._auto_class = auto_class


@pytest.fixture
def hub(monkeypatch):
    """A Hub that listens on loopback, to which huggingface_hub in this process speaks."""
    with loopback_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A folder fit to be published. Tests copy it before they change it."""
    return add_card(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="session")
def plan(checkpoint):
    """The same, validated: what tests of `publish` begin with."""
    return prepare(checkpoint, REPO)
