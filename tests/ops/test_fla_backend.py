"""`register_with_fla`: fla's own function computes with our kernels, with every option of its that they can serve.

fla is imported where it is installed; a registry with its interface stands in where it is not.
"""

import re
import sys
import types
from operator import lt

import pytest
import torch
import torch.nn.functional as F

from tests.ops._reference import delta_rule_fp64, error


deltanet_kernels = pytest.importorskip("deltanet_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def stand_in_for_fla():
    """The module fla.backends as far as a backend meets it: its base class, `register`, and a call that asks each
    backend by priority and comes back to fla's function, "fla", when all have declined.
    """
    module = types.ModuleType("fla.backends")
    registered, module.reasons = {}, []

    class BaseBackend:
        priority = 5

    def register(operation):
        def keep(cls):
            backend = cls()
            registered[operation, backend.backend_type] = backend
            return cls

        return keep

    def chunk_gated_delta_rule(*args, **options):
        backends = [x for (operation, _), x in registered.items() if operation == "gated_delta_rule"]
        for backend in sorted(backends, key=lambda x: x.priority):
            try:
                accepted, reason = backend.chunk_gated_delta_rule_verifier(*args, **options)
            except Exception as raised:
                accepted, reason = False, str(raised)
            if accepted:
                return backend.chunk_gated_delta_rule(*args, **options)
            module.reasons.append(reason)
        return "fla"

    module.BaseBackend, module.register, module.registered = BaseBackend, register, registered
    return module, chunk_gated_delta_rule


@pytest.fixture
def fla(monkeypatch):
    """(fla.backends, its chunk_gated_delta_rule), with our backend."""
    module, function = stand_in_for_fla()
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.backends", module)
    deltanet_kernels.register_with_fla()
    return module, function


def make(T=20, K=16, V=16, dtype=torch.float32, N=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, like=dtype):
        return torch.randn(*shape, generator=generator).to(DEVICE, like)

    q, k, v = random(1, T, 1, K), random(1, T, 1, K), random(1, T, 2, V)
    g, beta, h0 = random(1, T, 2), random(1, T, 2), random(N, 2, K, V, like=torch.float32)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": h0}, random(2), random(2)


def plain(inputs, A_log=None, dt_bias=None, raw_gate=False, raw_beta=False, reflect=False, v_first=False, cu=None):
    """What fla's options mean, in fp64."""
    x = {name: value.double() for name, value in inputs.items()}
    if raw_gate:
        x["g"] = -A_log.double().exp() * F.softplus(x["g"] + (0 if dt_bias is None else dt_bias.double()))
    if raw_beta:
        x["beta"] = x["beta"].sigmoid() * (2 if reflect else 1)
    if v_first:
        x["initial_state"] = x["initial_state"].mT
    o, final = delta_rule_fp64(
        x["q"], x["k"], x["v"], x["beta"], None, x["initial_state"], l2norm=True, cu_seqlens=cu, g=x["g"]
    )
    return o, final.mT if v_first else final


OPTIONS = {
    "none": {},
    "gate": {"raw_gate": True},
    "gate_and_bias": {"raw_gate": True, "dt_bias": True},
    "beta": {"raw_beta": True},
    "beta_up_to_two": {"raw_beta": True, "reflect": True},
    "v_first": {"v_first": True},
    "packed": {"cu": [0, 7, 20]},
}


def compare(function, option, dtype, tolerance, **sizes):
    """fla's function against fp64: output, final state and the gradients of all that is learned."""
    option = dict(OPTIONS[option])
    cu = None if "cu" not in option else torch.tensor(option.pop("cu"), device=DEVICE)
    inputs, A_log, dt_bias = make(dtype=dtype, N=1 if cu is None else 2, **sizes)
    if not option.get("raw_gate"):
        inputs["g"] = -inputs["g"].abs()
    if not option.get("raw_beta"):
        inputs["beta"] = inputs["beta"].sigmoid()
    if option.get("v_first"):
        inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
    has_bias = option.pop("dt_bias", False)
    learned = [A_log] * option.get("raw_gate", False) + [dt_bias] * has_bias
    leaves = [x.requires_grad_() for x in (*inputs.values(), *learned)]
    wanted = plain(inputs, A_log, dt_bias if has_bias else None, cu=cu, **option)
    got = function(
        **inputs,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=option.get("raw_gate", False),
        A_log=A_log if option.get("raw_gate") else None,
        dt_bias=dt_bias if has_bias else None,
        use_beta_sigmoid_in_kernel=option.get("raw_beta", False),
        allow_neg_eigval=option.get("reflect", False),
        state_v_first=option.get("v_first", False),
        cu_seqlens=cu,
    )
    assert got[0].dtype == dtype and got[1].dtype == torch.float32 and got[1].is_contiguous()
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) for x in got]
    results = [
        [*pair, *torch.autograd.grad([(x * w).sum() for x, w in zip(pair, weights)], leaves)] for pair in (got, wanted)
    ]
    errors = [error(a, b) for a, b in zip(*results, strict=True)]
    # A_log's gradient and dt_bias's are sums over all tokens, whose terms cancel
    allowed = [tolerance] * (len(errors) - len(learned)) + [10 * tolerance] * len(learned)
    assert all(map(lt, errors, allowed)), errors


