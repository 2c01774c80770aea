"""What both routes accept, refuse and give, torch's functions and the kernels, in one table each."""

import functools
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from _reference import DEVICE, delta_rule_fp64, error, make
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_deltanet import delta_rule, kernel_switch, short_conv
from modeling_deltanet.delta_rule import torch_chunk_delta_rule, torch_recurrent_delta_rule
from modeling_deltanet.short_conv import torch_short_conv


triton = pytest.importorskip("triton")
import deltanet_kernels  # noqa: E402
from deltanet_kernels import _checks, _switch, limits, prepare  # noqa: E402
from deltanet_kernels import chunk as chunk_module  # noqa: E402


KERNELS = [deltanet_kernels.chunk_delta_rule, deltanet_kernels.fused_recurrent_delta_rule]
RULES = [torch_chunk_delta_rule, torch_recurrent_delta_rule, *KERNELS]
CONVOLUTIONS = [torch_short_conv, deltanet_kernels.short_conv]
WITH_EMPTY = [[0, 4, 4, 6], [0, 0, 70, 70, 70], [0, 0]]


class Poison(TorchDispatchMode):
    """Memory that is allocated holds NaN, as memory may."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if "empty" in operator.name() and isinstance(out, torch.Tensor) and out.is_floating_point():
            out.fill_(float("nan"))
        return out


make_leaves = functools.partial(make, B=1, H=1, HV=2, K=16, beta_max=1.0, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, device=DEVICE)


def run(rule, inputs, cu_seqlens, do, dht, **options):
    with Poison():
        outputs = rule(
            *inputs[:4], initial_state=inputs[4], output_final_state=True, use_qk_l2norm_in_kernel=True,
            cu_seqlens=cu_seqlens, **options,
        )  # fmt: skip
    with Poison():
        return [*outputs, *torch.autograd.grad(outputs, inputs, (do, dht))]


@pytest.mark.parametrize("borders", WITH_EMPTY, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_sequence_may_be_empty(rule, borders):
    """Borders padded to a static shape would be refused by the routes that a CPU has."""
    T, cu = borders[-1], torch.tensor(borders, device=DEVICE)
    inputs = make_leaves(T=T, N=len(borders) - 1)
    o, ht = delta_rule_fp64(*inputs[:4], None, inputs[4], True, cu)
    do, dht = randn(*o.shape), randn(*ht.shape)
    want = [o, ht, *torch.autograd.grad((o, ht), inputs, (do.double(), dht.double()), materialize_grads=True)]
    outputs = rule(
        *inputs[:4], initial_state=inputs[4], output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=cu
    )
    got = [*outputs, *torch.autograd.grad(outputs, inputs, (do, dht), materialize_grads=True)]
    assert max(error(a, b) for a, b in zip(got, want)) < 1e-5


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("borders", WITH_EMPTY[:2], ids=str)
@pytest.mark.usefixtures("short_segments")
def test_both_convolutions_agree_on_empty_sequences_and_states(borders, state):
    """A prompt of packed turns would lose its convolution's tails on the route without kernels."""
    N, T, W = len(borders) - 1, borders[-1], 4
    inputs = [randn(1, T, 5), randn(1, T, 3), randn(5, W), randn(3, W), *([randn(N, 8, W - 1)] if state else [])]
    inputs = [x.requires_grad_() for x in inputs]
    dys, results = (randn(1, T, 5), randn(1, T, 3)), []
    for convolution in CONVOLUTIONS:
        h = inputs[4] if state else None
        ys, final = convolution(inputs[:2], inputs[2:4], "silu", h, True, torch.tensor(borders, device=DEVICE))
        results.append([*ys, final, *torch.autograd.grad(ys, inputs, dys)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


OUTSIDE = [[0, 70, 130], [0, 0, 40], [5, 5, 70, 130], [30, 90, 90]]


@pytest.mark.parametrize("borders", OUTSIDE, ids=str)
@pytest.mark.parametrize("rule", KERNELS)
def test_tokens_outside_of_all_sequences_give_zeros(rule, borders):
    """A padded buffer's tail would hand what memory held to the next layer and to the optimizer; nothing else may
    change.
    """
    T = 150
    if rule is KERNELS[1]:  # which the interpreter runs a token at a time
        T, borders = T // 10, [border // 10 for border in borders]
    first, end = borders[0], borders[-1]
    cu = torch.tensor(borders, device=DEVICE)
    inputs = make_leaves(T=T, N=len(borders) - 1)
    do, dht = randn(*inputs[2].shape), randn(*inputs[4].shape)
    inside = [x.detach()[:, first:end].requires_grad_() for x in inputs[:4]] + [inputs[4].detach().requires_grad_()]
    want = run(rule, inside, cu - first, do[:, first:end], dht)
    got = run(rule, inputs, cu, do, dht)
    for name, a, b in zip(("o", "ht", "dq", "dk", "dv", "dbeta", "dh0"), got, want):
        if name not in ("ht", "dh0"):
            assert not a[:, :first].any() and not a[:, end:].any(), name
            a = a[:, first:end]
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "borders", [[0, 20, 45], [0, 0, 13], [3, 3, 20, 40], [30, 37, 37], [33, 33], [53, 54]], ids=str
)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.usefixtures("short_segments")
def test_the_convolution_outside_of_all_sequences_gives_zeros(state, borders):
    """The same for the layer before, whose last document would go on into the tail."""
    T, W, first, end = 54, 4, borders[0], borders[-1]
    xs, weights, dys = [randn(1, T, 20)], [randn(20, W)], [randn(1, T, 20)]
    h = randn(len(borders) - 1, 20, W - 1) if state else None
    cu = torch.tensor(borders, device=DEVICE)

    def results(xs, dys, cu):
        inputs = [x.detach().requires_grad_() for x in (*xs, *weights, *([h] if state else []))]
        with Poison():
            ys, final = deltanet_kernels.short_conv(
                inputs[:1], inputs[1:2], "silu", inputs[2] if state else None, True, cu
            )
        with Poison():
            grads = torch.autograd.grad(ys, inputs, dys)
        return [*ys, *grads[:1]], [final, *grads[1:]]

    along_time, others = results(xs, dys, cu)
    cut = [[x[:, first:end] for x in y] for y in (xs, dys)]
    wanted, others_wanted = results(*cut, cu - first) if end > first else ([x[:, :0] for x in along_time], None)
    for a, b in zip(along_time, wanted):
        assert not a[:, :first].any() and not a[:, end:].any()
        assert torch.equal(a[:, first:end], b)
    for a, b in zip(others, others_wanted or others):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # dw is summed over other segments


@pytest.mark.parametrize("borders", [[0, 5], [1, 6], [0, 4, 2, 6], [0, 8]], ids=str)
def test_bad_borders_are_refused_where_reading_them_costs_nothing(borders):
    """A CPU would compute another packing than the one that was meant."""
    x, cu = torch.zeros(1, 6, 1, 16), torch.tensor(borders)
    for rule in (torch_chunk_delta_rule, torch_recurrent_delta_rule):
        with pytest.raises(ValueError, match="from 0 to T = 6"):
            rule(x, x, x, torch.zeros(1, 6, 1), cu_seqlens=cu)
    with pytest.raises(ValueError, match="from 0 to T = 6"):
        torch_short_conv([x[..., 0, :]], [torch.zeros(16, 4)], cu_seqlens=cu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_a_state_in_half_precision_is_converted(rule, dtype):
    """fla's own examples pass one; its gradient must come back in the dtype that it has."""
    q, k, v, beta, h0 = make_leaves(T=70)
    half = h0.detach().to(dtype).requires_grad_()
    same = half.detach().float().requires_grad_()
    results = []
    for state in (half, same):
        o, ht = rule(q, k, v, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
        results.append((o, ht, torch.autograd.grad(ht.sum() + o.sum(), state)[0]))
    (o, ht, g), (o_same, ht_same, g_same) = results
    assert ht.dtype == torch.float32 and g.dtype == dtype
    assert torch.equal(o, o_same) and torch.equal(ht, ht_same) and torch.equal(g, g_same.to(dtype))


@pytest.mark.parametrize("rule", RULES)
def test_flas_arguments_are_known_by_name(rule):
    """A user who changes one import would have to change his calls; what has no meaning here is refused in words."""
    q, k, v, beta, h0 = (x.detach() for x in make_leaves(T=70, N=2))
    cu = torch.tensor([0, 30, 70], device=DEVICE)
    options = {"chunk_size": 32} if "chunk" in rule.__name__ else {}
    same = rule(q, k, v, beta, initial_state=h0, use_qk_l2norm_in_kernel=True, cu_seqlens=cu)[0]
    got = rule(
        q, k, v, beta, initial_state=h0, use_qk_l2norm_in_kernel=True, cu_seqlens=cu, cu_seqlens_cpu=cu.cpu(),
        head_first=False, **options,
    )[0]  # fmt: skip
    assert torch.equal(got, same)
    with pytest.raises(ValueError, match=r"must be \[B, T, H, D\]"):
        rule(*(x.transpose(1, 2) for x in (q, k, v, beta)), head_first=True)
    with pytest.raises(TypeError, match="head_frist"):
        rule(q, k, v, beta, head_frist=True)


@pytest.mark.parametrize("rule", [torch_recurrent_delta_rule, deltanet_kernels.fused_recurrent_delta_rule])
def test_without_beta_it_is_one(rule):
    """As in fla's token-by-token function."""
    q, k, v, beta, _ = (x.detach() for x in make_leaves(T=5))
    got, same = (rule(q, k, v, b, use_qk_l2norm_in_kernel=True)[0] for b in (None, torch.ones_like(beta)))
    assert torch.equal(got, same)


@pytest.mark.parametrize("rule", [torch_chunk_delta_rule, deltanet_kernels.chunk_delta_rule])
def test_head_first_tensors_are_warned_about(rule, monkeypatch):
    """Of a consistent shape, they would be computed with time for heads; a short prompt of many heads must not be."""
    assert delta_rule.MANY_HEADS == _checks.MANY_HEADS >= 128
    for module in (delta_rule, _checks):
        monkeypatch.setattr(module, "MANY_HEADS", 3)
    x, beta = torch.zeros(1, 2, 4, 1, device=DEVICE), torch.zeros(1, 2, 4, device=DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(x[:, :, :3], x[:, :, :3], x[:, :, :3], beta[:, :, :3])
        with pytest.raises(UserWarning, match="2 tokens and 4 heads"):
            rule(x, x, x, beta)


def test_the_kernels_refuse_a_cpu_in_words(monkeypatch):
    """A user would be told of "0 active drivers"."""
    monkeypatch.setattr(_checks, "INTERPRETED", False)
    x, beta, xs, weights = (
        torch.zeros(1, 1, 1, 16),
        torch.zeros(1, 1, 1),
        [torch.zeros(1, 1, 16)],
        [torch.zeros(16, 4)],
    )
    calls = {
        "delta_rule.torch_chunk_delta_rule": lambda: deltanet_kernels.chunk_delta_rule(x, x, x, beta),
        "delta_rule.torch_recurrent_delta_rule": lambda: deltanet_kernels.fused_recurrent_delta_rule(x, x, x, beta),
        "delta_rule.delta_rule_step": lambda: deltanet_kernels.delta_rule_step(
            x, x, x, beta, torch.zeros(1, 1, 16, 16)
        ),
        "short_conv.torch_short_conv": lambda: deltanet_kernels.short_conv(xs, weights),
        "short_conv.short_conv_step": lambda: deltanet_kernels.short_conv_step(xs, weights, torch.zeros(1, 16, 3)),
    }
    for instead, call in calls.items():
        with pytest.raises(ValueError, match=f"CUDA device, got tensors on cpu: call modeling_deltanet.{instead}"):
            call()
        module, name = instead.split(".")
        assert callable(getattr({"delta_rule": delta_rule, "short_conv": short_conv}[module], name))


def test_the_limits_are_those_of_torch_too():
    """The two routes would normalise differently, or the switch send what the kernels refuse."""
    assert delta_rule.L2_NORM_EPS == limits.NORM_EPS
    too_large, too_wide = limits.MAX_HEAD_SIZE + 1, limits.MAX_TAPS + 1
    x = torch.zeros(1, 1, 1, too_large)
    assert str(too_large) in delta_rule._too_large(x, x) and delta_rule._too_large(x[..., 1:], x[..., 1:]) is None
    assert short_conv._too_wide([torch.zeros(3, too_wide)]) and short_conv._too_wide([torch.zeros(3, 1)])
    assert short_conv._too_wide([torch.zeros(3, limits.MAX_TAPS)]) is None


def on_gpu(monkeypatch, capability=(9, 0), hip=None):
    """A tensor on a GPU that is not there."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    kernel_switch._judged.cache_clear()
    kernel_switch._log_once.cache_clear()
    return SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=SimpleNamespace(index=0))


@pytest.mark.parametrize(
    "device, message",
    [
        ({"capability": (9, 0), "hip": "6.4"}, "do not take ROCm (6.4)"),  # an MI200
        ({"capability": (7, 5)}, "do not take compute capability 7.5 (a card): 8.0 is the least"),
    ],
)
def test_other_devices_compute_with_torch_and_say_so(device, message, monkeypatch, caplog):
    """A Turing card would fail inside Triton, and an AMD card be sent to the Hopper kernels."""
    x = on_gpu(monkeypatch, **device)
    assert kernel_switch.kernels_for(x) is None and kernel_switch.kernels_for(x) is None
    (record,) = caplog.records
    assert message in record.getMessage()
    kernel_switch._judged.cache_clear()


def test_a_known_device_gets_the_kernels_unless_off(monkeypatch, caplog):
    """`DELTANET_KERNELS=off` is the first question to a wrong result."""
    x = on_gpu(monkeypatch)
    assert kernel_switch.kernels_for(x) is deltanet_kernels
    monkeypatch.setattr(kernel_switch, "OFF", True)
    assert kernel_switch.kernels_for(x) is None
    assert "as DELTANET_KERNELS=off says" in caplog.records[-1].getMessage()
    kernel_switch._judged.cache_clear()


WORDS = """
import deltanet_kernels, modeling_deltanet.kernel_switch as s
from deltanet_kernels import _replay, _switch, plan
print(plan.GLUON, plan.SEGMENTS, _replay.REPLAYS, _switch.uses("beside"), _switch.CHECKS, _switch.EXPLAINS, s.OFF)
"""


def with_words(words, script=WORDS):
    env = {**os.environ, "DELTANET_KERNELS": words}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)


def test_the_environment_variable_leaves_out_what_it_names():
    """A wrong result could not be bisected; a word that is not known must not pass for "nothing found"."""
    done = with_words("no-gluon, no-segments,no-replay,no-beside,check,explain,off")
    assert done.stdout.split() == ["False"] * 4 + ["True"] * 3, done.stderr
    assert "DELTANET_KERNELS=no-gluon" in done.stderr and done.stderr.count("DELTANET_KERNELS=") == 1
    assert _switch.parse("") == frozenset() and _switch.uses("gluon")
    with pytest.raises(ValueError, match="no-gluon, no-segments, .*got no-glue"):
        _switch.parse("no-glue,off")


CHECKED = [*KERNELS, deltanet_kernels.short_conv]


@pytest.mark.parametrize("function", CHECKED)
def test_checks_read_borders_and_values(function, monkeypatch):
    """With them off, a border beyond T reads foreign memory, and a NaN is found layers later."""
    monkeypatch.setattr(_switch, "CHECKS", True)

    def call(border, value):
        q, k, v, beta, _ = (x.detach() for x in make_leaves(T=6))
        v[0, 3, 1, 2] = value
        cu = torch.tensor([0, border], device=DEVICE)
        if function is deltanet_kernels.short_conv:
            return function([v.flatten(2)], [randn(32, 4)], cu_seqlens=cu)
        return function(q, k, v, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu)

    call(6, 1.0)
    with pytest.raises(ValueError, match=r"stay within 0 to T = 6 and never go back, got \[0, 7\]"):
        call(7, 1.0)
    with pytest.raises(ValueError, match=r"must be finite, got nan at \[0, 3,"):
        call(6, float("nan"))


# ------------------------------------------------------------------------------------------------------- large grids


@pytest.mark.parametrize("B, T", [(4, 70), (1, 260)])
def test_more_chunks_than_a_grid_takes(B, T, monkeypatch):
    """From 4.2 million tokens on a launch would be refused: CUDA ends a grid's second axis at 65535."""
    inputs = make_leaves(B=B, T=T)
    do, dht = randn(*inputs[2].shape), randn(*inputs[4].shape)
    run_ = lambda: run(deltanet_kernels.chunk_delta_rule, inputs, None, do, dht)  # noqa: E731
    want, launched = run_(), []
    monkeypatch.setattr(chunk_module, "MAX_CHUNKS", 3)
    monkeypatch.setattr(
        prepare, "launch", lambda kernel, grid, *x, go=prepare.launch: (launched.append(grid), go(kernel, grid, *x))
    )
    for a, b in zip(run_(), want):
        assert error(a, b) < 1e-5
    assert launched and max(grid[1] for grid in launched if len(grid) == 2) <= 3
    x, cu = torch.zeros(1, 200, 1, 16, device=DEVICE), torch.tensor([0, 200], device=DEVICE)
    with pytest.raises(ValueError, match="got N = 1 and T = 200"):
        deltanet_kernels.chunk_delta_rule(x, x, x, x[..., 0], cu_seqlens=cu)


@pytest.mark.usefixtures("short_segments")
def test_a_convolution_larger_than_a_grid(monkeypatch):
    """From 2.1 million tokens, or 65536 rows, on a launch would be refused."""
    from deltanet_kernels import convolution as module

    inputs = [randn(3, 34, 20), randn(20, 4), randn(3, 20, 3)]
    inputs, dy = [x.requires_grad_() for x in inputs], randn(3, 34, 20)

    def results():
        (y,), final = deltanet_kernels.short_conv(inputs[:1], inputs[1:2], "silu", inputs[2], True)
        return [y, final, *torch.autograd.grad(y, inputs, dy)]

    want, launched = results(), []
    monkeypatch.setattr(module, "GRID_LIMIT", 2)
    monkeypatch.setattr(
        module, "launch", lambda kernel, grid, *x, go=module.launch: (launched.append(grid), go(kernel, grid, *x))
    )
    for a, b in zip(results(), want):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert max(max(grid[1:]) for grid in launched) <= 2
