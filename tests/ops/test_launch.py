"""The second launch of a kernel, which goes past Triton: on a CPU with a kernel that only notes down what it is told."""

from types import SimpleNamespace

import pytest
import torch


triton = pytest.importorskip("triton")
from deltanet_kernels import _launch, chunk, chunk_delta_rule  # noqa: E402


class Kernel:
    """What `launch` uses of a Triton kernel and of a compiled one."""

    arg_names = ("x", "y", "n", "C", "D")
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.fn, self.compiled, self.told = object(), 0, []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.first(args, constants) if constants else self.told.append((grid, args))

    def first(self, args, constants):
        self.compiled += 1
        return self

    def run(self, *args):
        self.told.append(args)


@pytest.fixture
def kernel(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: "stream"))
    monkeypatch.setattr(_launch, "driver", driver)
    monkeypatch.setattr(_launch, "_compiled", {})
    return Kernel()


def launch(kernel, x, y, n=3, **constants):
    _launch.launch(kernel, (5, 6), (x, y), (n,), {"D": 8, "C": 7, **constants}, {"num_warps": 4})


def test_other_tensors_of_the_same_kind(kernel):
    """A call would write to the tensors of the call before, or with its constants in the wrong order."""
    a, b = torch.zeros(8), torch.zeros(8)
    launch(kernel, a, None)
    launch(kernel, b, None)
    assert kernel.compiled == 1
    expected = (5, 6, 1, "stream", "function", "metadata", None, None, None, b.data_ptr(), None, 3, 7, 8)
    assert kernel.told == [expected]


def test_whatever_triton_specialises_on_compiles_again(kernel):
    """Code made for aligned addresses, or for other types and sizes, would run on what it cannot read."""
    a = torch.zeros(9)
    for x, y, n, C in (
        (a, a, 3, 7), (a, None, 3, 7), (a[1:], a, 3, 7), (a, a[1:], 3, 7), (a.double(), a, 3, 7), (a, a, 4, 7),
        (a, a, 3, 9),
    ):  # fmt: skip
        before = kernel.compiled
        launch(kernel, x, y, n, C=C)
        assert kernel.compiled == before + 1
    launch(kernel, a, a)
    assert kernel.compiled == 7 and len(kernel.told) == 1


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_with_a_hook_triton_launches(kernel, monkeypatch, name):
    """A profiler would not see the kernels, or see them without their names."""
    a = torch.zeros(8)
    launch(kernel, a, a)
    monkeypatch.setattr(triton.knobs.runtime, name, lambda metadata: None)
    launch(kernel, a, a)
    assert kernel.told == [((5, 6, 1), (a.data_ptr(), a.data_ptr(), 3, 7, 8))]


@pytest.mark.gpu
def test_gpu_hooks_see_every_launch():
    """Triton's profiler hangs itself into both; and a hook that is gone must not be called."""
    q, k, v = torch.randn(3, 1, 128, 2, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    beta = torch.rand(1, 128, 2, device="cuda").bfloat16()
    names, hook = [], triton.knobs.runtime.launch_enter_hook
    plan, _ = chunk._plan(q, v, None)

    def see(metadata):
        names.append(metadata.get()["name"])

    results = [chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0]]
    for add in (True, False):
        (hook.add if add else hook.remove)(see)
        results.append(chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0])
        assert names == ["prepare_kernel", *["scores_kernel"] * plan.stored, "scan_kernel"]
    assert all(torch.equal(results[0], x) for x in results[1:])