@pytest.mark.parametrize("option", OPTIONS)
def test_options(fla, option):
    """A layer of fla would be trained with another decay or step size than its own kernel gives it."""
    module, function = fla
    compare(function, option, torch.float32, 1e-5)
    assert not module.reasons


def make_call(**changes):
    inputs, *_ = make()
    return inputs | {"g": -inputs["g"].abs()} | changes


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"cp_context": object()}, "cp_context"),
        ({"head_first": False}, "head_first"),
        ({"transpose_state_layout": True}, "transpose_state_layout"),
        ({"chunk_size": 128}, "chunk_size must be 16, 32 or 64, got 128"),
        ({"use_gate_in_kernel": True}, "A_log with use_gate_in_kernel=True"),
        ({"allow_neg_eigval": True}, "use_beta_sigmoid_in_kernel=True"),
        ({"q": torch.zeros(1, 20, 1, 16, dtype=torch.float64, device=DEVICE)}, "a dtype other than"),
        ({"v": torch.zeros(1, 20, 2, 16, dtype=torch.bfloat16, device=DEVICE)}, "k and v must be torch.float32"),
        ({"v": torch.zeros(1, 20, 2, 300, device=DEVICE)}, "head sizes must be 1 to 256"),
        ({"initial_state": torch.zeros(1, 2, 16, 8, device=DEVICE)}, r"initial_state must be \[1, 2, 16, 16\]"),
    ],
)
def test_what_we_cannot_take_stays_with_fla(fla, changes, reason):
    """A call that fla serves would raise once our kernels are registered."""
    module, function = fla
    assert function(**make_call(**changes)) == "fla"
    (said,) = module.reasons
    assert re.search(reason, said), said


def test_no_gpu_and_switched_off(fla, monkeypatch):
    """fla's words on a CPU tensor, and its kernels under DELTANET_KERNELS=off, would be replaced by ours."""
    module, function = fla
    monkeypatch.setattr(deltanet_kernels._switch, "CHOSEN", frozenset({"off"}))
    assert function(**make_call()) == "fla" and module.reasons == ["DELTANET_KERNELS=off"]
    monkeypatch.undo()
    if DEVICE == "cpu":
        monkeypatch.setattr(sys.modules["deltanet_kernels.accelerate"], "INTERPRETED", False)
        backend = module.registered["gated_delta_rule", "deltanet_kernels"]
        accepted, reason = backend.chunk_gated_delta_rule_verifier(**make_call())
        assert not accepted and reason == "the kernels do not take tensors that are not on a GPU"


def test_without_fla(monkeypatch):
    """A missing package, or one too old for backends, would show as an unknown module of ours."""
    monkeypatch.setitem(sys.modules, "fla.backends", None)
    with pytest.raises(ImportError, match="needs flash-linear-attention >= 0.6"):
        deltanet_kernels.register_with_fla()


@pytest.fixture
def real_fla(monkeypatch, caplog):
    """fla's chunk_gated_delta_rule, with our backend for one test."""
    backends = pytest.importorskip("fla.backends", reason="flash-linear-attention is not installed")
    gated = pytest.importorskip("fla.ops.gated_delta_rule")
    registry = backends._load_operation_registry("gated_delta_rule")
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_logged", set())
    deltanet_kernels.register_with_fla()
    caplog.set_level("INFO", "fla.backends")
    return gated.chunk_gated_delta_rule


def test_the_backend_meets_fla_itself(real_fla, caplog):
    """fla's interface would have moved, and our kernels would be registered but never asked."""
    compare(real_fla, "gate_and_bias", torch.float32, 1e-5)
    assert "gated_delta_rule.chunk_gated_delta_rule -> deltanet_kernels" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-5), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "packed"])
def test_fla_computes_with_our_kernels_on_a_gpu(real_fla, caplog, option, dtype, tolerance):
    """fla's layers would get wrong outputs or gradients from our kernels, or never reach them."""
    compare(real_fla, option, dtype, tolerance, T=300, K=128, V=128)
    assert "-> deltanet_kernels" in caplog.text and "rejected" not in caplog.text


@pytest.mark.gpu
def test_fla_computes_what_we_decline_on_a_gpu(real_fla, monkeypatch, caplog):
    """The variable that turns our backend off would be ignored."""
    monkeypatch.setenv("FLA_DELTANET_KERNELS", "0")
    monkeypatch.setenv("FLA_FLASH_QLA", "0")
    try:
        compare(real_fla, "none", torch.bfloat16, 2e-2, T=300, K=128, V=128)
    except RuntimeError as refusal:  # of fla's backward, on Hopper beside Triton 3.4 to 3.7.0
        assert "produces incorrect results for gated chunk_bwd_dqkwg" in str(refusal)
    assert "-> deltanet_kernels" not in caplog.text
