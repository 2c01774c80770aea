"""The first stage after a conversion: each new mixer learns to give what the teacher's attention gives, alone.

The mixer of layer i sees the teacher's own input of attention i and learns its output by mean squared error. No
gradient leaves a mixer, so that all layers learn in parallel, and errors of one layer do not spoil the inputs of the
next.
"""

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .stage import Stage, StageTrainer, compile_layers


def remember(attention: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
    """A hook that leaves at an attention what it was given and what it gave.

    One function for all layers: with one of its own, each would be compiled for itself.
    """
    attention.seen = kwargs["hidden_states"], kwargs["position_embeddings"], output[0]


class LayerwiseAlignment(nn.Module):
    """The student's linear mixers as a module of its own, and the loss on the teacher's attention.

    Only the mixers are its parameters, so that Trainer moves, wraps and saves no more than what is trained.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel):
        super().__init__()
        self.mixers = nn.ModuleDict(
            {
                str(i): layer.linear_attn
                for i, layer in enumerate(student.model.layers)
                if layer.layer_type == "linear_attention"
            }
        )
        if not self.mixers:
            raise ValueError("the student keeps softmax attention in every layer: there is nothing to align")
        self.teacher = [teacher.model]  # in a list, and so no submodule
        self.is_activation_checkpointing = False
        for layer in teacher.model.layers:  # all of them: compiled layers are not told apart by their hooks
            layer.self_attn.register_forward_hook(remember, with_kwargs=True)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """What Trainer calls for `activation_checkpointing`: backward computes each mixer again."""
        self.is_activation_checkpointing = True

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The mean over layers of squared error over the square of what was wanted: 1 for a mixer that gives nothing.

        `labels` and `shift_labels` come with every block of text and are not used.
        """
        with torch.no_grad():
            self.teacher[0](input_ids, use_cache=False)
        seen = [vars(layer.self_attn).pop("seen") for layer in self.teacher[0].layers]
        losses = []
        for i, mixer in self.mixers.items():
            hidden_states, position_embeddings, wanted = seen[int(i)]
            if self.is_activation_checkpointing and self.training:
                got = checkpoint(mixer, hidden_states, position_embeddings=position_embeddings, use_reentrant=False)
            else:
                got = mixer(hidden_states, position_embeddings=position_embeddings)
            losses.append((got - wanted).float().square().mean() / wanted.float().square().mean())
        return {"loss": torch.stack(losses).mean()}


def align(stage: Stage) -> dict:
    """Run the alignment stage; see `Stage` for its settings and `Stage.run` for what comes back.

    Raises:
        ValueError: what `Stage.run` refuses, or a student without linear layers.
    """

    def make_trainer(teacher, student, trainer_arguments):
        alignment = LayerwiseAlignment(teacher, student)
        if stage.compile:
            compile_layers(alignment.mixers.values(), teacher.model.layers)
        trainer = StageTrainer(model=alignment, **trainer_arguments)
        teacher.to(trainer.args.device)
        return trainer

    return stage.run("align", make_trainer)
