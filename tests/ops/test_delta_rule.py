"""The torch rule against the recurrence in fp64: outputs, final state and the gradient of every tensor."""

import functools
import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from _reference import assert_close, delta_rule_fp64, make
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_deltanet import kernel_switch
from modeling_deltanet.delta_rule import delta_rule, torch_chunk_delta_rule, torch_recurrent_delta_rule


RULES = [torch_chunk_delta_rule, torch_recurrent_delta_rule]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NAMES = ("o", "final_state", "dq", "dk", "dv", "dbeta", "dinitial_state")
make_inputs = functools.partial(make, dtype=torch.float64, beta_max=1.0, device="cpu")


def reference(*inputs, use_qk_l2norm_in_kernel=False, **kwargs):
    """The rule as it is defined, a token at a time, without a line of the code under test."""
    return delta_rule_fp64(*inputs, l2norm=use_qk_l2norm_in_kernel, **kwargs)


def run(rule, inputs, dtype, with_state=True, **kwargs):
    """Outputs and the gradients of a random scalar of both, in fp64. (At T = 0 some inputs have none: zero then.)"""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    used = inputs if with_state else inputs[:4]
    if rule is not reference:
        kwargs["output_final_state"] = True
    o, final = rule(*inputs[:4], initial_state=inputs[4] if with_state else None, **kwargs)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)).sum() for x in (o, final)
    )
    gradients = torch.autograd.grad(loss, used, materialize_grads=True)
    return o, final, *gradients


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_equals_the_fp64_recurrence(rule, dtype, data):
    """Whatever the shapes, a user gets the published recurrence, not something near it."""
    H, group = data.draw(st.integers(1, 2), "H"), data.draw(st.integers(1, 2), "HV / H")
    K, V = data.draw(st.sampled_from([4, 8, 16, 20]), "K"), data.draw(st.sampled_from([1, 8, 24]), "V")
    kwargs = {"use_qk_l2norm_in_kernel": True, "scale": data.draw(st.sampled_from([None, 1.0, 0.3]), "scale")}
    if data.draw(st.booleans(), "packed"):
        lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=4), "lengths")
        B, T, N = 1, sum(lengths), len(lengths)
        kwargs["cu_seqlens"] = F.pad(torch.tensor(lengths), (1, 0)).cumsum(0)
    else:
        B, T, N = data.draw(st.integers(1, 2), "B"), data.draw(st.sampled_from([0, 1, 2, 63, 64, 65, 130]), "T"), None
    inputs = make_inputs(
        B, T, H, K, V, H * group, N,
        seed=data.draw(st.integers(0, 99), "seed"),
        keys=data.draw(st.sampled_from(["random", "silu", "repeated"]), "keys"),
        beta_max=data.draw(st.sampled_from([0.0, 1.0, 2.0]), "beta_max"),
    )  # fmt: skip
    kwargs["with_state"] = data.draw(st.booleans(), "initial_state")
    wanted = run(reference, inputs, torch.float64, **kwargs)
    assert_close(NAMES, run(rule, inputs, dtype, **kwargs), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("keys", ["random", "silu", "repeated"])
@pytest.mark.parametrize("beta_max", [0.0, 1.0, 2.0])
def test_chunks_equal_the_recurrence_over_many_chunks(dtype, keys, beta_max):
    """At T = 1000 rounding has had time to grow, most of all where one key comes again and again."""
    inputs = make_inputs(1, 1000, 1, 16, 8, HV=2, keys=keys, beta_max=beta_max)
    kwargs = {"use_qk_l2norm_in_kernel": True}
    wanted = run(torch_recurrent_delta_rule, inputs, torch.float64, **kwargs)
    assert_close(NAMES, run(torch_chunk_delta_rule, inputs, dtype, **kwargs), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_inputs_are_computed_in_fp32(rule):
    """A bf16 model loses only the rounding of its inputs and of o; the state it carries on stays fp32."""
    inputs = [x.to(torch.bfloat16) for x in make_inputs(1, 150, 2, 16)[:4]]
    o, state = rule(*inputs, output_final_state=True, use_qk_l2norm_in_kernel=True)
    wanted_o, wanted_state = reference(*(x.double() for x in inputs), use_qk_l2norm_in_kernel=True)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert ((state - wanted_state).norm() / wanted_state.norm()) < 1e-5
    assert torch.equal(o, wanted_o.to(torch.bfloat16)) or ((o - wanted_o).norm() / wanted_o.norm()) < 4e-3


@pytest.mark.parametrize("rule", RULES)
def test_autocast_does_not_reach_the_rule(rule):
    """Under a bf16 autocast the products inside would lose the state's precision."""
    inputs = [x.float() for x in make_inputs(1, 100, 2, 16)[:4]]
    wanted = rule(*inputs, use_qk_l2norm_in_kernel=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rule(*inputs, use_qk_l2norm_in_kernel=True)[0], wanted)


@pytest.mark.parametrize("rule", RULES)
def test_a_state_carries_a_sequence_over_a_cut(rule):
    """Prefilling a prompt in two calls must be prefilling it in one, and must not change the state it was given."""
    q, k, v, beta, state = make_inputs(2, 100, 2, 8)
    before = state.clone()
    whole, final = rule(q, k, v, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    first, middle = rule(
        *(x[:, :37] for x in (q, k, v, beta)),
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    second, last = rule(
        *(x[:, 37:] for x in (q, k, v, beta)),
        initial_state=middle,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, final, rtol=0, atol=1e-12)
    assert torch.equal(state, before)


@pytest.mark.parametrize("rule", RULES)
def test_no_final_state_unless_asked_for(rule):
    """Training code unpacks (o, None)."""
    assert rule(*make_inputs(1, 5, 1, 4)[:4])[1] is None


def test_strided_inputs_from_one_projection():
    """q, k and v may be views of one tensor: same result as contiguous copies."""
    qkv = torch.randn(2, 70, 3, 2, 8, dtype=torch.float64)
    beta = torch.rand(2, 70, 2, dtype=torch.float64)
    q, k, v = qkv.unbind(2)
    got = torch_chunk_delta_rule(q, k, v, beta)[0]
    assert torch.equal(got, torch_chunk_delta_rule(q.contiguous(), k.contiguous(), v.contiguous(), beta)[0])


@pytest.mark.parametrize("rule", RULES)
def test_a_strided_state_and_gradient(rule):
    """A state cut out of a larger tensor, and a gradient that comes back in other strides, are read as what they
    are.
    """
    q, k, v, beta, state = make_inputs(2, 100, 3, 8)
    strided = state.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    state.requires_grad_()
    weight = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    results = []
    for h0 in (state, strided):
        _, final = rule(q, k, v, beta, initial_state=h0, output_final_state=True, use_qk_l2norm_in_kernel=True)
        results.append((final, torch.autograd.grad((final.transpose(0, 1) * weight).sum(), h0)[0]))
    for got, wanted in zip(results[1], results[0]):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_the_switch_takes_the_torch_rule_on_a_cpu():
    """On a laptop the model must run without the kernels; a short step takes the recurrence, the rest the chunks."""
    for T in (1, 100):
        q, k, v, beta, _ = make_inputs(1, T, 1, 8)
        got = delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0]
        torch.testing.assert_close(got, reference(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0], rtol=0, atol=1e-12)


@pytest.fixture
def without_kernels(monkeypatch):
    """The module, imported anew where an import of the kernel package raises `error`."""
    original = __import__

    def import_anew(error):
        def replaced(name, *args, **kwargs):
            if name == "deltanet_kernels":
                raise error
            return original(name, *args, **kwargs)

        monkeypatch.setattr("builtins.__import__", replaced)
        spec = importlib.util.spec_from_file_location("kernel_switch_anew", kernel_switch.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return import_anew


def test_a_broken_kernel_package_is_heard(without_kernels):
    """Only a missing package may fall back to torch: an error inside it must not hide behind a slow model."""
    with pytest.raises(RuntimeError, match="bad kernel"):
        without_kernels(RuntimeError("bad kernel"))


def test_what_is_missing_is_logged_where_it_is_missed(without_kernels, caplog):
    """The log would say that torch computes where a kernel of the Hub does, which replaces what asks for the
    package.
    """
    module, x = without_kernels(ImportError("no such package")), torch.ones(2, requires_grad=True)
    module.checkpoint_but_for_rule(torch.sin, x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2).cos())
    assert not caplog.records
    for _ in range(2):
        assert (
            module.kernels_for(SimpleNamespace(is_cuda=True, dtype=torch.float32, device=SimpleNamespace(index=0)))
            is None
        )
    (record,) = caplog.records
    assert record.getMessage().endswith("not with its Triton kernels: no such package")


def _bad(**changes):
    q, k, v, beta, state = make_inputs(1, 6, 2, 4, 3, HV=4)
    arguments = {"q": q, "k": k, "v": v, "beta": beta, "initial_state": state, **changes}
    return {name: x for name, x in arguments.items() if x is not None}


BAD_INPUTS = {
    "k of another shape": (_bad(k=torch.randn(1, 6, 2, 5).double()), r"q \[1, 6, 2, 4\], k \[1, 6, 2, 5\]"),
    "3-d v": (_bad(v=torch.randn(1, 6, 3).double()), r"v \[1, 6, 3\]"),
    "v of another length": (_bad(v=torch.randn(1, 7, 4, 3).double()), r"v \[1, 7, 4, 3\]"),
    "heads that do not group": (_bad(v=torch.randn(1, 6, 3, 3).double()), r"value heads \(3\).*key heads \(2\)"),
    "beta of the key heads": (_bad(beta=torch.rand(1, 6, 2).double()), r"\[1, 6, 4\], got \[1, 6, 2\]"),
    "beta a value wide": (_bad(beta=torch.rand(1, 6, 4, 3).double()), r"\[1, 6, 4\], got \[1, 6, 4, 3\]"),
    "mixed dtypes": (_bad(k=torch.randn(1, 6, 2, 4)), r"k torch.float32"),
    "integers": (_bad(q=torch.ones(1, 6, 2, 4).long()), r"q torch.int64"),
    "state of another shape": (
        _bad(initial_state=torch.zeros(1, 4, 3, 4).double()), r"\[1, 4, 4, 3\].*\[1, 4, 3, 4\]"
    ),
    "state of integers": (
        _bad(initial_state=torch.zeros(1, 4, 4, 3).long()), r"torch.float64 or a narrower .* torch.int64"
    ),
    "borders not from 0": (_bad(cu_seqlens=torch.tensor([1, 6])), r"from 0 to T = 6.*\[1, 6\]"),
    "borders not to T": (_bad(cu_seqlens=torch.tensor([0, 5])), r"from 0 to T = 6.*\[0, 5\]"),
    "borders that go back": (_bad(cu_seqlens=torch.tensor([0, 4, 2, 6])), r"never back, got \[0, 4, 2, 6\]"),
    "borders not integers": (_bad(cu_seqlens=torch.tensor([0.0, 6.0])), r"integer.*torch.float32"),
    "2-d borders": (_bad(cu_seqlens=torch.tensor([[0, 6]])), r"1-d integer.*\[1, 2\]"),
    "one state for two packed": (_bad(cu_seqlens=torch.tensor([0, 4, 6])), r"\[2, 4, 4, 3\].*\[1, 4, 4, 3\]"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_clear_error(rule, case):
    """What came and what was wanted, instead of a shape error from the middle of the mathematics."""
    arguments, message = BAD_INPUTS[case]
    with pytest.raises(ValueError, match=message):
        rule(**arguments)


@pytest.mark.parametrize("rule", RULES)
def test_packing_a_batch_and_unknown_keywords_are_refused(rule):
    """cu_seqlens with two rows has no meaning, and a misspelt option must not be ignored."""
    q, k, v, beta, _ = make_inputs(2, 6, 1, 4)
    with pytest.raises(ValueError, match="batch of 1, got 2"):
        rule(q, k, v, beta, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(TypeError, match="cu_seqlen"):
        rule(q, k, v, beta, cu_seqlen=None)
