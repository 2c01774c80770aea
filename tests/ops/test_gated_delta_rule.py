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


deltanet_kernels = pytest.importorskip("deltanet_kernels")
from deltanet_kernels import _switch, plan  # noqa: E402

from deltanet_conversion import check  # noqa: E402
from tests.ops._plans import change_plans, decide_anew  # noqa: E402


RULES = [torch_chunk_delta_rule, torch_recurrent_delta_rule]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def run(rule, inputs, dtype, with_state=True, l2norm=True, **kwargs):
    """Outputs, final state and the gradients of a random scalar of both, by name, in fp64."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    q, k, v, beta, g, state = inputs
    used = inputs if with_state else inputs[:5]
    if rule is delta_rule_fp64:
        kwargs["l2norm"] = l2norm
    else:
        kwargs |= {"output_final_state": True, "use_qk_l2norm_in_kernel": l2norm}
    o, final = rule(q, k, v, beta=beta, g=g, initial_state=state if with_state else None, **kwargs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in (o, final))
    gradients = torch.autograd.grad(loss, used, materialize_grads=True)
    return dict(zip(("o", "final_state", *("d" + name for name in NAMES)), (o, final, *gradients)))


def assert_close(got, wanted, tolerance, floor=1e-4):
    """Relative to the norm, or to `floor` of the output's where a gradient is smaller: e^-50 in fp32 is rounding."""
    assert got.keys() == wanted.keys()
    least = floor * wanted["o"].norm().item() or 1.0
    errors = {}
    for name, x in got.items():
        norm = wanted[name].double().norm().clamp_min(least)
        errors[name] = ((x.double().cpu() - wanted[name].double()).norm() / norm).item()
    assert all(e <= tolerance for e in errors.values()), errors


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


# ------------------------------------------------------------------------------------------------------- the kernels


# dg is a difference of row sums in the kernels: where nothing is left of it, their rounding is
FLOOR = 0.2


def on_kernels(name):
    """The function of that name in `deltanet_kernels`, on the device that tests have."""
    return lambda *inputs, **options: getattr(deltanet_kernels, name)(
        *(x.to(DEVICE) for x in inputs),
        **{k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in options.items()},
    )


KERNELS = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 1.5e-2}  # errors as of the plain rule


def compare(inputs, dtype=torch.float32, name="chunk_gated_delta_rule", **options):
    """Kernels on the inputs as `dtype` rounds them; g stays fp32, as models compute it."""
    inputs = [x.to(dtype).double() if i < 4 else x.float().double() for i, x in enumerate(inputs)]

    def in_dtype(q, k, v, beta, g, initial_state=None, **kw):
        q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
        return on_kernels(name)(q, k, v, beta=beta, g=g, initial_state=initial_state, **kw)

    got = run(in_dtype, inputs, torch.float32, **options)
    assert_close(got, run(delta_rule_fp64, inputs, torch.float64, **options), KERNELS[dtype], FLOOR)


