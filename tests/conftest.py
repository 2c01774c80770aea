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


def pytest_collection_modifyitems(items):
    """The longest tests first, which would be last: at the end no worker waits for another one's last minute."""
    items.sort(key=lambda item: item.path.name not in ("test_quickstart.py", "test_examples.py"))


@pytest.fixture(autouse=True)
def unmarked():
    """No test sees that another one, or what a whole module shares, has marked the classes for remote code, which
    holds for the life of the process.
    """
    _unmark()
    yield
    _unmark()


def _unmark():
    import modeling_deltanet

    for cls in (getattr(modeling_deltanet, name) for name in modeling_deltanet.__all__):
        if hasattr(cls, "_auto_class"):
            cls._auto_class = None


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
