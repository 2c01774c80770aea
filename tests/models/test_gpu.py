"""The model on the Triton kernels against the same model on the torch rule, on one GPU."""

import logging

import pytest
import torch
from tiny import output_and_gradients
from torch._dynamo.utils import counters
from transformers import CompileConfig

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM, cuda_graph
from modeling_deltanet.kernel_switch import _log_once


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HYBRID = ["linear_attention", "sliding_attention", "linear_attention", "full_attention"]


def make_model(layer_types=HYBRID, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    if "sliding_attention" in layer_types:
        kwargs["sliding_window"] = 50
    config = DeltaNetConfig(
        vocab_size=300,
        hidden_size=256,
        num_hidden_layers=len(layer_types),
        layer_types=layer_types,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_attention_heads=4,
        **kwargs,
    )
    model = DeltaNetForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "conv1d" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.to("cuda", dtype)


@pytest.fixture
def on_torch(monkeypatch):
    """A function that runs another one without the kernels."""

    def run(function):
        with monkeypatch.context() as patch:
            for module in ("delta_rule", "short_conv"):
                patch.setattr(f"modeling_deltanet.{module}.kernels_for", lambda *args: None)
            return function()

    return run


def relative(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("layer_types", [HYBRID, ["linear_attention"] * 2], ids=["hybrid", "linear"])
@pytest.mark.parametrize("case", ["plain", "left padding", "right padding", "packed", "checkpointed"])
def test_training_step_equals_the_torch_path(case, layer_types, on_torch):
    """A model must not learn anything else on a GPU than it would on a CPU."""
    model = make_model(layer_types).train()
    ids = torch.randint(300, (2, 333), device="cuda")
    inputs = {"input_ids": ids, "labels": ids}
    if "padding" in case:
        mask = torch.ones_like(ids)
        mask[0, slice(0, 70) if case == "left padding" else slice(263, None)] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if case == "packed":
        lengths = [100, 1, 64, 168]
        position_ids = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1).cuda()
        inputs["position_ids"] = position_ids
    wanted_output, wanted = on_torch(lambda: output_and_gradients(model, **inputs))
    if case == "checkpointed":
        model.gradient_checkpointing_enable()
    output, gradients = output_and_gradients(model, **inputs)
    real = inputs["labels"] != -100
    assert relative(output.logits[real], wanted_output.logits[real]) < 1e-4
    for name in wanted:
        assert relative(gradients[name], wanted[name]) < 2e-3, name


@pytest.mark.parametrize("case", ["plain", "left padding", "packed"])
def test_flex_attention_equals_sdpa(case):
    """Compiled, as Transformers runs it on a GPU, flex attention would give other logits or gradients."""
    torch._dynamo.reset()
    model, ids = make_model(layer_types=HYBRID).train(), torch.randint(300, (2, 333), device="cuda")
    mask, inputs = torch.ones_like(ids), {"input_ids": ids}
    if case == "left padding":
        mask[0, :70] = 0
        inputs["attention_mask"] = mask
    if case == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in (100, 1, 232)]).expand(2, -1).cuda()
    inputs["labels"] = ids.masked_fill(mask == 0, -100)
    wanted_output, wanted = output_and_gradients(model, **inputs)
    model.set_attn_implementation("flex_attention")
    output, gradients = output_and_gradients(model, **inputs)
    assert relative(output.logits[mask.bool()], wanted_output.logits[mask.bool()]) < 1e-4
    for name in wanted:
        assert relative(gradients[name], wanted[name]) < 2e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer_types", [HYBRID, ["linear_attention"] * 2], ids=["hybrid", "linear"])