@pytest.mark.parametrize(
    "K, V, HV, gate",
    [
        (32, 32, 1, "slow"), (32, 32, 1, "closed"), (32, 32, 1, "open"), (48, 24, 2, "mixed"), (48, 24, 2, "fast"),
        (160, 16, 2, "mixed"),
    ],
)  # fmt: skip
def test_chunked_kernels(K, V, HV, gate):
    """On a GPU as on a laptop: the published recurrence, for any head size, group and decay."""
    compare(make_inputs(1, 130, 1, K, HV, V, gate=gate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", ["mixed", "slow"])
def test_chunked_kernels_in_half_precision(dtype, gate):
    """What everybody trains with."""
    compare(make_inputs(1, 100, 1, 64, 2, 32, gate=gate), dtype)


@pytest.mark.parametrize("stored, deep", [(False, False), (False, True), (True, True)])
def test_every_form_of_the_scans_fades(stored, deep, monkeypatch):
    """Which form runs depends on the chip's size and the head's: P with its decays stored, or made by each scan."""
    change_plans(monkeypatch, scores=plan.Launch(32, 4, 1) if stored else None, deep=deep)
    compare(make_inputs(1, 100, 1, 48, 2, 32))
    compare(make_inputs(1, 70, 1, 160, 1, 16))


def test_packed_documents_fade_alone():
    """A document's decay must not reach into the next; tokens outside of all get zeros, dg among them."""
    borders = torch.tensor([0, 0, 5, 68, 133, 200])
    compare(make_inputs(1, 200, 1, 32, 2, 16, N=5), cu_seqlens=borders)
    inputs = [x.float() for x in make_inputs(1, 200, 1, 32, 2, 16)[:5]]
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
    o, _ = on_kernels("chunk_gated_delta_rule")(
        *leaves[:3], leaves[4], leaves[3], cu_seqlens=torch.tensor([3, 68, 133])
    )
    for x in (o, *torch.autograd.grad(o.sum(), leaves)):
        assert x[:, :3].eq(0).all() and x[:, 133:].eq(0).all() and x.isfinite().all()


@pytest.mark.parametrize(
    "T, backward, fade", [(512, True, 0.02), (450, False, 0.02), (768, True, 0.8), (450, False, 3)]
)
def test_segments_fade(T, backward, fade, monkeypatch):
    """A long sequence cut into segments: what a segment does to the state, Phi, fades, too. Where a head forgets a
    segment's start (all but its last two chunks, or one), that is not read; the head beside it forgets nothing.
    """
    decide_anew(monkeypatch, count_segments=lambda *_: 4, cuts_backward=lambda *_: backward)
    inputs = make_inputs(1, T, 1, 32, 2, 16, gate="slow")
    inputs[4][..., 0] *= fade / 0.02
    compare(inputs)


@pytest.mark.parametrize(
    "K, V, T, borders", [(48, 24, 130, None), (32, 72, 70, [0, 0, 5, 70]), (160, 16, 65, None), (32, 16, 300, None)]
)
def test_keys_that_the_caller_normalises(K, V, T, borders, monkeypatch):
    """Their dbeta comes from the reverse scan: for any head size, packed, and where 300 tokens are cut in segments."""
    decide_anew(monkeypatch, count_segments=lambda call, _: 2 if call.T == 300 else 1, cuts_backward=lambda *_: True)
    q, k, *rest = make_inputs(1, T, 1, K, 2, V, N=None if borders is None else len(borders) - 1)
    cu = {} if borders is None else {"cu_seqlens": torch.tensor(borders)}
    compare((F.normalize(q, dim=-1), F.normalize(k, dim=-1), *rest), l2norm=False, **cu)


@pytest.mark.parametrize(
    "K, V", [(32, 32), (64, 136), *(pytest.param(*size, marks=pytest.mark.gpu) for size in [(128, 128), (96, 192)])]
)
def test_dbeta_is_summed_before_dv_is_rounded(K, V):
    """Summed from dV in bf16, dbeta had more than 1.2 times the error of fla's kernels. Here keys are columns of the
    identity and all else small integers, so that dV = beta dO alone would be rounded; and dbeta, a sum of dO over
    columns, is 1, far less than its terms.
    """
    generator = torch.Generator().manual_seed(0)
    k = torch.eye(32, K)[None, :, None]
    q, do = torch.zeros_like(k), torch.zeros(1, 32, 2, V)
    q[:, -1] = k.sum(1)
    x = torch.randint(0, 100, (2, V), generator=generator)
    do[:, -1] = x - x.roll(1, -1)
    do[:, -1, :, 0] += 1
    beta = 0.5 + torch.rand(1, 32, 2, generator=generator)
    q, k, v, beta, do = (x.to(DEVICE, torch.bfloat16) for x in (q, k, torch.ones_like(do), beta, do))
    g = torch.zeros_like(beta)
    o, _ = deltanet_kernels.chunk_gated_delta_rule(q, k, v, g, beta.requires_grad_(), scale=1.0)
    (dbeta,) = torch.autograd.grad(o, beta, do)
    assert error(dbeta, torch.ones_like(dbeta)) < 0.01


def test_do_is_rounded_once(monkeypatch):
    """Where the scans compute P, dO was rounded again as it was scaled: dv had an error of 0.0037."""
    change_plans(monkeypatch, scores=None)
    case = check.Case(32, 32, "bfloat16", "plain", "gated")
    assert check.run_case(case, torch.device(DEVICE), deltanet_kernels.chunk_gated_delta_rule)["dv"] < 0.00355


def test_an_open_gate_on_kernels_is_the_plain_rule():
    """g = 0 changes no result by more than the order of sums."""
    q, k, v, beta, g, state = (x.float() for x in make_inputs(2, 70, 1, 32, 2, 16, gate="open"))
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    gated = on_kernels("chunk_gated_delta_rule")(q, k, v, g, beta, **options)
    for x, y in zip(gated, on_kernels("chunk_delta_rule")(q, k, v, beta, **options)):
        assert error(x, y) < 1e-6


def test_gated_operators_trace():
    """torch.compile sees one operator each way, as for the plain rule."""
    function = on_kernels("chunk_gated_delta_rule")
    inputs = [x.float() for x in make_inputs(1, 130, 1, 32, 2, 16)]

    def loss(q, k, v, beta, g, h0):
        o, ht = function(q, k, v, g, beta, initial_state=h0, output_final_state=True, use_qk_l2norm_in_kernel=True)
        return o.square().sum() + ht.square().sum()

    def gradients(f):
        leaves = [x.to(DEVICE).detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(f(*leaves), leaves)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(gradients(compiled), gradients(loss)):
        assert error(x, y) < 1e-5


@pytest.mark.parametrize("gate", GATES)
def test_kernels_token_by_token(gate):
    """The rule as it is defined, on a GPU: gradients, too, which fla's function of this name has not."""
    name = "fused_recurrent_gated_delta_rule"
    compare(make_inputs(2, 11, 1, 20, 2, 16, gate=gate), name=name)
    borders = torch.tensor([0, 3, 3, 4, 11])
    compare(make_inputs(1, 11, 1, 16, 2, 16, N=4, gate=gate), name=name, cu_seqlens=borders)


def test_tokens_outside_of_all_sequences_have_no_gradient():
    """Neither have sequences before or after a part in them."""
    inputs = [x.float().to(DEVICE).requires_grad_() for x in make_inputs(1, 11, 1, 16, 2, 16)[:5]]
    q, k, v, beta, g = inputs
    o, _ = on_kernels("fused_recurrent_gated_delta_rule")(q, k, v, g, beta=beta, cu_seqlens=torch.tensor([2, 5, 9]))
    for x in (o, *torch.autograd.grad(o.sum(), inputs)):
        assert x[:, :2].eq(0).all() and x[:, 9:].eq(0).all() and x.isfinite().all()


def test_decays_per_channel_are_refused():
    """They are another rule's: ignored, they would give another model."""
    q, k, v, beta, g, _ = (x.float() for x in make_inputs(1, 5, 1, 16, 2, 16))
    with pytest.raises(ValueError, match="gk and gv, decays per channel"):
        deltanet_kernels.fused_recurrent_gated_delta_rule(q, k, v, g, k)


def test_gated_step_kernel():
    """A step of decoding is the recurrence's next token, in place."""
    q, k, v, beta, g, state = (x.float() for x in make_inputs(2, 1, 1, 32, 2, 16, gate="fast"))
    wanted = delta_rule_fp64(q, k, v, beta, initial_state=state, l2norm=True, g=g)
    state = state.to(DEVICE)
    o = on_kernels("gated_delta_rule_step")(q, k, v, g, beta, state, use_qk_l2norm_in_kernel=True)
    assert error(o, wanted[0]) < 1e-6
    assert error(state, wanted[1]) < 1e-6


def test_growth_is_no_decay(monkeypatch):
    """The kernels take a decay between two tokens for at most 1: DELTANET_KERNELS=check says where it is not."""
    monkeypatch.setattr(_switch, "CHECKS", True)
    q, k, v, beta, g, _ = (x.float() for x in make_inputs(1, 5, 1, 16, 2, 16))
    g[0, 3, 1] = 0.5
    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        with pytest.raises(ValueError, match="g must be at most 0, the log of a decay, got 0.5"):
            on_kernels(name)(q, k, v, g, beta=beta)


def test_kernels_name_a_gate_of_another_shape():
    """g per key head would broadcast."""
    q, k, v, beta, g, _ = (x.float() for x in make_inputs(1, 5, 1, 16, 2, 16))
    for wrong in (g[..., :1], g.long()):
        with pytest.raises(ValueError, match=r"g must be \[1, 5, 2\]"):
            on_kernels("chunk_gated_delta_rule")(q, k, v, wrong, beta)
