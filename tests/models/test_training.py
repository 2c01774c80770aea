"""Fine-tuning: Transformers' Trainer and PEFT's LoRA."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny import FULL, LINEAR, output_and_gradients, tiny_config, tiny_llama, tiny_model, tokens
from transformers import Trainer, TrainingArguments

from modeling_deltanet import DeltaNetForCausalLM


LORA_TARGETS = [
    "q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
]  # fmt: skip
GATED = {"linear_use_decay": True, "linear_use_output_gate": True}


# Trainer


def data(examples: int, length: int = 16):
    """Examples of random tokens, each with another number of labels, as padding and prompts leave them."""
    result = []
    for i in range(examples):
        ids = tokens(length, seed=i)
        labels = ids.clone()
        labels[: 3 * i % length] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


def trainer(folder, model, dataset, **arguments):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
    }
    return Trainer(model=model, args=TrainingArguments(**defaults | arguments), train_dataset=dataset)


def losses(trainer_) -> list[float]:
    return [entry["loss"] for entry in trainer_.state.log_history if "loss" in entry]


def assert_same_weights(model, other, **tolerance):
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_a_trained_folder_brings_a_cache(tmp_path):
    """Trainer turns `use_cache` off: whoever loads a trained folder or a merged adapter would get no past."""
    run = trainer(tmp_path, tiny_model(), data(4), max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model(tmp_path / "saved")
    assert run.model.config.use_cache is False  # saving is no reason to train with a cache
    adapted = get_peft_model(run.model, LoraConfig(task_type="CAUSAL_LM"))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    for folder in ("saved", "checkpoint-1", "merged"):
        assert DeltaNetForCausalLM.from_pretrained(tmp_path / folder)(tokens(1, 4)).past_key_values is not None, folder
    tiny_model(use_cache=False).save_pretrained(tmp_path / "without")  # somebody's own choice
    assert DeltaNetForCausalLM.from_pretrained(tmp_path / "without").config.use_cache is False


def test_lora_and_checkpointing_warn_of_nothing(tmp_path, recwarn):
    """Every user of LoRA would read that `is_gradient_checkpointing` is deprecated, of which he knows nothing."""
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
    trainer(tmp_path, model, data(4), max_steps=1, activation_checkpointing=True).train()
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)] == []


def test_accumulation_equals_a_big_batch(tmp_path):
    """Training in small pieces would report another loss, and learn something else."""
    arguments = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.5}
    whole = trainer(tmp_path / "a", tiny_model(), data(24), per_device_train_batch_size=8, max_steps=3, **arguments)
    whole.train()
    pieces = trainer(
        tmp_path / "b",
        tiny_model(),
        data(24),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=3,
        **arguments,
    )
    pieces.train()
    assert losses(whole) == pytest.approx(losses(pieces), rel=1e-4)
    assert_same_weights(whole.model, pieces.model, atol=1e-5, rtol=1e-4)
    assert (whole.model.lm_head.weight - tiny_model().lm_head.weight).abs().max() > 1e-3


def test_resuming_equals_an_uninterrupted_run(tmp_path):
    """A run that was interrupted would end in another model."""
    whole = trainer(tmp_path / "whole", tiny_model(), data(24), save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(tmp_path / "resumed", tiny_model(seed=1), data(24))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert_same_weights(whole.model, resumed.model, atol=0, rtol=0)


@pytest.mark.parametrize(
    "arguments", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"]
)
@pytest.mark.parametrize("layer_types", [[LINEAR, LINEAR], [LINEAR, FULL]], ids=["all_linear", "hybrid"])
def test_training_learns(tmp_path, arguments, layer_types):
    """Mixed precision or gradient checkpointing would fail in the Trainer, or train nothing."""
    run = trainer(tmp_path, tiny_model(layer_types=layer_types), data(4), max_steps=25, **arguments)
    run.train()
    assert losses(run)[-1] < 0.5 * losses(run)[0]
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_evaluation_gives_the_loss(tmp_path):
    """Perplexities that the Trainer reports would not be the model's."""
    model, dataset = tiny_model(), data(4)
    run = trainer(tmp_path, model, None)
    with torch.no_grad():
        expected = sum(model(e["input_ids"][None], labels=e["labels"][None]).loss for e in dataset) / 4
    run.args.per_device_eval_batch_size = 1
    assert Trainer(model=model, args=run.args, eval_dataset=dataset).evaluate()["eval_loss"] == pytest.approx(
        expected.item(), rel=1e-4
    )


# LoRA


def lora(model, **arguments):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | arguments))


def test_default_targets_are_every_projection(tmp_path):
    """`LoraConfig()` without targets would be refused for this model type, or leave layers out."""
    model = lora(tiny_model(**GATED))
    adapted = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    linears = {
        name
        for name, module in tiny_model(**GATED).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert {name.removeprefix("base_model.model.") for name in adapted} == linears
    assert {name.rsplit(".", 1)[1] for name in adapted} == set(LORA_TARGETS)


def linear_modules() -> list[str]:
    """One module of each name in each kind of layer: layer 0 is linear, layer 1 sliding, layer 3 full."""
    with torch.device("meta"):
        model = DeltaNetForCausalLM(tiny_config(**GATED))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[2:3] in (["0"], ["1"], ["3"])
    ]


