"""Packed training: whatever packs the documents, the model learns what it learns from each of them alone."""

import pytest
import torch
from datasets import Dataset
from tiny import FULL, LINEAR, SLIDING, output_and_gradients, tiny_model, tiny_tokenizer, tokens
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer


LENGTHS = [5, 1, 9, 2, 13]
LAYERS = {
    "linear": {"layer_types": [LINEAR] * 2},
    "linear, no convolution": {"layer_types": [LINEAR] * 2, "linear_conv_kernel_dim": None},
    "decay": {"layer_types": [LINEAR] * 2, "linear_use_decay": True},
    "sliding": {"layer_types": [SLIDING] * 2},
    "full": {"layer_types": [FULL] * 2},
    "hybrid": {},
}


def documents() -> list[list[int]]:
    return [tokens(length, seed=length).tolist() for length in LENGTHS]


def loss_and_gradients(model, batches, num_items):
    """Of a loss that is summed over `batches` and divided by the number of predicted tokens."""
    results = [output_and_gradients(model, **batch, num_items_in_batch=num_items) for batch in batches]
    loss = sum(output.loss.detach() for output, _ in results)
    return loss, {name: sum(gradients[name] for _, gradients in results) for name in results[0][1]}


@pytest.mark.parametrize("layers", LAYERS)
def test_packed_equals_padded_equals_single(layers):
    """Documents of one batch would teach each other, or padding would teach, in some type of layer."""
    # in fp32 rounding alone comes to 1e-5 where there is no convolution, more or less by the CPU
    model = tiny_model(**LAYERS[layers]).train().double()
    num_items = sum(length - 1 for length in LENGTHS)
    single = [{"input_ids": torch.tensor([d]), "labels": torch.tensor([d])} for d in documents() if len(d) > 1]
    packed = DataCollatorWithFlattening()([{"input_ids": d} for d in documents()])  # position_ids is all that it gives
    assert packed["input_ids"].shape == (1, sum(LENGTHS)) and "position_ids" in packed
    right = tiny_tokenizer().pad({"input_ids": documents()}, return_tensors="pt", padding_side="right")
    padded = {**right, "labels": right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)}
    # Tokens of the tests are random: none of them is the padding token.
    expected = loss_and_gradients(model, single, num_items)
    for batch in (packed, padded):
        loss, gradients = loss_and_gradients(model, [batch], num_items)
        torch.testing.assert_close(loss, expected[0], atol=1e-6, rtol=1e-6)
        for name, gradient in gradients.items():
            error = (gradient - expected[1][name]).norm() / expected[1][name].norm()
            assert error < 1e-6, f"{name}: {error}"


@pytest.mark.parametrize("layers", LAYERS)
def test_borders_may_repeat(layers):
    """Borders of a static shape, whose last ones repeat, would be refused where there is no GPU."""
    model = tiny_model(**LAYERS[layers]).double().eval()
    ids = torch.tensor([sum(documents(), [])])
    borders = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    padded = torch.cat((borders[:1], borders[:1], borders[1:3], borders[2:], borders[-1:], borders[-1:]))
    same, got = (model(input_ids=ids, cu_seq_lens_q=cu, use_cache=False).logits for cu in (borders, padded))
    torch.testing.assert_close(got, same, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="from 0 to T = 30"):
        tiny_model().double()(input_ids=ids, cu_seq_lens_q=borders[:-1], use_cache=False)


def trained(trainer) -> tuple[list[float], dict]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.model.state_dict()


def arguments(folder, **changes):
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def assert_same_training(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[0][-1] < one[0][0]
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_sft_trainer_packs(tmp_path):
    """TRL's packing would train on documents that run into each other."""
    results = []
    for packing in (False, True):
        config = SFTConfig(
            **arguments(tmp_path),
            packing=packing,
            max_length=16,
            per_device_train_batch_size=len(LENGTHS),
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = SFTTrainer(
            model=tiny_model(),
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": documents()}),
            processing_class=tiny_tokenizer(),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        # packed: rows of at most 16 tokens, in one row without padding; the borders are in position_ids
        assert tuple(batch["input_ids"].shape) == ((1, 30) if packing else (5, 13))
        results.append(trained(trainer))
    assert_same_training(*results)


def test_trainer_packs_with_the_flattening_collator(tmp_path):
    """Transformers' own way to pack would do the same."""
    data = Dataset.from_dict({"input_ids": documents(), "labels": documents()})
    results = []
    for batch_size, accumulation in ((5, 1), (1, 5)):  # packed; one document at a time
        trainer = Trainer(
            model=tiny_model(),
            args=TrainingArguments(
                **arguments(tmp_path),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
            ),
            train_dataset=data,
            data_collator=DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True),
        )
        results.append(trained(trainer))
    assert_same_training(*results)
