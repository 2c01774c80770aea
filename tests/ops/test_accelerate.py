"""`accelerate`: Transformers' models with the gated delta rule give with our kernels what they give without.

Without a GPU the kernels run in Triton's interpreter; tests marked `gpu` run the real thing.
"""

import importlib.util
import inspect
import logging
import subprocess
import sys

import pytest
import torch
from tiny import VOCAB, output_and_gradients, redraw, tiny_llama, tokens
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen4ExpForCausalLM,
    Qwen4ExpTextConfig,
)
from transformers.models.qwen3_next import modeling_qwen3_next

from tests.ops._reference import error


deltanet_kernels = pytest.importorskip("deltanet_kernels")
from deltanet_kernels.accelerate import _REPLACEMENTS, LAYERS  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LINEAR, FULL, INDEXED = "linear_attention", "full_attention", "indexed_attention"
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
MODELS = {
    "qwen3_next": (Qwen3NextForCausalLM, Qwen3NextConfig, {"mlp_only_layers": [0, 1]}),
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig, {}),
    "olmo_hybrid": (OlmoHybridForCausalLM, OlmoHybridConfig, {"linear_key_head_dim": 24, "linear_value_head_dim": 48}),
    "qwen3_5_moe": (Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, EXPERTS),
    "qwen4_exp": (Qwen4ExpForCausalLM, Qwen4ExpTextConfig, EXPERTS | {"layer_types": [LINEAR] * 2}),
}
NAMED = ["qwen3_next", "qwen3_5", "olmo_hybrid"]


@pytest.fixture(autouse=True)
def restored():
    """What one test replaces must not compute in the next."""
    yield
    deltanet_kernels.restore()


@pytest.fixture
def torch_only(monkeypatch):
    """Transformers computes in torch where fla is installed, too, which takes no fp64 and rounds fp32 to tf32."""
    for family in NAMED:
        for name, function in functions(family).items():
            monkeypatch.setattr(f"transformers.models.{family}.modeling_{family}.{name}", inspect.unwrap(function))


def make(family, seed=0, dtype=torch.float32, **overrides):
    cls, config, fields = MODELS[family]
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_types": [LINEAR, FULL],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "pad_token_id": 0,
        "eos_token_id": None,
    } | fields
    if family == "olmo_hybrid":
        del fields["head_dim"]
    torch.manual_seed(seed)
    model = redraw(cls(config(**fields | overrides)))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # decays from slow to fast
            torch.nn.init.uniform_(parameter, -2, 1)
    return model.eval().to(DEVICE, dtype)


def distance(got, wanted):
    """||got - wanted||, relative to ||wanted|| where that is above 1 (most are 1 to 15). Those of A_log and dt_bias
    are below 0.1, what is left of terms that cancel: torch's in fp32 are 2e-5 of that away from fp64, too.
    """
    return error(got, wanted) * min(1, wanted.double().norm().item())


def assert_same(gradients, wanted):
    """To 1e-5; A_log and dt_bias to 3e-5: dg is a difference of row sums in the kernels, theirs a sum of all dg."""
    distances = {name: distance(gradients[name], gradient) for name, gradient in wanted.items()}
    summed = {name for name in distances if name.endswith(("A_log", "dt_bias"))}
    too_far = {name: d for name, d in distances.items() if d >= (3e-5 if name in summed else 1e-5)}
    assert not too_far, too_far


def functions(family):
    module = sys.modules[f"transformers.models.{family}.modeling_{family}"]
    return {name: getattr(module, name) for name in _REPLACEMENTS}


@pytest.mark.parametrize("family", MODELS)
def test_same_logits_and_gradients(family):
    """A fine-tune with our kernels would train another model than the one that was published."""
    model, x = make(family), tokens(1, 10).to(DEVICE)
    wanted, gradients = output_and_gradients(model, input_ids=x, labels=x)
    before = functions(family)
    deltanet_kernels.accelerate(model)
    assert not set(functions(family).values()) & set(before.values())
    got, ours = output_and_gradients(model, input_ids=x, labels=x)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    assert_same(ours, gradients)


