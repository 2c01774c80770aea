"""The gated rule against the recurrence in fp64: outputs, final state and every gradient, for decays from none to all.

The torch rule here; kernels of the same name in Triton's interpreter; both go through `run`.
"""

import pytest
import torch
import torch.nn.functional as F
from _reference import delta_rule_fp64, error
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_deltanet.delta_rule import (
    delta_rule,
    delta_rule_step,
    torch_chunk_delta_rule,
    torch_recurrent_delta_rule,
)


RULES = [torch_chunk_delta_rule, torch_recurrent_delta_rule]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NAMES = ("q", "k", "v", "beta", "g", "initial_state")
# of g: as a model starts, fading within a chunk, none at all, all gone at every token, and each of these by turns
GATES = {
    "slow": lambda x: -x * 0.02,
    "fast": lambda x: -x * 3,
    "open": torch.zeros_like,
    "closed": lambda x: torch.full_like(x, -50.0),
    "mixed": lambda x: torch.where(x < 0.1, -50.0, torch.where(x < 0.5, 0.0, -x)),
}


def make_inputs(B, T, H, K, HV, V, N=None, seed=0, gate="mixed", beta_max=2.0):
    """(q, k, v, beta, g, initial_state) in fp64. Every seventh beta is 0, every fifth `beta_max`."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, state = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((B, T, H, K), (B, T, H, K), (B, T, HV, V), (B if N is None else N, HV, K, V))
    )
    beta, x = (torch.rand(B, T, HV, generator=generator, dtype=torch.float64) for _ in range(2))
    beta = beta * beta_max
    beta[:, ::7], beta[:, 1::5] = 0, beta_max
    return q, k, v, beta, GATES[gate](x), state


def run(rule, inputs, dtype, with_state=True, **kwargs):
    """Outputs, final state and the gradients of a random scalar of both, by name, in fp64."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    q, k, v, beta, g, state = inputs
    used = inputs if with_state else inputs[:5]
    kwargs |= {"l2norm": True} if rule is delta_rule_fp64 else {
        "output_final_state": True, "use_qk_l2norm_in_kernel": True}  # fmt: skip
    o, final = rule(q, k, v, beta=beta, g=g, initial_state=state if with_state else None, **kwargs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in (o, final))
    gradients = torch.autograd.grad(loss, used, materialize_grads=True)
    return dict(zip(("o", "final_state", *("d" + name for name in NAMES)), (o, final, *gradients)))


def assert_close(got, wanted, tolerance):
    """Relative to the norm, and for a gradient so small that fp32 makes it of rounding, to 1e-4 of the output's."""
    assert got.keys() == wanted.keys()
    for name, x in got.items():
        assert x.isfinite().all(), name
        least = 1e-4 * wanted["o"].norm().item() or 1.0
        found = (x.double() - wanted[name].double()).norm() / wanted[name].double().norm().clamp_min(least)
        assert found <= tolerance, f"{name}: relative error {found:.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_equals_the_gated_fp64_recurrence(rule, dtype, data):
    """Whatever the shapes and however strong the gate, a user gets the published recurrence."""
    H, group = data.draw(st.integers(1, 2), "H"), data.draw(st.integers(1, 2), "HV / H")
    K, V = data.draw(st.sampled_from([4, 16, 20]), "K"), data.draw(st.sampled_from([1, 8, 24]), "V")
    kwargs = {"scale": data.draw(st.sampled_from([None, 0.3]), "scale")}
    if data.draw(st.booleans(), "packed"):
        lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=4), "lengths")
        B, T, N = 1, sum(lengths), len(lengths)
        kwargs["cu_seqlens"] = F.pad(torch.tensor(lengths), (1, 0)).cumsum(0)
    else:
        B, T, N = data.draw(st.integers(1, 2), "B"), data.draw(st.sampled_from([0, 1, 2, 63, 64, 65, 130]), "T"), None
    inputs = make_inputs(
        B, T, H, K, H * group, V, N,
        seed=data.draw(st.integers(0, 99), "seed"),
        gate=data.draw(st.sampled_from(list(GATES)), "gate"),
        beta_max=data.draw(st.sampled_from([1.0, 2.0]), "beta_max"),
    )  # fmt: skip
    kwargs["with_state"] = data.draw(st.booleans(), "initial_state")
    wanted = run(delta_rule_fp64, inputs, torch.float64, **kwargs)
    assert_close(run(rule, inputs, dtype, **kwargs), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_chunks_equal_the_gated_recurrence_over_many_chunks(dtype, gate):
    """At T = 1000 sums of g have had time to grow: e^-50 a token must not cost the tokens after it their digits."""
    inputs = make_inputs(1, 1000, 1, 16, 2, 8, gate=gate)
    wanted = run(torch_recurrent_delta_rule, inputs, torch.float64)
    assert_close(run(torch_chunk_delta_rule, inputs, dtype), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("rule", RULES)
def test_an_open_gate_is_the_plain_rule(rule):
    """A converted model starts with its gate open: it must answer as it did without one."""
    inputs = make_inputs(2, 130, 2, 16, 4, 8, gate="open")
    q, k, v, beta, g, state = inputs
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for got, wanted in zip(rule(q, k, v, beta, g=g, **options), rule(q, k, v, beta, **options)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_the_switch_and_the_step_take_a_gate():
    """Prefill and decoding of a gated model must be one function: a step after T tokens is the rule on T + 1."""
    q, k, v, beta, g, state = make_inputs(2, 71, 2, 16, 4, 8)
    state = state.float()
    whole, wanted = delta_rule_fp64(q, k, v, beta, initial_state=state, l2norm=True, g=g)
    options = {"use_qk_l2norm_in_kernel": True}
    first = (x[:, :70].float() for x in (q, k, v, beta))
    _, state = delta_rule(*first, initial_state=state, output_final_state=True, g=g[:, :70].float(), **options)
    o = delta_rule_step(*(x[:, 70:].float() for x in (q, k, v, beta)), state, g=g[:, 70:].float(), **options)
    assert error(o, whole[:, 70:]) < 1e-5
    assert error(state, wanted) < 1e-5


def test_per_sample_gradients_of_a_gate():
    """`torch.func.vmap(grad)` of a gated layer gives what a loop over the samples gives."""
    q, k, v, beta, g, _ = make_inputs(3, 70, 1, 8, 2, 8)

    def loss(q, k, v, beta, g):
        return torch_chunk_delta_rule(*(x[None] for x in (q, k, v, beta)), g=g[None])[0].square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(1, 4)))(q, k, v, beta, g)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in (k, g)]
        wanted = torch.autograd.grad(loss(q[i], leaves[0], v[i], beta[i], leaves[1]), leaves)
        for x, y in zip(got, wanted):
            torch.testing.assert_close(x[i], y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_a_gate_of_another_shape_is_named(rule):
    """g per key head, or integers, would broadcast or round: the message says what is wanted."""
    q, k, v, beta, g, _ = make_inputs(1, 5, 1, 4, 2, 4)
    for wrong in (g[..., :1], g.long()):
        with pytest.raises(ValueError, match=r"g must be \[B, T, HV\] = \[1, 5, 2\]"):
            rule(q, k, v, beta, g=wrong)
