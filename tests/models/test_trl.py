"""TRL's trainers, started as its documentation starts them: with a folder's name, or a model and no reference."""

import pytest
from datasets import Dataset
from test_packing import arguments
from tiny import LINEAR, tiny_model, tiny_tokenizer, words
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from modeling_deltanet import DeltaNetForCausalLM, DeltaNetForSequenceClassification


CONFIGS = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig, RewardTrainer: RewardConfig}
PREFERENCES = {
    "prompt": [words(3, seed=i) for i in range(4)],
    "chosen": [" " + words(4, seed=10 + i) for i in range(4)],
    "rejected": [" " + words(5, seed=20 + i) for i in range(4)],
}
TEXTS = {"text": [words(6, seed=i) for i in range(4)]}


def folder(path, cls=DeltaNetForCausalLM):
    model = tiny_model(cls, layer_types=[LINEAR, LINEAR], **({} if cls is DeltaNetForCausalLM else {"num_labels": 1}))
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def train(trainer_class, path, model, data, **fields):
    config = CONFIGS[trainer_class](
        **arguments(path, max_steps=1, per_device_train_batch_size=2, bf16=False, max_length=32, **fields)
    )
    trainer = trainer_class(
        model=model, args=config, train_dataset=Dataset.from_dict(data), processing_class=tiny_tokenizer()
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not p.equal(before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("trainer_class, data", [(SFTTrainer, TEXTS), (DPOTrainer, PREFERENCES)], ids=["sft", "dpo"])
def test_training_from_a_folder(tmp_path, trainer_class, data):
    """`SFTTrainer("folder")` and `DPOTrainer("folder")` would end with an AttributeError."""
    train(trainer_class, tmp_path / "run", folder(tmp_path / "model"), data)


def test_a_reference_model_is_loaded(tmp_path):
    """DPO without a reference model loads the model a second time, from where it came."""
    model = DeltaNetForCausalLM.from_pretrained(folder(tmp_path / "model"))
    train(DPOTrainer, tmp_path / "run", model, PREFERENCES)


def test_a_reward_model(tmp_path):
    """A classifier could not be trained on preferences."""
    pairs = {name: PREFERENCES[name] for name in ("chosen", "rejected")}
    train(RewardTrainer, tmp_path / "run", folder(tmp_path / "model", DeltaNetForSequenceClassification), pairs)


def test_reinforcement_learning(tmp_path):
    """GRPO, which generates between two steps, could not start from a folder."""
    config = GRPOConfig(
        **arguments(tmp_path / "run", max_steps=1, per_device_train_batch_size=4, bf16=False),
        num_generations=4,
        max_completion_length=6,
    )
    trainer = GRPOTrainer(
        model=folder(tmp_path / "model"),
        reward_funcs=lambda completions, **kwargs: [float(len(set(text.split()))) for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PREFERENCES["prompt"]}),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 1
