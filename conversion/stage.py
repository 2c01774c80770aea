"""What alignment and distillation share: teacher, student and text, Trainer's arguments, resuming, and the result.

A stage works in the folder `OUTPUT.training`, where Trainer's checkpoints lie, and makes `OUTPUT` when it is done. The
same call goes on from the last checkpoint.
"""

import dataclasses
import glob
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM

from .checkpoint import FACTS, copy_tokenizer, fetch, new_folder
from .files import own_file, read_json
from .interrupt import SaveOnInterrupt
from .text import blocks, load_text


HELD_OUT = 0.02  # of the blocks, at most 64, never trained on
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Stage:
    """One training stage: teacher, student (a converted folder) and output, the text, and how much of it.

    Args:
        teacher, student: local folders or names on the Hub.
        output: the folder to make.
        data: what to train on, see `load_text`.
        tokens: how many tokens to train on; text that is shorter is read again.
        length: tokens per block.
        batch_size: blocks per step and device.
        accumulation: batches per step.
        learning_rate: its peak; a twentieth of the steps to rise, a cosine to fall.
        save_steps: steps between checkpoints, a tenth of the stage by default.
    """

    teacher: str
    student: str
    output: str
    data: tuple[str, ...]
    tokens: int
    length: int = 512
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    seed: int = 0
    text_column: str = "text"
    save_steps: int | None = None

    def run(self, name: str, make_trainer: Callable, finish: Callable | None = None) -> dict:
        """Train what `make_trainer(teacher, student, trainer_arguments)` returns and save the student.

        `finish(trainer)` returns the student to save where that is not the model that came. Returns a summary:
        settings, steps, tokens, seconds, loss on held-out text before and after. It joins the facts in
        `conversion.json`, and Trainer's log lies beside it.

        Raises:
            ValueError: the output is there already, a folder of another run is in the way, or teacher and student do
                not fit together.
        """
        output, work = Path(self.output), Path(f"{self.output}.training")
        if output.exists():
            raise ValueError(f"{output} is there already: name another output, or remove it")
        self._claim(work, name)
        set_seed(self.seed)
        start = time.perf_counter()

        teacher_folder, student_folder = fetch(self.teacher), fetch(self.student)
        on_gpu = torch.cuda.is_available()
        teacher = AutoModelForCausalLM.from_pretrained(
            teacher_folder, dtype=torch.bfloat16 if on_gpu else torch.float32
        )
        student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
        saved_dtype = getattr(torch, student_dtype(student_folder))
        _check_pair(teacher, student)
        tokenizer = AutoTokenizer.from_pretrained(student_folder)
        text = blocks(load_text(list(self.data), self.text_column), tokenizer, self.length, self.seed)
        held_out = max(1, min(64, int(len(text) * HELD_OUT)))
        if len(text) <= held_out:
            raise ValueError(
                f"{', '.join(self.data)} gives {len(text)} block of {self.length} tokens: too little to train on"
            )
        trainer_arguments = {
            "args": self._training_arguments(work, on_gpu),
            "train_dataset": text.select(range(held_out, len(text))),
            "eval_dataset": text.select(range(held_out)),
            "callbacks": [SaveOnInterrupt()],
        }
        trainer = make_trainer(teacher.eval().requires_grad_(False), student, trainer_arguments)
        before = self._loss_before(trainer, work)
        checkpoint = get_last_checkpoint(str(work))
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step < trainer.args.max_steps:
            raise KeyboardInterrupt(
                f"stopped at step {trainer.state.global_step}; the same command goes on from there"
            )

        summary = {
            **dataclasses.asdict(self) | {"data": [_public(source) for source in self.data]},
            "steps": trainer.state.global_step,
            "trained_tokens": trainer.state.global_step * self._tokens_a_step(trainer.args.world_size),
            "loss_before": before,
            "loss_after": trainer.evaluate()["eval_loss"],
            "seconds": round(time.perf_counter() - start, 1),
            "resumed": checkpoint is not None,
        }
        if trainer.is_world_process_zero():
            student = student if finish is None else finish(trainer)
            with new_folder(output) as folder:
                student.to(saved_dtype).save_pretrained(folder)
                copy_tokenizer(student_folder, folder)
                (folder / FACTS).write_text(json.dumps(self._facts(student_folder, name, summary), indent=2) + "\n")
                trainer.state.save_to_json(str(folder / "trainer_state.json"))
        return summary

    def _facts(self, student_folder: Path, name: str, summary: dict) -> dict:
        """What the student's `conversion.json` says, and this stage: nothing that names a local folder."""
        file = student_folder / FACTS
        facts = (
            read_json(own_file(student_folder, FACTS)) if os.path.lexists(file) else {"teacher": _public(self.teacher)}
        )
        local = ("teacher", "student", "output", "save_steps", "resumed")
        return facts | {name: {key: value for key, value in summary.items() if key not in local}}

    def _claim(self, work: Path, name: str) -> None:
        """Make the work folder, or see that it holds this very run."""
        settings = json.dumps({"stage": name, **dataclasses.asdict(self)}, indent=2)
        file = work / SETTINGS
        if file.exists() and file.read_text() != settings:
            raise ValueError(
                f"{work} holds a run with other settings; remove it, or name another output. Its settings: "
                f"{file.read_text()}"
            )
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(settings)

    def _tokens_a_step(self, processes: int) -> int:
        return self.length * self.batch_size * self.accumulation * processes

    def _training_arguments(self, work: Path, on_gpu: bool) -> TrainingArguments:
        args = TrainingArguments(
            output_dir=str(work),
            max_steps=1,
            learning_rate=self.learning_rate,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            save_total_limit=1,
            prediction_loss_only=True,
            remove_unused_columns=False,
            bf16=on_gpu,
            report_to="none",
            seed=self.seed,
            dataloader_pin_memory=on_gpu,
        )
        args.max_steps = math.ceil(self.tokens / self._tokens_a_step(args.world_size))
        args.warmup_steps = args.max_steps // 20
        args.logging_steps = max(1, args.max_steps // 50)
        args.save_steps = self.save_steps or max(1, args.max_steps // 10)
        return args

    @staticmethod
    def _loss_before(trainer: Trainer, work: Path) -> float:
        """The held-out loss of the student that came, kept for the case that the run is resumed."""
        file = work / "loss_before.json"
        if not file.exists():
            loss = trainer.evaluate()["eval_loss"]
            if trainer.is_world_process_zero():
                file.write_text(json.dumps(loss))
            return loss
        return json.loads(file.read_text())


def _public(source: str) -> str:
    """A source's name without the folders that it lies in on this machine."""
    return Path(source).name if Path(source).exists() or glob.has_magic(source) else source


def student_dtype(folder: Path) -> str:
    """The dtype that a checkpoint's config names."""
    config = read_json(own_file(folder, "config.json"))
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def _check_pair(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    if not isinstance(student, DeltaNetForCausalLM):
        raise ValueError(f"the student must be a {DeltaNetConfig.model_type}, got {student.config.model_type!r}")
    for field in ("vocab_size", "hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(student.config, field), getattr(teacher.config, field)
        if ours != theirs:
            raise ValueError(
                f"the student has {field} {ours}, the teacher {theirs}: it was not converted from this teacher"
            )
