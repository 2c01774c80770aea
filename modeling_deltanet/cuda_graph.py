"""The decode step of `generate` with a static cache, as a CUDA graph of the model as it is.

Eager decoding waits for the host: 16 ms per token for 24 layers (1.3B, batch 8) beside an H200, which needs 2.6 of
them. Transformers' answer is torch.compile: 21 s for a Llama of that size, before its second token. What is gained is
the CUDA graph at its end, and a DeltaNet's step can be recorded as it is: it writes its states where they lie.
`generate` does so (`DeltaNetForCausalLM.get_compiled_call`), and its first call takes 4.5 s. (Figures of commit
cfac000.)
"""

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.cache_utils import Cache


def can_be_captured(model) -> bool:
    """Whether a decode step of `model` is a fixed sequence of kernels on one GPU, between which the host decides
    nothing.
    """
    config = model.config
    if model.device.type != "cuda" or torch.distributed.is_initialized() or getattr(model, "hf_quantizer", None):
        return False
    if len({str(device) for device in getattr(model, "hf_device_map", {}).values()}) > 1:
        return False
    if set(config.layer_types) != {"linear_attention"} and config._attn_implementation not in ("sdpa", "eager"):
        return False
    # Transformers' static window is another step while it fills up; these angles depend on the largest position.
    is_rotated_by_length = config.uses_rope and config.rope_parameters["rope_type"] in ("dynamic", "longrope")
    return "sliding_attention" not in config.layer_types and not is_rotated_by_length


class GraphedStep:
    """A model's call that, given the same kinds of inputs as the time before, becomes the replay of a CUDA graph.

    The first of such calls runs as it is, and warms up what a graph cannot record: the loading of kernels, cuBLAS's
    workspace. The second is recorded and replayed, the others are replayed. One object serves one `generate`: between
    two, weights may move and adapters change, of which a graph would not know.
    """

    def __init__(self, call):
        self.call = call
        self.signature = None  # of the last call
        self.replay = None

    def __call__(self, **inputs):
        leaves, structure = tree_flatten(inputs, is_leaf=lambda x: isinstance(x, Cache))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        signature = structure, [_kind(leaf) for leaf in leaves]
        if inputs["input_ids"].shape[1] != 1 or signature != self.signature:
            self.replay = None
            outputs = self.call(**inputs)
            # Recorded hidden states would be overwritten by the next token's.
            is_plain = outputs.hidden_states is None and outputs.attentions is None
            # The call may have moved the cache's tensors: what it leaves is what the next one finds.
            self.signature = (structure, [_kind(leaf) for leaf in leaves]) if is_plain else None
            return outputs
        if self.replay is None:
            self.inputs = [leaves[i].clone() for i in places]
            for i, x in zip(places, self.inputs):
                leaves[i] = x
            recorded = tree_unflatten(leaves, structure)
            self.replay, self.outputs = capture(lambda: self.call(**recorded))
        else:
            for x, i in zip(self.inputs, places):
                x.copy_(leaves[i])
        self.replay()
        return self.outputs


def capture(function):
    """Record the kernels of `function` without running them: what replays them, and the outputs that they write to."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as a streamer's reader, may use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return graph.replay, outputs


def _kind(x):
    """All of an input that a recorded step depends on, but for a tensor's contents."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype, x.device
    return [_state(layer) for layer in x.layers] if isinstance(x, Cache) else x


def _state(layer) -> list:
    """What a cache layer's attributes are to the host: addresses and numbers. (In one go, as it is asked for each
    token.)
    """
    return [
        x.data_ptr() if isinstance(x, torch.Tensor) else x
        for attribute in vars(layer).values()
        for x in (attribute.values() if isinstance(attribute, dict) else (attribute,))
    ]
