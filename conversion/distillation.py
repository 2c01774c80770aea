"""The second stage after a conversion: the whole student learns the teacher's next-token distributions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Trainer

from .stage import Stage


@dataclass(frozen=True)
class Distillation(Stage):
    """A `Stage` whose `learning_rate` is that of all parameters but the new mixers'.

    Args:
        learning_rate: for what the teacher brought; the published recipe's by default, or LoRA's with `lora_rank`.
        mixer_learning_rate: for the linear layers' mixers, which have more to learn.
        lora_rank: train LoRA adapters of this rank on every projection, with `mixer_learning_rate`, and merge them at
            the end; by default all parameters are trained.
        completion_only: of chats, and of prompts with completions, learn the answers only.
    """

    learning_rate: float = 1e-5
    mixer_learning_rate: float = 1e-4
    lora_rank: int | None = None
    completion_only: bool = False


class DistillationTrainer(Trainer):
    """Trainer on KL(teacher || student), the mean in nats over the tokens that the student learns to predict."""

    def __init__(self, teacher: PreTrainedModel, **kwargs):
        super().__init__(**kwargs)
        self.teacher = teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = True  # the loss is divided by `num_items_in_batch`

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        with torch.no_grad():
            wanted = self.teacher(inputs["input_ids"], use_cache=False).logits
        learned = inputs["shift_labels"] != -100
        loss = F.kl_div(
            F.log_softmax(outputs.logits[learned].float(), dim=-1),
            F.log_softmax(wanted[learned].float(), dim=-1),
            reduction="sum",
            log_target=True,
        )
        # Trainer counts what is learned in all batches of the step on all processes, whose gradients it averages.
        loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def distill(stage: Distillation) -> dict:
    """Run the distillation stage; see `Distillation` for its settings and `Stage.run` for what comes back.

    Raises:
        ValueError: what `Stage.run` refuses.
    """

    def make_trainer(teacher, student, trainer_arguments):
        if stage.lora_rank is None:
            model, groups = student, _by_learning_rate(student, stage)
        else:
            lora = LoraConfig(task_type="CAUSAL_LM", r=stage.lora_rank, lora_alpha=2 * stage.lora_rank)
            model = get_peft_model(student, lora)
            trained = [p for p in model.parameters() if p.requires_grad]
            groups = [{"params": trained, "lr": stage.mixer_learning_rate}]
        optimizer = torch.optim.AdamW(groups, eps=trainer_arguments["args"].adam_epsilon, weight_decay=0.0)
        return DistillationTrainer(teacher, model=model, optimizers=(optimizer, None), **trainer_arguments)

    def merged(trainer):
        return trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()

    return stage.run("distill", make_trainer, None if stage.lora_rank is None else merged)


def _by_learning_rate(student: PreTrainedModel, stage: Distillation) -> list[dict]:
    mixers = [p for name, p in student.named_parameters() if ".linear_attn." in name]
    rest = [p for name, p in student.named_parameters() if ".linear_attn." not in name]
    return [{"params": rest, "lr": stage.learning_rate}, {"params": mixers, "lr": stage.mixer_learning_rate}]
