"""Training on a GPU keeps little of a layer: backward computes again what lies between the projections. Forced here,
on a CPU, where by itself the model keeps everything."""

import gc
import weakref
from types import SimpleNamespace

import deltanet_kernels
import pytest
import torch
from deltanet_kernels import passes
from peft import LoraConfig, get_peft_model
from tiny import FULL, LINEAR, SLIDING, VARIANTS, output_and_gradients, tiny_model, tokens
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.flop_counter import FlopCounterMode

import modeling_deltanet
from modeling_deltanet.modeling_deltanet import DeltaNetDecoderLayer


@pytest.fixture
def recomputing(monkeypatch):
    """Switches recomputation on and off, as if this were, or were not, a GPU."""
    decide = DeltaNetDecoderLayer._recomputes

    def switch(on: bool):
        device = SimpleNamespace(is_cuda=on)
        monkeypatch.setattr(DeltaNetDecoderLayer, "_recomputes", lambda layer, x, cache: decide(layer, device, cache))

    return switch


def assert_bit_equal(results, other):
    assert torch.equal(results[0].loss, other[0].loss)
    assert results[1].keys() == other[1].keys()
    for name, gradient in results[1].items():
        assert torch.equal(gradient, other[1][name]), name


def kept_by(layer, x, **inputs) -> int:
    """How many bytes, parameters apart, a layer's forward keeps for backward."""
    parameters, kept = {p.untyped_storage().data_ptr() for p in layer.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x, **inputs)
    assert output.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def numbers_around_the_projections(model, B, T) -> int:
    """What a linear layer has to keep: what goes into its norms and out of them, and what comes out of its
    projections.
    """
    config = model.config
    key_dim = config.linear_num_key_heads * config.linear_key_head_dim
    value_dim = config.linear_num_value_heads * config.linear_value_head_dim
    # (a CPU's norm also keeps what it has divided by, and the quotient before it is scaled)
    norms = 2 * (3 * config.hidden_size + 1)
    projections = 2 * key_dim + value_dim + config.linear_num_value_heads + 2 * config.intermediate_size
    return B * T * (norms + projections)


