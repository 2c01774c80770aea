"""A Hub on loopback for each test, and what most tests begin with."""

from pathlib import Path

import pytest
from folders import REPO, add_card, write_checkpoint
from huggingface_hub import constants
from loopback import TOKEN, loopback_hub

import modeling_deltanet
from deltanet_conversion.push import prepare


AUTO_CLASSES = {
    cls: cls._auto_class for name in modeling_deltanet.__all__
    if hasattr(cls := getattr(modeling_deltanet, name), "_auto_class")
}  # fmt: skip


@pytest.fixture(autouse=True)
def unmarked():
    """Publishing marks the classes for remote code, for the life of the process: other suites must not see it."""
    yield
    for cls, auto_class in AUTO_CLASSES.items():
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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A folder fit to be published. Tests copy it before they change it."""
    return add_card(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="session")
def plan(checkpoint):
    """The same, validated: what tests of `publish` begin with."""
    return prepare(checkpoint, REPO)
