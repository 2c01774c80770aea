"""Quantised linears: bitsandbytes replaces the projections, and the model goes on."""

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LINEAR, SLIDING, output_and_gradients, tiny_model, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


# On a CPU with AVX512-BF16, bitsandbytes 0.50 reads 4-bit weights with a multiple of 32 outputs only; a_proj and
# b_proj have one per head.
SKIPPED = ["a_proj", "b_proj", "lm_head"]
KINDS = {
    "8-bit": (BitsAndBytesConfig(load_in_8bit=True), bitsandbytes.nn.Linear8bitLt, 0.1),
    "4-bit": (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=SKIPPED,
        ),
        bitsandbytes.nn.Linear4bit,
        0.6,  # of random weights, in which nothing is redundant
    ),
}


@pytest.fixture(params=KINDS)
def quantized(request, tmp_path):
    """A model and itself, quantised while it was loaded."""
    config, linear, tolerance = KINDS[request.param]
    model = tiny_model(hidden_size=64, intermediate_size=128, layer_types=[LINEAR, SLIDING], linear_use_decay=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    return model, loaded, linear, tolerance


@torch.no_grad()
def test_a_quantised_model_reads_generates_and_comes_back(quantized, tmp_path):
    """A projection would be read past its module, the convolution or the head be quantised, or saving lose the
    weights.
    """
    model, loaded, linear, tolerance = quantized
    skipped = tuple(loaded.config.quantization_config.llm_int8_skip_modules or [])
    for name, module in loaded.named_modules():
        assert isinstance(module, linear) == (name.endswith("_proj") and not name.endswith(skipped)), name
    # before it reads anything: on the CPUs of above, bitsandbytes then saves other scales than it had loaded
    loaded.save_pretrained(tmp_path / "quantised")
    x = tokens(2, 20)
    expected, logits = model(x).logits, loaded(x).logits
    assert 1e-4 < (logits - expected).norm() / expected.norm() < tolerance
    assert loaded.generate(x, max_new_tokens=4, do_sample=False).shape == (2, 24)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    assert torch.equal(again(x).logits, logits)


def test_lora_trains_on_a_quantised_model(quantized):
    """QLoRA, the way to fine-tune on a small GPU, would give some adapter no gradient."""
    _, loaded, _, _ = quantized
    adapted = get_peft_model(loaded, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)).train()
    x = tokens(2, 20)
    _, gradients = output_and_gradients(adapted, input_ids=x, labels=x, use_cache=None)
    assert len(gradients) == 2 * (6 + 4 + 2 * 3)  # A and B of each projection of mixer, attention and MLPs
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
