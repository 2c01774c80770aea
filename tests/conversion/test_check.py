"""`deltanet check`: what it says of a machine must be so, of a wrong one above all."""

import contextlib
import json
from importlib.metadata import version

import pytest
import torch
from test_cli import deltanet  # noqa: F401  a fixture

from deltanet_conversion import check, check_run, cli_check
from modeling_deltanet.delta_rule import torch_chunk_delta_rule


CPU = torch.device("cpu")


def quickly(monkeypatch):
    """Two cases, and routes of torch alone."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        check, "quick", lambda **options: [check.Case(16, 16, "float32", name) for name in ("few", "step")]
    )
    check_run.routes.cache_clear()


@pytest.mark.parametrize("layout", ["few", "many", "plain", "length 1"])
@pytest.mark.parametrize("dtype", check.DTYPES)
def test_a_right_route_is_within_its_tolerance(layout, dtype, monkeypatch):
    """Users would report what is right."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = check.Case(16, 32, dtype, layout)
    errors = check.run_case(case, CPU, torch_chunk_delta_rule)
    states = {"final state", "dh0"} if check.LAYOUTS[layout].states else set()
    assert errors.keys() == {"output without gradients", "output", "dq", "dk", "dv", "dbeta"} | states
    assert not check.too_large(errors, check.tolerance(case, "torch"))


def spoiled(part):
    """The rule with one quantity wrong, by a hundredth of one element."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            g = g.clone()
            g[0, -1] *= 1.05
            return g

    def rule(q, k, v, beta, **options):
        x = {"q": q, "k": k, "v": v, "beta": beta}
        if part in x and torch.is_grad_enabled():
            x[part] = Spoil.apply(x[part])
        o, ht = torch_chunk_delta_rule(*x.values(), **options)
        if part == "output" or (part == "inference" and not torch.is_grad_enabled()):
            o = o * 1.01
        if part == "final state":
            ht = ht * torch.nan
        return o, ht

    return rule


@pytest.mark.parametrize(
    "part, quantities",
    [
        ("q", {"dq"}), ("k", {"dk"}), ("v", {"dv"}), ("beta", {"dbeta"}), ("inference", {"output without gradients"}),
        ("final state", {"final state", "dq", "dk", "dv", "dbeta", "dh0"}),
    ],
)  # fmt: skip
def test_a_wrong_quantity_is_found_and_named(part, quantities, monkeypatch):
    """A wrong gradient would pass for right, or a bug report name another."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = check.Case(16, 16, "float32", "few")
    wrong = check.too_large(check.run_case(case, CPU, spoiled(part)), check.tolerance(case, "torch"))
    assert quantities - {"dq", "dk", "dv", "dbeta", "dh0"} <= wrong.keys() <= quantities and wrong


def test_the_reference_is_checked_too():
    """Everything is compared with a rule of our own: were that wrong, nothing would show it."""
    assert max(check.check_reference(CPU).values()) < check.REFERENCE


