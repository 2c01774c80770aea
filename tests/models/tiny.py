"""Models small enough for a CPU whose weights are large enough for every part of a layer to show in the logits."""

from contextlib import contextmanager

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import modeling_deltanet
from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM


LINEAR, SLIDING, FULL = "linear_attention", "sliding_attention", "full_attention"
VOCAB = 96

# What the suite runs through padding, packing and the cache: every kind of layer, and every part that looks back in
# time.
VARIANTS = {
    "hybrid": {},
    "all_linear": {"layer_types": [LINEAR] * 3},
    "no_convolution": {"layer_types": [LINEAR] * 3, "linear_conv_kernel_dim": None},
    "no_convolution_hybrid": {"linear_conv_kernel_dim": None},
    "wide_convolution": {"layer_types": [LINEAR] * 2, "linear_conv_kernel_dim": 7},
    "relu": {"linear_qk_activation": "relu"},
    "elu_sum": {"linear_qk_activation": "elu", "linear_qk_norm": "sum"},
    "relu_sum_no_convolution": {
        "linear_qk_activation": "relu", "linear_qk_norm": "sum", "linear_conv_kernel_dim": None,
    },
    "identity": {"linear_qk_activation": "identity"},
    "output_gate": {"linear_use_output_gate": True},
    "decay": {
        "linear_use_decay": True, "linear_use_output_gate": True, "linear_allow_neg_eigval": True,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 16,
    },
    "fixed_beta": {"linear_use_beta": False},
    "negative_eigenvalues": {"linear_allow_neg_eigval": True},
    "additive": {"linear_use_delta_rule": False},
    "grouped_value_heads": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 12,
    },
    "linear_rope_and_bias": {"linear_use_rope": True, "linear_attention_bias": True, "head_dim": 16},
    "all_linear_rope": {"layer_types": [LINEAR] * 2, "linear_use_rope": True, "head_dim": 16},
    "softmax_extras": {"use_qk_norm": True, "attention_bias": True, "attention_out_bias": True, "head_dim": 16},
    "one_key_value_head": {"num_key_value_heads": 1},
    "no_rope": {"rope_parameters": {"rope_theta": None}},
    "softmax_first": {"layer_types": [FULL, LINEAR, SLIDING, LINEAR]},
    "all_softmax": {"layer_types": [SLIDING, FULL]},
}  # fmt: skip


def tiny_config(**overrides) -> DeltaNetConfig:
    """A hybrid of four layers, or what `overrides` make of it."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_types": [LINEAR, SLIDING, LINEAR, FULL],
        "linear_num_key_heads": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | overrides
    fields.setdefault("num_hidden_layers", len(fields["layer_types"]))
    if SLIDING in fields["layer_types"]:
        fields.setdefault("sliding_window", 5)
    return DeltaNetConfig(**fields)


def tiny_model(cls=DeltaNetForCausalLM, seed: int = 0, attn_implementation: str = "sdpa", **overrides):
    """A model in eval mode, of random weights. Those that Transformers draws (std 0.02) would hide most mistakes: the
    convolution would pass almost nothing on, and beta would be the same for every token."""
    torch.manual_seed(seed)
    model = cls._from_config(tiny_config(**overrides), attn_implementation=attn_implementation)
    return redraw(model).eval()


@torch.no_grad()
def redraw(model):
    """Draw every weight anew, so large that each part of the model matters."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.7, 1.3)
        elif name.endswith(("A_log", "dt_bias")):
            parameter.uniform_(-2.0, 0.0)  # half of the memory is left after 1 to 50 tokens
        elif "conv1d" in name or "b_proj" in name or name.endswith("bias"):
            parameter.normal_(std=0.5)
        elif "embed_tokens" in name:
            parameter.normal_(std=1.0)
        else:
            parameter.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
    return model


def tiny_llama(**overrides) -> LlamaForCausalLM:
    """Another architecture whose modules have the names of our softmax layers'."""
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**options | overrides)).eval()


def output_and_gradients(model, forward=None, use_cache=False, **inputs):
    """What one training step has: the output, and each trained parameter's gradient by name.

    `forward` is what to call in the model's place, such as the compiled model. Dropout is the same in every call.
    """
    model.zero_grad()
    torch.manual_seed(1)
    output = (model if forward is None else forward)(**inputs, use_cache=use_cache)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert not without, f"no gradient for {without}"
    return output, gradients


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them the padding token."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token: `w5.` is token 5, and 0 is padding. (The dot: a special token `w2` would be found within
    `w21`.)
    """
    tokenizer = Tokenizer(WordLevel({"<pad>": 0} | {f"w{i}.": i for i in range(1, VOCAB)}, unk_token="w1."))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="w2.",
        model_input_names=["input_ids", "attention_mask"],
    )


def words(*shape: int, seed: int = 0) -> str:
    """A text whose tokens are `tokens(*shape)`."""
    return " ".join(f"w{i}." for i in tokens(*shape, seed=seed).flatten().tolist())


@contextmanager
def marks_for_remote_code_undone():
    """Publishing marks the classes for remote code, for the life of the process: what comes later must not see it."""
    classes = [getattr(modeling_deltanet, name) for name in modeling_deltanet.__all__]
    marks = {cls: cls._auto_class for cls in classes if hasattr(cls, "_auto_class")}
    try:
        yield
    finally:
        for cls, mark in marks.items():
            cls._auto_class = mark