@pytest.mark.parametrize("family", NAMED)
@torch.no_grad()
def test_same_tokens(family):
    """Generation (a padded prompt, then steps that change the cache in place) would drift from the published model."""
    model, x = make(family), tokens(1, 6).to(DEVICE)
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True}
    wanted = model.generate(x, **options)
    deltanet_kernels.accelerate(model)
    got = model.generate(x, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits), atol=1e-5, rtol=1e-5)
    for layer, same in zip(got.past_key_values.layers[:1], wanted.past_key_values.layers[:1], strict=True):
        torch.testing.assert_close(layer.conv_states[0], same.conv_states[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.recurrent_states[0], same.recurrent_states[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prompt_in_two_parts():
    """A second turn of a chat is read behind the cache of the first: the convolution would start from nothing."""
    model, x = make("qwen3_5"), tokens(1, 9).to(DEVICE)
    wanted = model(x).logits[:, 5:]
    deltanet_kernels.accelerate(model)
    for borders in (None, torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)):  # of the one sequence there is
        cache = model(x[:, :5], use_cache=True).past_key_values
        got = model(x[:, 5:], past_key_values=cache, cu_seq_lens_q=borders).logits
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


PACKED = [*((family, "cu_seq_lens_q") for family in NAMED), ("qwen3_next", "seq_idx")]


@pytest.mark.parametrize("family, borders", PACKED)
def test_packed_rows_stay_apart(family, borders):
    """Training on packed rows would let documents run into each other, or be refused as it is without fla."""
    lengths, model = [4, 1, 5], make(family)
    x = tokens(1, 10).to(DEVICE)
    separate = torch.cat([model(part, use_cache=False).logits for part in x.split(lengths, dim=1)], dim=1)
    weight = torch.randn(separate.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    model.zero_grad()
    (separate * weight).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    inputs = {
        "cu_seq_lens_q": torch.tensor([0, 4, 5, 10], dtype=torch.int32, device=DEVICE),
        "seq_idx": torch.tensor([[0] * 4 + [1] + [2] * 5], dtype=torch.int32, device=DEVICE),
    }
    inputs = {borders: inputs[borders]}
    inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE)
    if importlib.util.find_spec("fla") is None:
        with pytest.raises(ValueError, match="can't keep packed sequences apart without"):
            model(x, use_cache=False, **inputs)
    deltanet_kernels.accelerate()
    packed = model(x, use_cache=False, **inputs).logits
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-5)
    model.zero_grad()
    (packed * weight).sum().backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, wanted)


def test_several_rows_of_packed_sequences_are_refused():
    """Borders of one row would be taken for those of all."""
    model, x = make("qwen3_next"), tokens(2, 6).to(DEVICE)
    deltanet_kernels.accelerate(model)
    with pytest.raises(ValueError, match=r"need one row, got \[2, 6\]"):
        model(x, seq_idx=torch.zeros_like(x))


@pytest.mark.parametrize("family", NAMED)
def test_one_graph(family):
    """Compiled training would break into pieces at each layer, as it does with fla."""
    torch._dynamo.reset()
    counters.clear()
    model, x = make(family).train(), tokens(1, 10).to(DEVICE)
    wanted, gradients = output_and_gradients(model, input_ids=x, labels=x)
    deltanet_kernels.accelerate()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, ours = output_and_gradients(model, compiled, input_ids=x, labels=x)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(got.loss, wanted.loss)
    assert_same(ours, gradients)


def test_decoding_is_one_graph():
    """`generate` with a static cache compiles its step: another graph per layer or token would take minutes."""
    torch._dynamo.reset()
    counters.clear()
    model, x, graphs = make("olmo_hybrid"), tokens(1, 6).to(DEVICE), []
    wanted = model.generate(x, max_new_tokens=4, do_sample=False)
    deltanet_kernels.accelerate(model)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    config = CompileConfig(fullgraph=True, backend=keep, mode=None)
    config._compile_all_devices = True  # by itself, `generate` compiles on a GPU only
    options = {"cache_implementation": "static", "compile_config": config, "do_sample": False}
    assert torch.equal(model.generate(x, max_new_tokens=4, **options), wanted)
    assert len(graphs) == 1 and not counters["graph_break"]
    called = {node.target for node in graphs[0].graph.nodes if node.op == "call_function"}
    called = {getattr(op, "overloadpacket", op) for op in called}
    assert {torch.ops.deltanet_kernels.short_conv_step, torch.ops.deltanet_kernels.delta_rule_step} <= called


