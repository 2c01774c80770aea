"""Trains a model on questions by Transformers' `Trainer`, and counts its right answers."""

import tempfile
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from tasks import NOT_ASKED, Questions
from transformers import Trainer, TrainerCallback, TrainingArguments


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, a cosine from `learning_rate` to 0 after a warm-up of a tenth."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.1
    enough: float = 1.1  # accuracy at which training stops early, looked at every `look` steps
    look: int = 250

    as_dict = asdict


class QuestionTrainer(Trainer):
    """`Trainer` with the loss of the answers alone, and logits at no other place."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = answer_logits(model, inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), inputs["answers"].flatten(), ignore_index=NOT_ASKED)


def answer_logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[B, A, vocabulary]`, in bf16 on a GPU (accelerate's autocast is around the model's own forward only)."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
        at = inputs["at"].unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return model.lm_head(hidden.gather(1, at))


@torch.no_grad()
def accuracy(model, questions: Questions, batch: int = 256) -> float:
    """The share of right answers."""
    model.eval()
    right = 0
    for start in range(0, len(questions), batch):
        inputs = questions.__getitems__(slice(start, start + batch))
        inputs = {name: x.to(model.device) for name, x in inputs.items()}
        right += (answer_logits(model, inputs).argmax(-1) == inputs["answers"]).sum().item()
    return right / (questions.answers != NOT_ASKED).sum().item()


class StopWhenRight(TrainerCallback):
    def __init__(self, questions: Questions, recipe: Recipe):
        self.questions, self.recipe = questions, recipe

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.recipe.look == 0:
            control.should_training_stop = accuracy(model, self.questions) >= self.recipe.enough
            model.train()


def fit(model, questions: Questions, recipe: Recipe, seed: int, held_out: Questions | None = None) -> dict:
    """Train, and return seconds and steps taken."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = QuestionTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=recipe.steps,
                per_device_train_batch_size=recipe.batch,
                learning_rate=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                lr_scheduler_type="cosine",
                warmup_steps=recipe.steps // 10,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                report_to="none",
                seed=seed,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=questions,
            data_collator=lambda batch: batch,  # made by __getitems__
            callbacks=[StopWhenRight(held_out, recipe)] if recipe.enough <= 1 else None,
        )
        start = time.perf_counter()
        trainer.train()
    return {"seconds": round(time.perf_counter() - start, 1), "steps": trainer.state.global_step}