@pytest.mark.parametrize("target", linear_modules())
def test_every_target_really_trains(target):
    """An adapter would be saved and do nothing: the weight is read without calling its module."""
    model, x = tiny_model(**GATED), tokens(2, 20)
    with torch.no_grad():
        before = model(x).logits
    adapted = lora(model, target_modules=[target], lora_alpha=16).eval()
    trained = dict(adapted.named_parameters())
    a, b = (trained[f"base_model.model.{target}.lora_{ab}.default.weight"] for ab in "AB")
    torch.testing.assert_close(adapted(x).logits, before)  # B is zero

    adapted(x, labels=x).loss.backward()
    assert b.grad.abs().max() > 1e-6
    with torch.no_grad():
        b.normal_(std=0.3)
    outputs = adapted(x, labels=x)
    outputs.loss.backward()
    assert a.grad.abs().max() > 1e-6
    assert (outputs.logits - before).abs().max() > 1e-2
    assert [name for name, p in adapted.named_parameters() if p.grad is not None] == [
        name for name, p in trained.items() if p is a or p is b
    ]


def random_adapter(model):
    """Adapters whose B is drawn, so that they change something."""
    adapted = lora(model)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted.eval()


@pytest.mark.parametrize("fields", [GATED, {"layer_types": [LINEAR, LINEAR]}], ids=["hybrid", "all_linear"])
def test_train_save_reload_and_merge(tmp_path, fields):
    """A fine-tuned adapter would be lost, or answer differently after it is reloaded or merged."""
    tiny_model(**fields).save_pretrained(tmp_path / "base")
    base = DeltaNetForCausalLM.from_pretrained(tmp_path / "base")
    frozen = {name: p.clone() for name, p in base.named_parameters()}
    adapted = lora(base)
    run = trainer(tmp_path / "run", adapted, data(4), max_steps=15, save_strategy="steps", save_steps=10)
    run.train()
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    for name, parameter in adapted.named_parameters():
        if "lora_" not in name:
            assert parameter.grad is None
            original = frozen[name.removeprefix("base_model.model.").replace(".base_layer", "")]
            assert torch.equal(parameter, original), name

    adapted.eval().save_pretrained(tmp_path / "adapter")
    x = tokens(2, 20)
    with torch.no_grad():
        expected = adapted(x).logits
        text = adapted.generate(input_ids=x, max_new_tokens=8, do_sample=False)
        reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(reloaded(x).logits, expected)
        assert torch.equal(reloaded.generate(input_ids=x, max_new_tokens=8, do_sample=False), text)
        merged = reloaded.merge_and_unload()
        assert type(merged) is DeltaNetForCausalLM
        torch.testing.assert_close(merged(x).logits, expected, atol=5e-5, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        loaded = DeltaNetForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(loaded(x).logits, merged(x).logits)

    resumed = trainer(
        tmp_path / "again", lora(DeltaNetForCausalLM.from_pretrained(tmp_path / "base")), data(4), max_steps=15
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert_same_weights(resumed.model, adapted)


@torch.no_grad()
def test_an_adapter_can_be_switched_off():
    """A preference trainer, whose reference is the model without its adapter, would compare the model with itself."""
    model, x = tiny_model(), tokens(2, 20)
    before = model(x).logits
    adapted = random_adapter(model)
    assert (adapted(x).logits - before).abs().max() > 0.1
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x).logits, before)


def test_lora_trains_under_gradient_checkpointing():
    """The usual way to fine-tune on a small GPU would give the adapters no gradient: the inputs need none."""
    x, gradients = tokens(2, 20), []
    for checkpointing in (False, True):
        model = random_adapter(tiny_model(**GATED)).train()
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable()
        gradients.append(output_and_gradients(model, input_ids=x, labels=x, use_cache=None)[1])
    for name, gradient in gradients[0].items():
        assert "lora_" in name
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize(
    "other, words",
    [
        (
            lambda: tiny_llama(),
            ["another architecture", "model.layers.0 is a linear_attention layer", "self_attn.q_proj"],
        ),
        (
            lambda: tiny_llama(hidden_size=64),
            ["another architecture", "model.layers.0 is a linear_attention layer", "self_attn.q_proj"],
        ),
        (
            lambda: tiny_model(layer_types=[FULL, LINEAR, FULL, LINEAR]),
            ["model.layers.1 is a sliding_attention layer"],
        ),
        (lambda: tiny_model(hidden_size=64), ["size mismatch", "[4, 64]", "[4, 32]"]),
    ],
    ids=["llama", "wider_llama", "other_layer_types", "other_width"],
)
def test_an_adapter_for_another_architecture_is_one_clear_error(tmp_path, other, words):
    """Some layers would get an adapter's weights, the others none, and all that is seen is a warning."""
    lora(other(), target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError) as error:
        PeftModel.from_pretrained(tiny_model(), tmp_path)
    for word in words:
        assert word in str(error.value)


def test_an_adapter_for_modules_that_do_not_exist_is_one_clear_error(tmp_path):
    """An adapter that fits nowhere would load."""
    lora(tiny_model(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["c_attn"]}))
    with pytest.raises(ValueError, match="c_attn.*not found"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)
