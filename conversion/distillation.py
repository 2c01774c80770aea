"""The second stage after a conversion: the whole student learns the teacher's next-token distributions."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM

from .llama import OPEN_DT_BIAS
from .stage import Stage, StageTrainer, compile_layers


# What a stage can leave as it is: a part's name -> what its parameters' names hold.
PARTS = {
    "embeddings": ("embed_tokens.", "lm_head."),
    "mlp": (".mlp.",),
    "attention": (".self_attn.",),
    "norms": ("layernorm.", "model.norm."),
}
CHUNK = 1024  # tokens whose distributions are compared at a time: 0.2 GB for each of 49152 words, in fp32


@dataclass(frozen=True)
class Distillation(Stage):
    """A `Stage` whose `learning_rate` is that of all parameters but the new mixers'.

    Args:
        learning_rate: for what the teacher brought; the published recipe's by default, or LoRA's with `lora_rank`.
        mixer_learning_rate: for the linear layers' mixers, which have more to learn.
        lora_rank: train LoRA adapters of this rank on every projection, with `mixer_learning_rate`, and merge them at
            the end; by default all parameters are trained.
        completion_only: of chats, and of prompts with completions, learn the answers only.
        freeze: parts that stay as they are, of "embeddings" (and the head), "mlp", "attention" (of kept layers) and
            "norms".
        linear_decay: give the linear layers a decay (Gated DeltaNet), for a stage on long texts. It starts open: the
            student begins as it was.
    """

    learning_rate: float = 1e-5
    mixer_learning_rate: float = 1e-4
    lora_rank: int | None = None
    completion_only: bool = False
    freeze: tuple[str, ...] = ()
    linear_decay: bool = False

    def _prepared(self, student: DeltaNetForCausalLM) -> DeltaNetForCausalLM:
        if unknown := set(self.freeze) - PARTS.keys():
            raise ValueError(f"freeze takes {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
        if self.freeze and self.lora_rank is not None:
            raise ValueError("freeze and lora_rank were given: LoRA trains its own matrices and leaves all else")
        if self.linear_decay:
            student = with_open_decay(student)
        patterns = [pattern for part in self.freeze for pattern in PARTS[part]]
        for name, parameter in student.named_parameters():
            if any(pattern in name for pattern in patterns):
                parameter.requires_grad_(False)
        return student


@torch.no_grad()
def with_open_decay(student: DeltaNetForCausalLM) -> DeltaNetForCausalLM:
    """The same model with a decay in its linear layers that lets everything through.

    Raises:
        ValueError: there is no linear layer, or the decay is there already.
    """
    if student.config.linear_use_decay or "linear_attention" not in student.config.layer_types:
        why = "has one already" if student.config.linear_use_decay else "has no linear layer"
        raise ValueError(f"linear_decay adds a decay to the student's linear layers, and the student {why}")
    config = DeltaNetConfig.from_dict(student.config.to_dict() | {"linear_use_decay": True})
    gated = DeltaNetForCausalLM(config)
    gated.generation_config = student.generation_config
    for name in gated.load_state_dict(student.state_dict(), strict=False).missing_keys:
        gated.get_parameter(name).fill_(OPEN_DT_BIAS if name.endswith("dt_bias") else 0.0)
    return gated


class KLDivergence(torch.autograd.Function):
    """KL(teacher || student) in nats, summed over the learned ones of `N` tokens, from logits `[N, V]`.

    Its gradient is the difference of the two distributions, and is made with it, `CHUNK` tokens at a time: in fp32 and
    for all tokens at once, what autograd keeps is several times as large as the logits. Given a compiled `_compare`,
    which writes nothing else as large as the logits, all tokens are compared at once.
    """

    @staticmethod
    def forward(ctx, logits, wanted, learned, compiled=None):
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        compare, size = (_compare, CHUNK) if compiled is None else (compiled, len(logits))
        total = 0
        for start in range(0, len(logits), size):
            part = slice(start, start + size)
            total += compare(logits[part], wanted[part], learned[part], None if gradient is None else gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total):
        (gradient,) = ctx.saved_tensors
        return gradient * d_total, None, None, None


def _compare(
    logits: torch.Tensor, wanted: torch.Tensor, learned: torch.Tensor, gradient: torch.Tensor | None
) -> torch.Tensor:
    """The divergence of some tokens; its gradient is written into `gradient`, if there is one."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_q, log_p = (x.log_softmax(-1, dtype=dtype) for x in (logits, wanted))
    p = log_p.exp()
    total = (log_p.sub_(log_q).mul_(p).sum(-1) * learned).sum()
    if gradient is not None:
        gradient.copy_(log_q.exp_().sub_(p).mul_(learned.unsqueeze(-1)))
    return total


class DistillationTrainer(StageTrainer):
    """Trainer on KL(teacher || student), the mean in nats over the tokens that the student learns to predict."""

    def __init__(self, teacher: PreTrainedModel, **kwargs):
        super().__init__(**kwargs)
        self.teacher = teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = True  # the loss is divided by `num_items_in_batch`
        self.compare = torch.compile(_compare, dynamic=False) if self.compiled else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        with torch.no_grad():
            wanted = self.teacher(inputs["input_ids"], use_cache=False).logits
        learned = inputs["shift_labels"] != -100
        compare = self.compare if model.training and self.is_full(inputs) else None
        loss = KLDivergence.apply(outputs.logits.flatten(0, 1), wanted.flatten(0, 1), learned.flatten(), compare)
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
        if stage.compile:
            compile_layers(student.model.layers, teacher.model.layers)
        epsilon = trainer_arguments["args"].adam_epsilon
        optimizer = torch.optim.AdamW(groups, eps=epsilon, weight_decay=0.0, fused=True)
        return DistillationTrainer(teacher, model=model, optimizers=(optimizer, None), **trainer_arguments)

    def merged(trainer):
        return trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()

    return stage.run("distill", make_trainer, None if stage.lora_rank is None else merged)


def _by_learning_rate(student: PreTrainedModel, stage: Distillation) -> list[dict]:
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    mixers = [p for name, p in trained if ".linear_attn." in name]
    rest = [p for name, p in trained if ".linear_attn." not in name]
    return [{"params": rest, "lr": stage.learning_rate}, {"params": mixers, "lr": stage.mixer_learning_rate}]
