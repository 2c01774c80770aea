"""What everybody trains with, bf16, on a CPU: the kernels' own branches for it (bf16 scratch, fp16 inside the
inverse).

Triton's interpreter is corrected for that (`interpreter_bf16.py`). fp16 goes through fp32 scratch. The Gluon kernels
cannot be interpreted: the GPU tests run them.
"""

import pytest
import torch

from tests.ops import interpreter_bf16
from tests.ops import test_recurrent as recurrent
from tests.ops import test_short_conv as conv
from tests.ops._reference import make
from tests.ops.test_chunk_delta_rule import compare


triton = pytest.importorskip("triton")
from deltanet_kernels import plan  # noqa: E402

from tests.ops._plans import change_plans, decide_anew  # noqa: E402


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests run the real thing")
BF16 = torch.bfloat16


@pytest.mark.parametrize("K, V, HV", [(64, 32, 1), (48, 64, 2), (160, 16, 1)])
@pytest.mark.parametrize("stored, deep", [(False, True), (True, False)])
def test_chunked(K, V, HV, stored, deep, monkeypatch):
    """A cast or a factor missing where scratch is bf16 would spoil every user's training, and no fp32 test would see
    it.
    """
    change_plans(monkeypatch, scores=plan.Launch(32, 4, 3) if stored else None, deep=deep)
    compare(*make(1, 100, 1, K, V, HV=HV, dtype=BF16))


@pytest.mark.parametrize("arch", [80, 100])
def test_other_chips(arch, monkeypatch):
    """Blocks of columns, and with them the tiles in scratch, are others there."""
    decide_anew(monkeypatch, arch_of=lambda _: arch)
    compare(*make(1, 70, 1, 32, 48, dtype=BF16))


def test_packed_and_without_norm():
    """Borders inside a chunk, an empty sequence; keys normalised by the caller are rounded, too, hence the caller's
    error.
    """
    compare(*make(1, 130, 1, 32, N=4, dtype=BF16), cu_seqlens=[0, 0, 5, 68, 130])
    compare(*make(2, 65, 1, 32, keys="unit", state=False, dtype=BF16), l2norm=False)


@pytest.mark.parametrize("T", [512, 450])
def test_segments(T, monkeypatch):
    """A segment's N and Phi are fp32, what comes from them bf16 again."""
    decide_anew(monkeypatch, count_segments=lambda *_: 4, cuts_backward=lambda *_: True)
    compare(*make(1, T, 1, 32, 16, dtype=BF16))


def test_fp16():
    compare(*make(1, 70, 1, 32, HV=2, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_token_by_token(dtype):
    """Packed and grouped, which the fp32 tests alone had."""
    x = recurrent.make_leaves(1, 11, 1, 32, 16, HV=2, dtype=dtype, N=4)
    recurrent.check(x, recurrent.TOLERANCE[dtype], norm=True, cu_seqlens=[0, 3, 3, 4, 11])


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.usefixtures("short_segments")
def test_short_convolution(dtype):
    tensors = conv.make_convolution(1, 35, (20, 16), 4, dtype, N=4, state=True)
    conv.check(*tensors, conv.TOLERANCE[dtype], cu_seqlens=[0, 1, 20, 20, 35])


def test_the_interpreter_rounds_as_torch_does():
    """Were the corrected interpreter wrong, so would be what is measured with it."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 4096)
    x[:3] = torch.tensor([float("nan"), float("inf"), 1 + 2.0**-8])
    bits = interpreter_bf16.encode(x.numpy())
    got = torch.from_numpy(bits.view("int16")).view(BF16)
    assert torch.equal(got[1:], x.to(BF16)[1:]) and got[0].isnan()
