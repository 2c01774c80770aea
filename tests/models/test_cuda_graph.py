"""Decoding by replays of one recorded step, on a CPU: `Recorder` stands for the GPU's graphs. (On a GPU:
test_gpu.py.)
"""

from types import SimpleNamespace

import pytest
import torch
from tiny import FULL, LINEAR, SLIDING, VARIANTS, tiny_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, StaticCache

from modeling_deltanet import cuda_graph
from modeling_deltanet.cache_deltanet import CACHE_NAME
from modeling_deltanet.cuda_graph import GraphedStep, can_be_captured


class Recorder(TorchDispatchMode):
    """A CUDA graph on a CPU: replays the recorded operations on the addresses that they had, whatever the host would
    do.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host would wait for the GPU"
        output = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, output))
        return output

    def replay(self):
        self.replays += 1
        if self.replays == 1:  # recording has already run it, unlike a GPU
            return
        for function, args, kwargs, output in self.operations:
            for recorded, x in zip(tree_leaves(output), tree_leaves(function(*args, **kwargs))):
                if isinstance(x, torch.Tensor) and x.data_ptr() != recorded.data_ptr():
                    recorded.copy_(x)


@pytest.fixture
def recorders(monkeypatch):
    """`generate` decodes as on a GPU; the graphs that it has recorded."""
    graphs = []

    def capture(function):
        graphs.append(Recorder())
        with graphs[-1]:
            outputs = function()
        return graphs[-1].replay, outputs

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr("modeling_deltanet.modeling_deltanet.can_be_captured", lambda model: True)
    monkeypatch.setattr(
        "transformers.generation.GenerationMixin._valid_auto_compile_criteria",
        lambda model, inputs, config: isinstance(inputs[CACHE_NAME], StaticCache),
    )
    return graphs


STATIC = {"cache_implementation": "static", "max_cache_len": 48}
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "all_softmax"])
def test_replayed_tokens_are_those_of_eager_decoding(recorders, variant):
    """Every token after the third would be wrong, without a word: of another position, mask or state."""
    layer_types = [
        FULL if t == SLIDING else t for t in VARIANTS[variant].get("layer_types", [LINEAR, SLIDING, LINEAR, FULL])
    ]
    model, x = tiny_model(**VARIANTS[variant] | {"layer_types": layer_types, "sliding_window": None}), tokens(2, 7)
    padded = torch.ones_like(x)
    padded[0, :3] = 0
    for mask in (torch.ones_like(x), padded):
        options = {"attention_mask": mask, **GREEDY, "return_dict_in_generate": True, "output_logits": True}
        got, wanted = model.generate(x, **options, **STATIC), model.generate(x, **options)
        assert torch.equal(got.sequences, wanted.sequences)
        torch.testing.assert_close(got.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    # Of 12 tokens the prompt gives the first, and a plain step the second.
    assert [graph.replays for graph in recorders] == [10, 10]


def test_weights_that_changed_are_used(recorders):
    """A second `generate` would answer as the model did before it was trained, or with the adapter that was taken
    off.
    """
    model, x = tiny_model(layer_types=[LINEAR] * 2), tokens(2, 7)
    model.generate(x, **GREEDY, **STATIC)
    other = tiny_model(layer_types=[LINEAR] * 2, seed=1)
    model.model.layers = other.model.layers
    assert torch.equal(model.generate(x, **GREEDY, **STATIC), model.generate(x, **GREEDY))
    assert len(recorders) == 2


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 3}], ids=["beams", "chunks"])
def test_what_moves_or_changes_is_not_replayed(recorders, options):
    """Beams, which exchange their states, and prompts in chunks would be decoded from what lay at old addresses."""
    model, x = tiny_model(layer_types=[LINEAR, FULL]), tokens(2, 7)
    assert torch.equal(model.generate(x, **GREEDY, **STATIC, **options), model.generate(x, **GREEDY, **options))


def test_a_window_that_fills_up_is_not_replayed(recorders):
    """A sliding layer's step changes while its window fills up: a replayed one would write to one place of it only."""
    model, x = tiny_model(layer_types=[LINEAR, SLIDING], sliding_window=10), tokens(2, 7)
    assert torch.equal(model.generate(x, **GREEDY, **STATIC), model.generate(x, **GREEDY))


def test_recorded_hidden_states_are_each_tokens_own(recorders):
    """All tokens would have the last one's hidden states."""
    model, x = tiny_model(layer_types=[LINEAR] * 2), tokens(2, 7)
    options = {**GREEDY, "return_dict_in_generate": True, "output_hidden_states": True}
    got, wanted = (model.generate(x, **options, **static).hidden_states for static in (STATIC, {}))
    assert len(got) == len(wanted) == 12
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_compile_config_asks_for_torch_compile(recorders):
    """Whoever asks for torch.compile would silently get something else."""
    model = tiny_model(layer_types=[LINEAR])
    assert isinstance(model.get_compiled_call(None), GraphedStep)
    assert not isinstance(model.get_compiled_call(CompileConfig()), GraphedStep)


def test_only_a_fixed_sequence_of_kernels_is_captured():
    """Capture would fail in the middle of `generate`, or freeze a decision of the host's."""

    def captured(device="cuda", device_map=None, **fields):
        config = tiny_model(**fields).config
        device_map = {"hf_device_map": device_map} if device_map else {}
        return can_be_captured(SimpleNamespace(config=config, device=torch.device(device), **device_map))

    assert captured(layer_types=[LINEAR]) and captured(layer_types=[LINEAR, FULL])
    assert captured(layer_types=[LINEAR], device_map={"": 0})
    assert not captured(device="cpu", layer_types=[LINEAR])
    assert not captured(layer_types=[LINEAR], device_map={"model.layers.0": 0, "lm_head": 1})
    assert not captured(layer_types=[LINEAR, SLIDING])
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not captured(layer_types=[LINEAR, FULL], rope_parameters=dynamic)
