"""torch.compile: one graph for a training step and one for a decode step, which CUDA graphs can capture."""

import deltanet_kernels
import pytest
import torch
from tiny import FULL, LINEAR, SLIDING, VARIANTS, output_and_gradients, tiny_model, tokens
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from modeling_deltanet.modeling_deltanet import DeltaNetRMSNorm


CASES = {
    "hybrid": {"layer_types": [LINEAR, SLIDING, FULL]},
    "all_linear": {"layer_types": [LINEAR] * 2},
    "decay": VARIANTS["decay"] | {"layer_types": [LINEAR] * 2},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_is_one_graph(case):
    """Compiled training would break into pieces, or learn something else than eager training does."""
    x, results = tokens(2, 20), []
    for compiled in (False, True):
        model = tiny_model(**CASES[case]).train()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for _ in range(2):
            result = output_and_gradients(model, forward, input_ids=x, labels=x)
        results.append(result)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(*(output.loss for output, _ in results))
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_compiled_training_step_under_autocast():
    """Without the kernels, the delta rule's gradients would be an error, or be computed in bf16."""
    x, results = tokens(2, 20), []
    for compiled in (False, True):
        model = tiny_model(layer_types=[LINEAR]).train()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with torch.autocast("cpu", torch.bfloat16):
            results.append(output_and_gradients(model, forward, input_ids=x, labels=x)[1])
    for name, gradient in results[0].items():
        assert (gradient - results[1][name]).norm() <= 1e-2 * gradient.norm(), name


@pytest.mark.parametrize(
    "fields, graphs_wanted",
    [
        ({"layer_types": [LINEAR] * 3}, 1),
        ({"layer_types": [LINEAR, FULL]}, 1),
        # Transformers' window has a graph for filling up, one for the token that fills it and one for being full.
        ({"layer_types": [LINEAR, SLIDING], "sliding_window": 16}, 3),
        (CASES["decay"], 1),
    ],
    ids=["all_linear", "full", "sliding", "decay"],
)
def test_generate_with_a_static_cache_compiles_once(fields, graphs_wanted):
    """`generate` would compile again for every token, layer or call: minutes instead of milliseconds."""
    model, prompt, graphs = tiny_model(**fields), tokens(2, 7), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compile_config = CompileConfig(fullgraph=True, backend=keep, mode=None)
    compile_config._compile_all_devices = True  # by itself, `generate` compiles on a GPU only
    static = {"cache_implementation": "static", "max_cache_len": 48, "compile_config": compile_config}
    padded = torch.ones_like(prompt)
    padded[0, :3] = 0
    for new_tokens, mask in ((12, torch.ones_like(prompt)), (30, torch.ones_like(prompt)), (12, padded)):
        options = {"attention_mask": mask, "max_new_tokens": new_tokens, "do_sample": False}
        assert torch.equal(model.generate(prompt, **options, **static), model.generate(prompt, **options))
    assert len(graphs) == graphs_wanted and not counters["graph_break"]


@pytest.mark.parametrize("packing", ["position_ids", "cu_seq_lens_q"])
@torch.no_grad()
def test_packed_documents_stay_apart_when_compiled(packing):
    """Compiled training on packed documents would let them run into each other, without a word."""
    lengths, x = [5, 1, 9], tokens(1, 15)
    inputs = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "cu_seq_lens_q": torch.tensor([0, 5, 6, 15], dtype=torch.int32),
    }
    model = tiny_model(layer_types=[LINEAR, FULL]).train()
    separate = torch.cat([model(document, use_cache=False).logits for document in x.split(lengths, dim=1)], dim=1)
    compiled = torch.compile(model, backend="eager")(input_ids=x, use_cache=False, **{packing: inputs[packing]})
    torch.testing.assert_close(compiled.logits, separate, atol=1e-4, rtol=1e-4)
    if packing == "position_ids":  # in one graph it cannot be known
        with pytest.raises(torch._dynamo.exc.Unsupported, match="pass cu_seq_lens_q instead"):
            torch._dynamo.reset()
            torch.compile(model, backend="eager", fullgraph=True)(
                input_ids=x, use_cache=False, position_ids=inputs[packing]
            )


