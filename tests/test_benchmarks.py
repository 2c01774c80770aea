"""The benchmarks of the kernels call what the package has: a figure needs a GPU, a name or an argument does not."""

import importlib
from pathlib import Path

import pytest
import torch


pytest.importorskip("deltanet_kernels")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make bench-gpu` runs the real thing")


@pytest.fixture
def bench(monkeypatch):
    """A module of benchmarks/ by name, in Triton's interpreter, which is corrected for bf16."""
    from tests.ops import interpreter_bf16

    interpreter_bf16.install()
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module


def test_each_kernel_runs_by_itself(bench):
    """`bench_kernels.py` would end at its first figure, on a machine that is paid for by the hour."""
    found = bench("bench_kernels").measure((1, 70, 1, 32), lambda f: f() or 0.0, True, device="cpu")
    assert {"scan, inference", "scan, training", "reverse", "grads"} < set(found)


@pytest.mark.parametrize("shape, gate", [((1, 70, 1, 32), None), ((1, 70, 1, 2, 32, 16), "forgetful")])
def test_errors_are_those_of_the_rule(bench, shape, gate):
    """`bench_ops.py --errors` would compare the rule with something else than the rule."""
    bench_ops = bench("bench_ops")
    functions = bench_ops.candidates(["ours"], gate is not None)
    found = bench_ops.errors(functions, shape, gate, device="cpu")["ours"]
    assert found.keys() == {"o", "dq", "dk", "dv", "dbeta"} | ({"dg"} if gate else set())
    assert max(found.values()) < 1.5e-2, found
