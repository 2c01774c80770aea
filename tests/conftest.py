"""For the whole suite: nothing may be fetched, and without a GPU Triton's kernels run in its interpreter."""

import os

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker, and a process that a test starts: read by torch's OpenMP when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402


if not torch.cuda.is_available():
    # Read when triton is first imported, which transformers may do: so here, and not beside the kernels' tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Of tests that take ten seconds and more.
LONG = {"test_compile_chunk.py", "test_quickstart.py", "test_examples.py", "test_distributed.py", "test_stages.py"}


def pytest_collection_modifyitems(items):
    """Long tests first: at the end, no worker waits for another one's last minute."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture
def short_segments(monkeypatch):
    """In the interpreter, the short convolution's programs walk through 16 and 8 rows, not 32 and 128, whatever the
    length.

    That is twice what they load at once, and has more borders in as many rows.
    """
    if not torch.cuda.is_available():
        from deltanet_kernels import convolution

        monkeypatch.setattr(convolution, "FORWARD_SEGMENT", 16)
        monkeypatch.setattr(convolution, "BACKWARD_SEGMENT", 8)