def numbers_of_the_rule(model, B, T) -> int:
    """What the kernels' forward gives: o, and of each chunk of 64 tokens A, P, U, S and the norms of q and k."""
    config, chunks = model.config, B * -(-T // 64)
    H, G = config.linear_num_key_heads, config.linear_num_value_heads
    K, V = config.linear_key_head_dim, config.linear_value_head_dim
    assert K == V == 16  # blocks have 16 columns of V, and 32 of K
    return B * T * G * V + chunks * (G * (64 * 64 + V * 64 + V * 32) + H * (64 * 64 + 2 * 64))


@pytest.fixture
def on_kernels(monkeypatch, short_segments):
    """The model computes with the kernels, in Triton's interpreter."""
    for module in ("delta_rule", "short_conv"):
        monkeypatch.setattr(f"modeling_deltanet.{module}.kernels_for", lambda *args: deltanet_kernels)


@pytest.fixture
def runs(monkeypatch):
    """The contexts of each checkpointed region's two runs."""
    runs, keep_results = [], deltanet_kernels.keep_results
    monkeypatch.setattr(deltanet_kernels, "keep_results", lambda: runs.append(keep_results()) or runs[-1])
    return runs


def test_a_layer_keeps_what_its_norms_and_projections_need(recomputing):
    """Training would need twice the memory: a convolution, a state or an activation would be kept after all."""
    model, kept = tiny_model(layer_types=[LINEAR]).train(), []
    x = torch.randn(2, 70, 32, requires_grad=True)
    for on in (False, True):
        recomputing(on)
        kept.append(kept_by(model.model.layers[0], x))
    assert kept[1] == 4 * numbers_around_the_projections(model, 2, 70)
    assert kept[0] > 1.5 * kept[1]


def test_a_layer_on_the_kernels_keeps_the_rule_too(recomputing, on_kernels, runs):
    """Training would need more memory than fla's: q, k and v would be kept as the convolution gives them, or a result
    twice.
    """
    model = tiny_model(layer_types=[LINEAR]).train()
    recomputing(True)
    kept = kept_by(model.model.layers[0], torch.randn(2, 70, 32, requires_grad=True))
    assert kept == 4 * numbers_around_the_projections(model, 2, 70)
    ((o, _, *saved),) = runs[0][0].kept
    assert 4 * numbers_of_the_rule(model, 2, 70) == sum(
        x.untyped_storage().nbytes() for x in (o, *saved) if isinstance(x, torch.Tensor)
    )


@pytest.mark.parametrize("case", ["packed, grouped heads", "padded", "packed, decay"])
def test_the_scan_runs_once(recomputing, on_kernels, case, monkeypatch):
    """Each step would wait for the delta rule's kernels twice, or learn from another rule's results than its own."""
    fields = VARIANTS["grouped_value_heads"] if "grouped" in case else VARIANTS["decay"] if "decay" in case else {}
    model = tiny_model(**{"layer_types": [LINEAR], **fields}).train()
    x, launched, scan, results = tokens(1 if "packed" in case else 2, 10), [], passes.scan, []
    monkeypatch.setattr(passes, "scan", lambda *args, **options: launched.append(1) or scan(*args, **options))
    inputs = {"input_ids": x, "labels": x}
    if "packed" in case:
        inputs["position_ids"] = torch.cat((torch.arange(3), torch.arange(7))).unsqueeze(0)
    else:
        inputs["attention_mask"] = (torch.arange(10) >= torch.tensor([[4], [0]])).long()
    for on in (False, True):
        recomputing(on)
        launched.clear()
        results.append(output_and_gradients(model, **inputs))
        assert len(launched) == model.config.num_hidden_layers
    assert_bit_equal(*results)


def test_a_retained_graph_is_computed_again(recomputing, on_kernels):
    """A second backward through one forward would fail, or give other gradients."""
    recomputing(True)
    model, x, gradients = tiny_model(layer_types=[LINEAR]).train(), tokens(1, 10), []
    loss = model(input_ids=x, labels=x, use_cache=False).loss
    for _ in range(2):
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_what_was_kept_is_freed(recomputing, on_kernels, runs):
    """Memory would grow with each forward that no backward follows, by what the rule left in each layer."""
    recomputing(True)
    model, x = tiny_model(layer_types=[LINEAR]).train(), tokens(1, 10)
    loss = model(input_ids=x, labels=x, use_cache=False).loss
    kept = weakref.ref(runs[0][0].kept)
    del runs[0], loss
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_same_bits(recomputing, variant):
    """Training on a GPU would learn something else than what the tests on a CPU have checked."""
    model, x = tiny_model(**VARIANTS[variant]).train(), tokens(2, 20)
    padding = torch.ones_like(x)
    padding[0, :7] = 0
    for inputs in (
        {"input_ids": x, "labels": x},
        {"input_ids": x, "labels": x, "attention_mask": padding},
        {"input_ids": x, "labels": x, "position_ids": torch.cat((torch.arange(6), torch.arange(14))).expand(2, -1)},
    ):
        results = []
        for on in (False, True):
            recomputing(on)
            results.append(output_and_gradients(model, **inputs))
        assert_bit_equal(*results)


def test_gradients_are_the_same_bits_under_autocast(recomputing):
    """What is computed again would be computed in another precision."""
    model, x, results = tiny_model().train(), tokens(2, 20), []
    for on in (False, True):
        recomputing(on)
        forward = torch.autocast("cpu", torch.bfloat16)(model.__call__)  # and not backward
        results.append(output_and_gradients(model, forward, input_ids=x, labels=x))
    assert_bit_equal(*results)


def test_dropout_of_adapters_is_drawn_once(recomputing):
    """LoRA with dropout would be trained on gradients of another dropout than the loss had."""
    model, x, results = tiny_model(linear_use_output_gate=True).train(), tokens(2, 20), []
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM"))
    for on in (False, True):
        recomputing(on)
        results.append(output_and_gradients(model, input_ids=x, labels=x))
    assert len(results[0][1]) == len([name for name, _ in model.named_parameters() if "lora_" in name])
    assert_bit_equal(*results)


def test_no_projection_is_computed_again(recomputing):
    """Each step would do a third more work: matrix products are nearly all of it."""
    model, x, work = tiny_model(layer_types=[SLIDING, FULL]).train(), tokens(2, 20), []
    mixer = tiny_model(layer_types=[LINEAR]).model.layers[0].linear_attn.train()
    hidden_states, projections = torch.randn(2, 20, 32), []
    for on in (False, True):
        recomputing(on)
        with FlopCounterMode(display=False) as counter:
            output_and_gradients(model, input_ids=x, labels=x)
        work.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            mixer(hidden_states, recompute=on).sum().backward()
        projections.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    assert work[0] == work[1]
    assert projections[0] == projections[1]


@pytest.mark.parametrize("every_n_layers", [1, 2])
def test_a_checkpointed_layer_is_computed_again_once(recomputing, every_n_layers, monkeypatch):
    """Gradient checkpointing of whole layers would run each delta rule three times."""
    calls, rule = [], modeling_deltanet.linear_attention_deltanet.delta_rule

    def counted(*args, **kwargs):
        calls.append(1)
        return rule(*args, **kwargs)

    monkeypatch.setattr("modeling_deltanet.linear_attention_deltanet.delta_rule", counted)
    model, x, results = tiny_model(layer_types=[LINEAR] * 3).train(), tokens(2, 20), []
    for on in (False, True):
        recomputing(on)
        if on:
            model.activation_checkpointing_enable(every_n_layers=every_n_layers)
        calls.clear()
        results.append(output_and_gradients(model, input_ids=x, labels=x))
        assert len(calls) == (6 if on else 3)
    assert_bit_equal(*results)


@pytest.mark.parametrize("cache", ["no_grad", "cache"])
def test_nothing_is_kept_in_mind_without_a_backward(recomputing, cache):
    """A cache would be written a second time by backward, or generation pay for what it does not need."""
    recomputing(True)
    layer = tiny_model(layer_types=[LINEAR]).train().model.layers[0]
    on_gpu = SimpleNamespace(is_cuda=True)
    assert layer._recomputes(on_gpu, None)
    with torch.set_grad_enabled(cache != "no_grad"):
        assert not layer._recomputes(on_gpu, object() if cache == "cache" else None)


def test_a_compiled_step_keeps_as_little(recomputing, on_kernels):
    """Compiled, a step would break into pieces, keep the convolution's results, or compute the rule or projections
    again.
    """
    torch._dynamo.reset()
    counters.clear()
    model, x, results, graphs = tiny_model(layer_types=[LINEAR, FULL]).train(), tokens(1, 10), [], []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    recomputing(True)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    for forward in (model, torch.compile(model, fullgraph=True, backend=backend)):
        results.append(output_and_gradients(model, forward, input_ids=x, labels=x))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-5, rtol=1e-4, msg=name)

    forward, backward = ([str(node.target) for node in graph.graph.nodes] for graph in graphs)
    operators = [f"deltanet_kernels.{name}.default" for name in ("chunk_forward", "short_conv_forward")]
    # The rule's backward does not read v: its convolution is a call of its own, and is not computed again.
    assert [(forward.count(name), backward.count(name)) for name in operators] == [(1, 0), (2, 1)]
    (again,) = (node for node in graphs[1].graph.nodes if str(node.target) == operators[1])
    assert len(again.args[0]) == 2
    assert backward.count("aten.mm.default") == 2 * forward.count("aten.mm.default")
    # the output norm is, but not its rsqrt
    norm = "aten.rsqrt.default"
    assert (forward.count(norm), backward.count(norm)) == (6, 0)
