"""The benchmarks call what the package has: a figure wants a quiet machine or a GPU, a name or an argument neither."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from deltanet_conversion import check
from modeling_deltanet.delta_rule import torch_chunk_delta_rule


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


def test_errors_beside_a_peer_are_of_the_same_inputs(bench):
    """`gated_errors.py` would blame a kernel for another draw's numbers."""
    case = check.Case(16, 16, "bfloat16", "few", "forgetful")
    functions = dict.fromkeys(("ours", "fla"), torch_chunk_delta_rule)
    found = bench("gated_errors").compare(functions, case, 2, torch.device("cpu"))
    assert {"output", "dbeta", "dg"} < found["ours"].keys() and 0 < found["ours"]["dbeta"] < 1e-2
    assert {*found["ratio"].values(), *found["largest"].values()} == {1.0}


def test_both_ways_to_a_pool_agree(bench):
    """`bench_pools.py` would compare times of different work."""
    pools = bench("bench_pools")
    places = pools.make_places(2, "cpu")
    for layout in ("rows", "columns"):
        for T, ways in ((1, pools.decode_ways), (9, pools.prefill_ways)):

            def make(layout=layout, T=T, ways=ways):
                pool = pools.make_pool((4, 1, 16, 16), layout, torch.float32, "cpu")
                return pool, ways(pool, places, pools.make_inputs(2, T, 1, 16, layout == "rows", "cpu"))

            assert pools.difference(make) == 0
    for T in (1, 9):

        def make_conv(T=T):
            pool = pools.make_pool((4, 16, 3), "columns", torch.bfloat16, "cpu")
            return pool, pools.conv_ways(pool, places, torch.randn(2, T, 16).bfloat16(), torch.randn(16, 4).bfloat16())

        assert pools.difference(make_conv) == 0


@pytest.fixture
def bench_cpu(bench, monkeypatch, tmp_path):
    """`bench_cpu.py` at a size of milliseconds, as a function of its results file."""
    bench_cpu = bench("bench_cpu")
    monkeypatch.setattr(bench_cpu, "CHUNK_SHAPES", [(1, 64, 1, 16)])
    monkeypatch.setattr(bench_cpu, "RECURRENT_SHAPES", [(1, 64, 1, 16)])
    monkeypatch.setattr(bench_cpu, "DECODE_CONTEXTS", [8, 16])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(bench_cpu.transformers.logging, "set_verbosity_error", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench_cpu.py", "--seconds", "0", "--out", str(tmp_path / "cpu.json")])
    return bench_cpu, tmp_path / "cpu.json"


def test_the_benchmark_of_the_cpu_shows_what_it_does(bench_cpu, capsys, monkeypatch):
    """`make bench` would say nothing for minutes, and its user would end it."""
    module, file = bench_cpu
    shown = []
    monkeypatch.setattr(module, "bench_decode", lambda seconds: shown.append(capsys.readouterr().out) or ())
    monkeypatch.setattr(module, "noise", lambda found: None)
    module.main()
    assert shown[0].startswith("3 rows of 0 s") and shown[0].count("1,64,1,16 ") == 2
    [row] = json.loads(file.read_text())["against_token_by_token"]
    low, high = row["forward_ms_quartiles"]
    assert row["rounds"] == 5 and low <= row["forward_ms"] <= high


def test_figures_of_a_busy_machine_are_not_written(bench_cpu, monkeypatch):
    """A forward pass slower than itself and its backward would stand in the documentation."""
    module, file = bench_cpu
    forward = module.without_gradients
    monkeypatch.setattr(module, "without_gradients", lambda *x: [forward(*x) for _ in range(20)][-1])
    with pytest.raises(SystemExit, match="(?s)measure again.*busy"):
        module.main()
    assert not file.exists()