def test_the_switch_to_the_kernels_is_no_break(monkeypatch):
    """On a GPU, every layer of a compiled model would be a graph of its own."""
    from modeling_deltanet import kernel_switch

    monkeypatch.setattr(kernel_switch, "_judged", lambda index: None)

    def f(x):
        return x + (kernel_switch._kernels_on(0, torch.bfloat16, None) is not None)

    assert torch.compile(f, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_shares_no_product_of_its_gradient(dtype):
    """Inductor would write that product out in fp32 and read it again, in each layer; or the gradient would be
    another.
    """
    graphs, norm = [], DeltaNetRMSNorm(32, eps=0.1).to(dtype)
    torch.nn.init.normal_(norm.weight)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x, dy = torch.randn(2, 3, 7, 32, dtype=dtype).unbind(0)
    compiled, results = torch.compile(norm, fullgraph=True, backend=aot_autograd(fw_compiler=keep)), []
    for run, run_dtype in ((norm, torch.float64), (compiled, dtype)):
        norm.to(run_dtype)
        x, dy = x.detach().to(run_dtype).requires_grad_(), dy.to(run_dtype)
        y = run(x)
        results.append((y, *torch.autograd.grad(y, (x, norm.weight), dy)))
    for expected, got in zip(*results):
        assert (got.double() - expected).norm() < (1e-6 if dtype == torch.float32 else 4e-3) * expected.norm()
    backward = graphs[1].graph
    (gradient,) = (node for node in backward.nodes if node.op == "placeholder" and "tangents" in node.name)
    if dtype == torch.bfloat16:
        (gradient,) = gradient.users  # in fp32
    products = [node for node in gradient.users if node.target is torch.ops.aten.mul.Tensor]
    assert len(products) == 3 and all(len(product.users) == 1 for product in products)


class Captured(Exception):
    pass


def decode_graph_on_kernels(model, monkeypatch):
    """The functional graph of a decode step on the Triton kernels, which are traced and not run; and its cache."""
    graphs, cache = [], StaticCache(config=model.config, max_cache_len=16)

    def keep(graph, inputs):
        graphs.append(graph)
        raise Captured

    with torch.no_grad():
        model(tokens(2, 5), past_key_values=cache)
        for module in ("delta_rule", "short_conv"):
            monkeypatch.setattr(f"modeling_deltanet.{module}.kernels_for", lambda *args: deltanet_kernels)
        step = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
            step(tokens(2, 1), past_key_values=cache, position_ids=torch.tensor([[5]]))
    return graphs[0], cache


@pytest.mark.parametrize("case", ["hybrid", "all_linear"])
def test_a_decode_step_writes_each_state_once_and_where_it_lies(case, monkeypatch):
    """Each token would copy the whole memory several times, or leave CUDA graphs, which want fixed addresses."""
    model = tiny_model(**CASES[case])
    graph, cache = decode_graph_on_kernels(model, monkeypatch)
    H, K = model.config.linear_num_value_heads, model.config.linear_key_head_dim
    states = [n for n in graph.graph.nodes if getattr(n.meta.get("val"), "shape", None) == (2, H, K, K)]
    linear_layers = model.config.layer_types.count(LINEAR)
    assert len(states) == 2 * linear_layers  # what comes in, and what the kernel leaves
    tensors = []
    for layer in cache.layers:
        tensors += getattr(layer, "recurrent_states", {}).values()
        tensors += getattr(layer, "conv_states", {}).values()
        tensors += [layer.keys, layer.values, getattr(layer, "cumulative_length", None)]
    tensors = [tensor for tensor in tensors if tensor is not None]
    assert len(tensors) >= 2 * linear_layers + 1
    assert all(getattr(tensor, "_dynamo_static_input_type", None) for tensor in tensors)
    # The graph returns what it has written, and the logits: all that is written has a fixed address.
    outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    assert len(outputs) <= len(tensors) + 1
