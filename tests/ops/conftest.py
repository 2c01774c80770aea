import pytest
import torch


if not torch.cuda.is_available():
    try:
        from tests.ops import interpreter_bf16
    except ImportError:  # no triton, no kernels: their tests skip themselves
        pass
    else:
        interpreter_bf16.install()


@pytest.fixture(autouse=True)
def nothing_remembered():
    """A plan that one test forces upon a signature would be played in the next."""
    try:
        from deltanet_kernels import _replay
    except ImportError:  # no triton, no kernels: their tests skip themselves
        yield
        return
    _replay.forget()
    yield
    _replay.forget()  # tests elsewhere run kernels, too
