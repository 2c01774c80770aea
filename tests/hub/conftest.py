"""A Hub on loopback for each test, and what most tests begin with."""

from pathlib import Path

import pytest
from folders import REPO, add_card, write_checkpoint
from huggingface_hub import constants
from loopback import TOKEN, loopback_hub
from tiny import marks_for_remote_code_undone

from deltanet_conversion.push import prepare


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
    with marks_for_remote_code_undone():  # the fixture of each test begins later than this one
        return prepare(checkpoint, REPO)
