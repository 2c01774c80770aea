"""Whatever stands in the place of a short convolution, or hangs on it, is called: the model must not read its weight
only.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_training import tiny_model, trainer
from tiny import LINEAR, tokens


CONVS = ["q_conv1d", "k_conv1d", "v_conv1d"]
DIM = 32  # a depthwise convolution has as many groups, and PEFT wants a rank that they divide


def adapted(**arguments):
    """Adapters on convolutions alone, and large enough to show."""
    torch.manual_seed(0)
    config = LoraConfig(r=DIM, lora_alpha=DIM, target_modules=CONVS, task_type="CAUSAL_LM", **arguments)
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model = get_peft_model(tiny_model(layer_types=[LINEAR, LINEAR]), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_changes_the_model_and_is_trained(use_dora):
    """Half of an adapter would be saved as it was drawn: PEFT accepts it and nothing ever reads it."""
    model, x = adapted(use_dora=use_dora), tokens(2, 12)
    with torch.no_grad(), model.disable_adapter():
        before = model(x).logits
    loss = model(x, labels=x)
    assert (loss.logits - before).abs().max() > 0.1
    loss.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-7, name


@torch.no_grad()
def test_an_adapted_convolution_is_one_convolution():
    """The adapted model would give other answers token by token, padded or packed than in one go."""
    model, x = adapted().base_model.model, tokens(2, 12)
    expected = model(x).logits
    cache, logits = None, []
    for piece in x.split([6, 1, 3, 1, 1], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected)

    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), x), dim=1)
    torch.testing.assert_close(model(padded, attention_mask=(padded != 0).long()).logits[:, 3:], expected)

    packed = model(x.reshape(1, -1), position_ids=torch.arange(12).repeat(2)[None]).logits
    torch.testing.assert_close(packed.view_as(expected), expected)


@torch.no_grad()
def test_a_module_in_the_place_of_a_convolution_gives_what_its_weight_gives():
    """`modules_to_save`, a hook or a subclass would turn a trained model into another one."""
    x, model = tokens(2, 12), tiny_model(layer_types=[LINEAR, LINEAR], linear_qk_activation="relu")
    expected = model(x).logits
    seen = []
    for name, module in model.named_modules():
        if name.endswith("conv1d"):
            module.register_forward_hook(lambda *args: seen.append(args[-1].shape))
    torch.testing.assert_close(model(x).logits, expected)
    assert seen == [(2, DIM, 12)] * 6


def test_modules_to_save_are_trained(tmp_path):
    """A convolution trained beside an adapter would stay what it was."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=CONVS, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(layer_types=[LINEAR]), config)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad and "conv1d" in name}
    assert len(before) == 3
    ids = tokens(12)
    trainer(tmp_path, model, [{"input_ids": ids, "labels": ids}], max_steps=1, per_device_train_batch_size=1).train()
    for name, parameter in model.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name