def test_decoding_equals_reading_at_once(dtype, layer_types):
    """Prefill, steps and several tokens at once have to lead to one and the same state."""
    model = make_model(layer_types, dtype).eval()
    ids = torch.randint(300, (3, 150), device="cuda")
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, parts = None, []
        for a, b in ((0, 70), (70, 71), (71, 72), (72, 100), (100, 101), (101, 150)):
            output = model(ids[:, a:b], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert relative(torch.cat(parts, dim=1), whole) < (1e-4 if dtype == torch.float32 else 3e-2)
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32


@pytest.mark.parametrize("layer_types", [HYBRID, ["linear_attention"] * 2], ids=["hybrid", "linear"])
def test_generation_equals_the_torch_path(layer_types, on_torch):
    """Greedy and beam search of a left-padded batch: the same tokens on either path."""
    model = make_model(layer_types).eval()
    ids = torch.randint(3, 300, (2, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    for options in ({"do_sample": False}, {"num_beams": 3}):
        generate = lambda: model.generate(ids, attention_mask=mask, max_new_tokens=20, pad_token_id=0, **options)  # noqa: B023, E731
        assert torch.equal(generate(), on_torch(generate))


@pytest.mark.parametrize("layer_types", [HYBRID, ["linear_attention"] * 2], ids=["hybrid", "linear"])
def test_a_decode_step_is_replayed(layer_types, monkeypatch):
    """`generate(cache_implementation="static")`, the fast way to decode, would launch each kernel, or say something
    else.
    """
    model = make_model([t for t in layer_types if t != "sliding_attention"], torch.bfloat16).eval()
    captured, capture = [], cuda_graph.capture
    monkeypatch.setattr(cuda_graph, "capture", lambda function: captured.append(1) or capture(function))
    ids = torch.randint(3, 300, (2, 40), device="cuda")
    padded = torch.ones_like(ids)
    padded[0, :13] = 0
    options = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20, "pad_token_id": 0}
    for mask in (torch.ones_like(ids), padded):
        got = model.generate(ids, attention_mask=mask, cache_implementation="static", max_cache_len=100, **options)
        # attention over a longer, masked cache may round differently in bf16: the first tokens are the same all the
        # same
        same = got.shape[1] if "full_attention" not in model.config.layer_types else 44
        assert torch.equal(got[:, :same], model.generate(ids, attention_mask=mask, **options)[:, :same])
    assert len(captured) == 2


@pytest.mark.parametrize("layer_types", [HYBRID, ["linear_attention"] * 2], ids=["hybrid", "linear"])
def test_a_compiled_step_with_a_static_cache_is_one_cuda_graph(layer_types):
    """Compiled, as a `compile_config` asks for, a step would fall back to launching each kernel."""
    model = make_model([t for t in layer_types if t != "sliding_attention"], torch.bfloat16).eval()
    ids = torch.randint(3, 300, (2, 40), device="cuda")
    options = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20, "pad_token_id": 0}
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        got = model.generate(
            ids, cache_implementation="static", max_cache_len=100, compile_config=CompileConfig(), **options
        )
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    # bf16 rounds differently where kernels are fused: the first tokens are the same all the same
    assert torch.equal(got[:, :44], model.generate(ids, **options)[:, :44])


@pytest.mark.parametrize("layer_types", [HYBRID, ["linear_attention"] * 2], ids=["hybrid", "linear"])
def test_an_offloaded_cache_gives_the_same_text(layer_types):
    """Keys and values that wait in the host's memory would come back wrong, or linear layers fail to be moved."""
    model = make_model(layer_types).eval()
    ids = torch.randint(3, 300, (2, 40), device="cuda")
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    assert torch.equal(
        model.generate(ids, cache_implementation="offloaded", **options), model.generate(ids, **options)
    )


def test_the_log_says_once_which_path_runs(caplog):
    """A silent fall back to torch would be a slow model that nobody understands."""
    _log_once.cache_clear()
    model = make_model().eval()
    with caplog.at_level(logging.INFO, logger="modeling_deltanet.kernel_switch"):
        for _ in range(2):
            model(torch.randint(300, (1, 10), device="cuda"))
    assert len([record for record in caplog.records if "Triton kernels" in record.message]) == 1