@pytest.mark.parametrize("why", ["no_state", "bf16_state", "gradient", "two_tokens", "no_final_state"])
def test_steps_that_are_not_in_place(why):
    """The in-place step would write into a state that somebody still needs, or refuse what Transformers computes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    T = 2 if why == "two_tokens" else 1
    q, k, v, g, beta = random(1, T, 1, 16), random(1, T, 1, 16), random(1, T, 2, 16), random(1, T, 2), random(1, T, 2)
    state = None if why == "no_state" else random(1, 2, 16, 16).to(torch.bfloat16 if why == "bf16_state" else None)
    options = {"g": -g.abs(), "beta": beta.sigmoid(), "initial_state": state, "use_qk_l2norm_in_kernel": True}
    options["output_final_state"] = why != "no_final_state"
    kept = None if state is None else state.clone()
    if why == "gradient":
        v.requires_grad_()
    wanted = modeling_qwen3_next.torch_recurrent_gated_delta_rule(q, k, v, **options)
    deltanet_kernels.accelerate()
    got = modeling_qwen3_next.torch_recurrent_gated_delta_rule(q, k, v, **options)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert state is None or torch.equal(state, kept)
    assert got[0].requires_grad == (why == "gradient")


def test_a_step_of_the_convolution_with_a_gradient():
    """Its weight's gradient would be lost without a word where somebody decodes outside of `torch.no_grad`."""
    generator = torch.Generator().manual_seed(0)
    x, state, weight = (
        torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((1, 8, 1), (1, 8, 4), (8, 4))
    )
    results = []
    for _ in range(2):
        leaf = weight.clone().requires_grad_()
        y = modeling_qwen3_next.causal_conv1d_update(x, state.clone(), leaf, None, "silu")
        results.append(torch.autograd.grad(y.square().sum(), leaf)[0])
        deltanet_kernels.accelerate()
    torch.testing.assert_close(*results)


def test_restore_and_models_to_come(caplog):
    """A process could not go back to what Transformers computes, or would be told at every call."""
    before = {family: functions(family) for family in MODELS}
    with caplog.at_level(logging.INFO, "deltanet_kernels.accelerate"):
        for _ in range(2):
            deltanet_kernels.accelerate()
    assert [record.args[1].split(".")[2] for record in caplog.records] == sorted(LAYERS)
    model, x = make("qwen3_next"), tokens(1, 5).to(DEVICE)
    ours = model(x).logits
    assert not {f for family in MODELS for f in functions(family).values() if f in before[family].values()}
    for _ in range(2):
        deltanet_kernels.restore()
    assert {family: functions(family) for family in MODELS} == before
    torch.testing.assert_close(model(x).logits, ours, atol=1e-5, rtol=1e-5)


def test_a_model_touches_its_own_file_only():
    """Who asks for one model's kernels would find others' changed."""
    before = functions("olmo_hybrid")
    deltanet_kernels.accelerate(torch.nn.Sequential(make("qwen3_5")))  # wrapped, as by PEFT or DDP
    assert functions("olmo_hybrid") == before
    assert modeling_qwen3_next.causal_conv1d_fn.__module__ != "deltanet_kernels.accelerate"
    assert functions("qwen3_5")["causal_conv1d_fn"].__module__ == "deltanet_kernels.accelerate"


def test_unknown_models_are_refused_by_name():
    """A user would believe that a model is accelerated which no kernel of ours knows."""
    with pytest.raises(ValueError, match="Qwen3NextGatedDeltaNet.*, got LlamaForCausalLM without one"):
        deltanet_kernels.accelerate(tiny_llama())
    with pytest.raises(ValueError, match=r"takes a torch.nn.Module or None, got str"):
        deltanet_kernels.accelerate("Qwen/Qwen3-Next-80B-A3B-Instruct")


