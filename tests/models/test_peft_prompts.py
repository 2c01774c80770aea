"""PEFT's learned prompts: what stands before the text is read like text, and only where the model can read it."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny import FULL, LINEAR, tiny_model, tokens


CONFIGS = {"prompt": (PromptTuningConfig, {}), "p": (PromptEncoderConfig, {"encoder_hidden_size": 16})}
LAYERS = {"all_linear": [LINEAR] * 2, "hybrid": [LINEAR, FULL]}


def peft(kind, fields, layers):
    torch.manual_seed(0)
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **fields)
    return get_peft_model(tiny_model(layer_types=LAYERS[layers]), config).eval()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_learned_prompts_generate(config, layers):
    """A prompt-tuned model would end with an AttributeError, or continue another text than without a cache."""
    model, x = peft(*CONFIGS[config], layers), tokens(2, 8)
    x[0, :2] = 0
    inputs = {"input_ids": x, "attention_mask": (x != 0).long(), "max_new_tokens": 6, "do_sample": False}
    text = model.generate(**inputs)
    assert text.shape == (2, 14)
    assert torch.equal(text, model.generate(**inputs, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(text, model.generate(**inputs))


@pytest.mark.parametrize("layers", LAYERS)
def test_prefix_tuning_says_that_it_is_not_for_linear_layers(layers):
    """Learned keys and values would be given to layers that have none; the message was about
    `DynamicCache(config=...)`.
    """
    model, x = peft(PrefixTuningConfig, {}, layers), tokens(2, 8)
    with pytest.raises(ValueError, match="prefix tuning is not for linear-attention layers.*prompt tuning"):
        model.generate(input_ids=x, max_new_tokens=2)
    with pytest.raises(ValueError, match="prefix tuning is not for linear-attention layers.*prompt tuning"):
        model.train()(input_ids=x, labels=x)