def test_a_tiny_beta_is_looked_at_by_itself(monkeypatch):
    """In a norm over all tokens, a dbeta of masked ones that is all wrong is 1 part in 10."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = check.Case(16, 16, "bfloat16", "few", "beta")
    small = check.make_inputs(case, CPU).tensors["beta"].unique()[:4].tolist()
    assert small == pytest.approx(list(check.BETAS), rel=1e-2)
    assert check.run_case(case, CPU, torch_chunk_delta_rule)["dbeta of small beta"] < 4e-3


def test_every_documented_size_is_in_the_table():
    """A size that is in no test has been wrong."""
    assert len(check.ALL_SIZES) == 256 and set(check.SIZES) <= set(check.ALL_SIZES)
    cases = list(check.full())
    assert len({(c.K, c.V, c.dtype, c.layout) for c in cases if c.layout in check.BASIC}) == 256 * 3 * 3
    assert {c.layout for c in check.quick()} == set(check.LAYOUTS) and {c.inputs for c in check.quick()} == set(
        check.INPUTS
    )


def test_the_command_reports_and_exits(deltanet, tmp_path, monkeypatch):  # noqa: F811
    """A script could not tell a wrong machine from a right one, and a report would lack what it is for."""
    quickly(monkeypatch)
    code, out, err = deltanet("check", "--device", "cpu", "--report", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and report["ok"] and "all right: 2 cases" in out and "seed 0" in out
    assert report["environment"]["torch"] == version("torch") and report["environment"]["transformers"] in out
    rows = [row for row in report["rows"] if row["case"]]
    assert {(row["route"], row["case"]["layout"]) for row in rows} == {
        ("torch, chunks", "few"), ("torch, token by token", "few"), ("torch, step", "step"),
    }  # fmt: skip

    monkeypatch.setattr(check_run.delta_rule, "torch_chunk_delta_rule", spoiled("output"))
    check_run.routes.cache_clear()
    code, out, _ = deltanet("check", "--device", "cpu", "--json", "--peer", "fla")
    report = json.loads(out)
    assert code == 1 and not report["ok"] and "on a GPU" in report["skipped"][0]
    (wrong,) = [row for row in report["rows"] if row["too_large"]]
    assert wrong["route"] == "torch, chunks" and "output" in wrong["too_large"]

    monkeypatch.setattr(check_run.delta_rule, "torch_chunk_delta_rule", lambda *args, **options: 1 / 0)
    check_run.routes.cache_clear()
    code, out, _ = deltanet("check", "--device", "cpu")
    assert code == 1 and "wrong: torch, chunks: K 16" in out and "ZeroDivisionError" in out
    check_run.routes.cache_clear()
    for arguments in (("--sizes", "64x"), ("--sizes", "512")):
        code, _, err = deltanet("check", "--device", "cpu", *arguments)
        assert code == 1 and "sizes are K or KxV" in err
    assert deltanet("check", "--dtype", "float8")[0] == 2


def test_what_ran_is_named(monkeypatch):
    """Whether Gluon's or Triton's kernels are wrong is the first thing that a report has to tell."""
    pytest.importorskip("triton")
    case, device = check.Case(16, 16, "float32", "few"), CPU
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_run.routes.cache_clear()
    rows = {row["route"]: row for row in check_run._run_routes(case, device, None, 0)}
    check_run.routes.cache_clear()
    names = rows["kernels, chunks"]["kernels"]
    assert {"scan.scan_kernel", "grads.grads_kernel"} <= set(names)
    assert not rows["kernels, chunks"]["too_large"] and not rows["torch, chunks"]["kernels"]
    assert check_run.describe_kernels(names) == "Triton"
    names = ["hopper_scan.scan_kernel", "segments.chain_kernel", "prepare.prepare_kernel"]
    assert check_run.describe_kernels(names) == "Gluon, Triton, segments"
    (text,) = check_run.plans([case], device)
    assert "T 64, H 2, HV 2, K 16, V 16, float32" in text and "scan: Triton, 16 value columns" in text


def test_slow_routes_leave_most_of_a_table_out(monkeypatch):
    """Token by token, or tuned for each size, a table of all sizes would take days."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_run.routes.cache_clear()
    table = [check.Case(K, K, "float32", "length 1") for K in range(8, 8 * check_run.FEW_SIZES, 8)]
    table += [check.Case(64, 16, "float32", "length 1"), check.Case(128, 128, "float32", "length 1")]
    slow = {
        (row["case"]["K"], row["case"]["V"])
        for rows in check_run.run(table, CPU)
        for row in rows
        if row["route"] == "torch, token by token"
    }
    assert slow == {(64, 64), (128, 128)}