@pytest.mark.parametrize("why", ["float64", "no_gpu", "transform", "heads", "bias", "gelu", "taps"])
def test_what_the_kernels_do_not_take_is_computed_as_before(why, monkeypatch):
    """A call that the kernels refuse would raise in a model that runs without them."""
    module, dtype = sys.modules["deltanet_kernels.accelerate"], torch.float64 if why == "float64" else torch.float32
    if why == "no_gpu":
        if DEVICE == "cuda":
            pytest.skip("there is a GPU")
        monkeypatch.setattr(module, "INTERPRETED", False)
    for name in ("fused_recurrent_gated_delta_rule", "short_conv", "_launch_step"):
        monkeypatch.setattr(module, name, None)
    K, W = 260 if why == "heads" else 16, 5 if why == "taps" else 4
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    q, k, v, g, beta = random(1, 5, 1, K), random(1, 5, 1, K), random(1, 5, 2, 16), random(1, 5, 2), random(1, 5, 2)
    x, weight, state, bias = random(1, 8, 5), random(8, W), random(1, 8, W), random(8) if why == "bias" else None
    gelu = "gelu" if why == "gelu" else "silu"

    def run_rules(*rules):
        inputs = {"g": -g.abs(), "beta": beta.sigmoid(), "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        if why == "transform":
            ones = torch.ones_like(v)
            return [torch.func.jvp(lambda v, f=f: f(q, k, v, **inputs)[0], (v,), (ones,))[1] for f in rules]
        return [x for f in rules for x in f(q, k, v, **inputs)]

    @torch.no_grad()
    def run_convolutions(conv, update):
        last = state.clone()
        return conv(x, weight, bias, activation=gelu), update(x[..., :1], last, weight, bias, gelu), last

    def run(rule, step, conv, update):
        results = run_rules(rule, step) if why not in ("bias", "gelu", "taps") else []
        return [*results, *run_convolutions(conv, update)] if why not in ("transform", "heads") else results

    before = functions("qwen3_next")
    order = "torch_chunk_gated_delta_rule torch_recurrent_gated_delta_rule causal_conv1d_fn causal_conv1d_update"
    wanted = run(*(before[name] for name in order.split()))
    deltanet_kernels.accelerate()
    got = run(*(functions("qwen3_next")[name] for name in order.split()))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_an_export_holds_none_of_our_operators():
    """An exported program would run only where this package is."""

    class Convolution(torch.nn.Module):
        def forward(self, x, weight):
            return modeling_qwen3_next.causal_conv1d_fn(x, weight, activation="silu")

    deltanet_kernels.accelerate()
    program = torch.export.export(Convolution(), (torch.randn(1, 8, 5), torch.randn(8, 4)))
    assert not [node for node in program.graph.nodes if "deltanet_kernels" in str(node.target)]


def test_switched_off(monkeypatch):
    """DELTANET_KERNELS=off, with which a wrong result is bisected, would leave these kernels in."""
    before = functions("qwen3_next")
    monkeypatch.setattr(deltanet_kernels._switch, "CHOSEN", frozenset({"off"}))
    deltanet_kernels.accelerate()
    assert functions("qwen3_next") == before


def test_transformers_is_imported_only_when_called():
    """Who uses the kernels alone would need Transformers, and wait seconds for it."""
    code = "import sys, deltanet_kernels; assert 'transformers' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_rows_on_a_gpu(family, dtype, torch_only):
    """On a GPU the kernels would be further from exact arithmetic than what they replace."""
    sizes = {"linear_key_head_dim": 96, "linear_value_head_dim": 192} if family == "olmo_hybrid" else {
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    }  # fmt: skip
    model, x = make(family, dtype=dtype, **sizes), tokens(2, 300).to(DEVICE)
    exact = make(family, dtype=torch.float64, **sizes)
    exact.load_state_dict(model.state_dict())
    results = [output_and_gradients(m, input_ids=x, labels=x) for m in (exact, model)]
    deltanet_kernels.accelerate(model)
    results.append(output_and_gradients(model, input_ids=x, labels=x))
    exact, theirs, ours = ({"logits": output.logits, **gradients} for output, gradients in results)
    for name, wanted in exact.items():
        floor = 1e-5 if dtype == torch.float32 else 2e-2  # theirs computes in fp32 and rounds once
        assert distance(ours[name], wanted) < max(floor, 1.2 * distance(theirs[name], wanted)), name


@pytest.mark.gpu
@pytest.mark.parametrize("family", NAMED)
@torch.no_grad()
def test_generate_on_a_gpu(family, torch_only):
    """Decoding on a GPU, step by step and from a CUDA graph, would give other tokens."""
    model, x = make(family), tokens(2, 100).to(DEVICE)
    options = {"max_new_tokens": 16, "do_sample": False}
    wanted = model.generate(x, **options)
    deltanet_kernels.accelerate(model)
    assert torch.equal(model.generate(x, **options), wanted)
    assert torch.equal(model.generate(x, cache_implementation="static", **options), wanted)