def test_a_peer_takes_the_first_configuration_that_runs(monkeypatch):
    """fla times all of its launch configurations for each size: a check of all of them would take a day."""
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    monkeypatch.setattr(autotuner.Autotuner, "_bench", autotuner.Autotuner._bench)  # to be given back
    check_run.tune_nothing()
    ran = []

    class Kernel:
        fn = staticmethod(lambda: None)
        run = staticmethod(lambda n, *, block, **options: ran.append((n, block)))

    def bench(kernel_call, quantiles):
        kernel_call()
        if ran[-1][1] == 16:
            raise autotuner.OutOfResources(1, 0, "shared memory")
        return [1.0] * 3

    configs = [autotuner.Config({"block": block}) for block in (16, 32, 64, 128)]
    tuner = autotuner.Autotuner(Kernel, ["n"], configs, ["n"], None, None, do_bench=bench)
    for n in (1, 1, 2):
        tuner.run(n)
    # two configurations tried for each n, then the call itself; the second call of n = 1 has its configuration
    assert ran == [(1, 16), (1, 32), (1, 32), (1, 32), (2, 16), (2, 32), (2, 32)]


def test_bits_that_change_between_calls_are_found():
    """A race is right in most calls."""
    calls = iter(range(100))

    def now_and_then(*args, **options):
        o, state = torch_chunk_delta_rule(*args, **options)
        return (o + 1e-6 if next(calls) == 4 else o), state

    case = check.Case(16, 16, "float32", "few")
    errors = check.run_case(case, CPU, now_and_then, again=2)
    assert set(check.too_large(errors, check.tolerance(case, "kernels"))) == {"between calls"}
    assert check.run_case(case, CPU, torch_chunk_delta_rule, again=1)["between calls"] == 0


def test_jobs_and_words(monkeypatch):
    """Processes give the same rows; the command's words must reach the kernels, or a bisection bisects nothing."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    case = [check.Case(16, 16, dtype, "length 1") for dtype in ("float32", "float16", "float16")]
    one, two = (list(check_run.run(case, CPU, jobs=jobs)) for jobs in (1, 2))
    assert [[row["route"] for row in rows] for rows in one] == [[row["route"] for row in rows] for rows in two]


def test_a_check_that_was_cut_off_goes_on(deltanet, tmp_path, monkeypatch):  # noqa: F811
    """An hour of compiling would be lost with the shell that ran it."""
    quickly(monkeypatch)
    monkeypatch.setattr(cli_check, "SAVE_EVERY", 0)
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    assert deltanet("check", "--device", "cpu", "--report", whole)[0] == 0
    run, ran = check_run._run_routes, []

    def break_off(case, *args, **options):
        if ran:
            raise KeyboardInterrupt
        ran.append(case)
        rows = run(case, *args, **options)
        rows[0]["errors"]["dq"] = float("inf")  # which JSON has no number for
        return rows

    monkeypatch.setattr(check_run, "_run_routes", break_off)
    with contextlib.suppress(KeyboardInterrupt):  # which the command line may turn into an exit code
        deltanet("check", "--device", "cpu", "--report", cut)
    assert json.loads(cut.read_text())["done"] == 1

    def go_on(case, *args, **options):
        ran.append(case)
        return run(case, *args, **options)

    monkeypatch.setattr(check_run, "_run_routes", go_on)
    assert deltanet("check", "--device", "cpu", "--report", cut)[0] == 0
    assert len(ran) == 2 and ran[0] != ran[1]
    got, wanted = (json.loads(file.read_text()) for file in (cut, whole))
    assert got["rows"][1]["errors"].pop("dq") == "inf"
    wanted["rows"][1]["errors"].pop("dq")
    assert all(got[key] == wanted[key] for key in ("rows", "cases", "done", "ok"))
    # another call's report is not continued
    deltanet("check", "--device", "cpu", "--report", cut, "--seed", "1")
    assert len(ran) == 4


def test_jobs_share_the_gpus(monkeypatch):
    """Three of four GPUs would be idle; or a process too many would find no memory."""
    free = {0: 13, 1: 1, 2: 0, 3: 2}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu] * check_run.MEMORY, 0))
    assert check_run._places(torch.device("cuda"), 7) == [0, 1, 2, 3, 0, 3, 0]
    assert len(check_run._places(torch.device("cuda"), 99)) == 13 + 1 + 1 + 2
    assert check_run._places(torch.device("cuda", 3), 9) == [3, 3]
    assert check_run._places(CPU, 2) == [None, None]
