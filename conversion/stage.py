"""What alignment and distillation share: teacher, student and text, Trainer's arguments, resuming, and the result.

A stage works in the folder `OUTPUT.training`, where Trainer's checkpoints lie, and makes `OUTPUT` when it is done. The
same call goes on from the last checkpoint; without one, a stage that fails leaves nothing.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM

from .checkpoint import FACTS, check_new, copy_tokenizer, fetch, load_tokenizer, new_folder
from .files import own_file, public_name, read_json
from .interrupt import SaveOnInterrupt, Stopped, last_checkpoint, parting_at_the_end
from .text import blocks, load_text


HELD_OUT = 0.02  # of the blocks, at most 64, never trained on
SETTINGS = "settings.json"
# What a run may go on with otherwise than it began: none of it changes what is learned.
FREE_SETTINGS = ("save_steps", "activation_checkpointing", "report_to", "device", "keep_training", "compile")
OPEN_DECAY_EPSILON = 1e-15  # of Adam, to which the gradient of a decay that starts open would be nothing beside 1e-8


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
        precision: what both models compute in; bfloat16 on a GPU by default, otherwise float32. What is trained stays
            in float32.
        activation_checkpointing: backward computes each layer again instead of keeping what it needs of it.
        report_to: where Trainer reports to ("tensorboard", "wandb", "trackio", ...), beside its log. TensorBoard's
            curves come to lie in `OUTPUT.runs`.
        device: "cuda" or "cpu"; a GPU by default, and of several the first. For all of them, start the command line
            with `accelerate launch -m deltanet_conversion.cli`.
        keep_training: leave the folder `OUTPUT.training`.
        compile: compile the layers of teacher and student with torch.compile, which fuses what lies between the matrix
            products. It costs seconds on a GPU, minutes on a CPU, and pays off in stages that are longer than that.
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
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    activation_checkpointing: bool = False
    report_to: str = "none"
    device: Literal["cuda", "cpu"] | None = None
    keep_training: bool = False
    compile: bool = False

    completion_only = False  # a setting of distillation; an alignment learns from every token

    def run(self, name: str, make_trainer: Callable, finish: Callable | None = None) -> dict:
        """Train what `make_trainer(teacher, student, trainer_arguments)` returns and save the student.

        `finish(trainer)` returns the student to save where that is not the model that came. Returns a summary:
        settings, steps, tokens, seconds, loss on held-out text before and after. It joins the facts in
        `conversion.json`, and Trainer's log lies beside it.

        Raises:
            ValueError: the output is there already, a folder of another run is in the way, teacher and student do not
                fit together, there is too little text, or nothing to compile with.
        """
        output, work = Path(self.output), Path(f"{self.output}.training")
        check_new(output)
        self._check_work(work, name)
        self._check_report_to()
        on_gpu = self._uses_gpu()
        try:
            with parting_at_the_end():
                return self._run(name, make_trainer, finish, output, work, on_gpu)
        except BaseException:
            if work.exists() and last_checkpoint(work) is None:
                shutil.rmtree(work, ignore_errors=True)  # nothing to go on from
            raise

    def _run(
        self, name: str, make_trainer: Callable, finish: Callable | None, output: Path, work: Path, on_gpu: bool
    ) -> dict:
        set_seed(self.seed)
        start = time.perf_counter()

        teacher_folder, student_folder = fetch(self.teacher), fetch(self.student)
        precision = self.precision or ("bfloat16" if on_gpu else "float32")
        teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=getattr(torch, precision))
        student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
        saved_dtype = getattr(torch, student_dtype(student_folder))
        _check_pair(teacher, student)
        student = self._prepared(student)
        tokenizer = load_tokenizer(student_folder)
        # Without the folder's name, so that `datasets` finds the rows that another stage made with this tokenizer.
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = ""
        documents = load_text(
            list(self.data), self.text_column, tokenizer=tokenizer, completion_only=self.completion_only
        )
        text = blocks(documents, tokenizer, self.length, self.seed).with_format("torch")
        held_out = max(1, min(64, int(len(text) * HELD_OUT)))
        if len(text) <= held_out:
            raise ValueError(
                f"{', '.join(self.data)} gives {len(text)} block of {self.length} tokens: too little to train on"
            )
        trainer_arguments = {
            "args": self._training_arguments(work, on_gpu, precision, student.config),
            "train_dataset": text.select(range(held_out, len(text))),
            "eval_dataset": text.select(range(held_out)),
            "callbacks": [SaveOnInterrupt()],
            "precision": precision,
            "compiled": self.compile,
        }
        trainer = make_trainer(teacher.eval().requires_grad_(False), student, trainer_arguments)
        tokens_a_step = self._tokens_a_step(trainer.args.world_size)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(TokenBar(tokens_a_step))
        pace = Pace()
        trainer.add_callback(pace)
        self._claim(work, name)
        checkpoint = last_checkpoint(work)
        # Not by `trainer.evaluate()` first: accelerate takes a model that was evaluated for one that is prepared, and
        # several processes would not exchange gradients (in 1.15).
        trainer.args.eval_on_start = checkpoint is None
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step < trainer.args.max_steps:
            raise Stopped(f"stopped at step {trainer.state.global_step}; the same command goes on from there")

        summary = {
            **dataclasses.asdict(self)
            | {"data": [public_name(source) for source in self.data], "precision": precision},
            "steps": trainer.state.global_step,
            "trained_tokens": trainer.state.global_step * tokens_a_step,
            "loss_before": next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log),
            "loss_after": trainer.evaluate()["eval_loss"],
            "seconds": round(time.perf_counter() - start, 1),
            "tokens_per_second": round(pace.steps_per_second() * tokens_a_step),
            "resumed": checkpoint is not None,
        }
        if trainer.is_world_process_zero():
            student = student if finish is None else finish(trainer)
            with new_folder(output) as folder:
                student.to(saved_dtype).save_pretrained(folder)
                copy_tokenizer(student_folder, folder)
                (folder / FACTS).write_text(json.dumps(self._facts(student_folder, name, summary), indent=2) + "\n")
                trainer.state.save_to_json(str(folder / "trainer_state.json"))
            if not self.keep_training:
                if (work / "runs").exists():
                    shutil.copytree(work / "runs", f"{output}.runs", dirs_exist_ok=True)
                shutil.rmtree(work)
        return summary

    def _facts(self, student_folder: Path, name: str, summary: dict) -> dict:
        """What the student's `conversion.json` says, and this stage: nothing that names a local folder."""
        file = student_folder / FACTS
        is_converted = os.path.lexists(file)
        facts = read_json(own_file(student_folder, FACTS)) if is_converted else {"teacher": public_name(self.teacher)}
        again = sum(key == name or key.startswith(f"{name}_") for key in facts)
        name = f"{name}_{again + 1}" if again else name  # a second distillation, such as one on longer texts
        local = ("teacher", "student", "output", "resumed", *FREE_SETTINGS)
        return facts | {name: {key: value for key, value in summary.items() if key not in local}}

    def _prepared(self, student: DeltaNetForCausalLM) -> DeltaNetForCausalLM:
        """The student to train, of the one that came."""
        return student

    def _settings(self, name: str) -> dict:
        """What a run must have been started with for this one to go on with it, as JSON tells it."""
        mine = {key: value for key, value in dataclasses.asdict(self).items() if key not in FREE_SETTINGS}
        return json.loads(json.dumps({"stage": name} | mine))

    def _check_work(self, work: Path, name: str) -> None:
        """See that the work folder is not there, or holds this very run, or one that has nothing to go on from."""
        if not (work / SETTINGS).exists():
            check_new(work)
        elif last_checkpoint(work) is not None:
            theirs, mine = read_json(work / SETTINGS), self._settings(name)
            other = [
                f"{key} {theirs.get(key)!r} instead of {mine.get(key)!r}"
                for key in {**theirs, **mine}
                if theirs.get(key) != mine.get(key)
            ]
            if other:
                raise ValueError(
                    f"{work} holds a run with other settings ({', '.join(other)}): remove it, or name another output"
                )

    def _claim(self, work: Path, name: str) -> None:
        work.mkdir(parents=True, exist_ok=True)
        (work / SETTINGS).write_text(json.dumps(self._settings(name), indent=2))

    def _check_report_to(self) -> None:
        get_reporting_integration_callbacks(self.report_to)  # knows all names
        installed = get_available_reporting_integrations()
        if self.report_to not in ("none", "all", *installed):
            raise ValueError(
                f"report_to is {self.report_to!r}, which is not installed here (pip install it); "
                f"installed: {', '.join(installed) or 'none'}"
            )

    def _uses_gpu(self) -> bool:
        """Whether the stage runs on a GPU, after a look at what was asked for."""
        has_gpu = torch.cuda.is_available()
        if self.device not in (None, "cuda", "cpu"):
            raise ValueError(f"device must be 'cuda' or 'cpu', got {self.device!r} (CUDA_VISIBLE_DEVICES chooses one)")
        if self.device == "cuda" and not has_gpu:
            raise ValueError("device is 'cuda', but torch finds no GPU here")
        on_gpu = has_gpu and self.device != "cpu"
        if self.precision not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"precision must be 'float32', 'bfloat16' or 'float16', got {self.precision!r}")
        if self.precision == "float16" and not on_gpu:
            raise ValueError("precision 'float16' needs a GPU: on a CPU take 'bfloat16' or 'float32'")
        if self.compile:
            check_compiler(on_gpu)
        return on_gpu

    def _tokens_a_step(self, processes: int) -> int:
        return self.length * self.batch_size * self.accumulation * processes

    def _training_arguments(
        self, work: Path, on_gpu: bool, precision: str, config: DeltaNetConfig
    ) -> TrainingArguments:
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
            fp16=precision == "float16",  # for bfloat16, see `StageTrainer`
            activation_checkpointing=self.activation_checkpointing,
            ddp_find_unused_parameters=False,  # there are none
            label_names=["labels"],
            report_to=self.report_to,
            seed=self.seed,
            dataloader_pin_memory=on_gpu,
            use_cpu=not on_gpu,
            # A GPU would stand still at each step, for a batch on its way and for a look whether the loss is NaN.
            accelerator_config={"non_blocking": on_gpu},
            logging_nan_inf_filter=False,
        )
        if args.n_gpu > 1:  # one process would spread batches over all GPUs, where the teacher is not
            args._n_gpu = 1
        if config.linear_use_decay:
            args.adam_epsilon = OPEN_DECAY_EPSILON
        args.max_steps = math.ceil(self.tokens / self._tokens_a_step(args.world_size))
        args.warmup_steps = args.max_steps // 20
        args.logging_steps = max(1, args.max_steps // 50)
        args.save_steps = self.save_steps or max(1, args.max_steps // 10)
        return args


class StageTrainer(Trainer):
    """Trainer on blocks of one length.

    bfloat16's autocast surrounds the loss as well: accelerate's ends with the model, and copies all logits to fp32.
    Compiled code runs on full batches of training; of others there are few, and each size would be compiled anew.
    (Not by Trainer's own `torch_compile`: it turns on TF32 for the whole process, and compiles a model whole, thirty
    layers one after the other and with an attention mask written out, in torch 2.13 and earlier.)
    """

    def __init__(self, precision: str, compiled: bool, **kwargs):
        super().__init__(**kwargs)
        self.precision, self.compiled = precision, compiled

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        if self.precision == "bfloat16":
            return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=cache_enabled)
        return super().autocast_smart_context_manager(cache_enabled)

    def is_full(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether the batch has the size that compiled code is for."""
        return len(inputs["input_ids"]) == self.args.per_device_train_batch_size

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._stance(self.is_full(inputs)):
            return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model, inputs, *args, **kwargs):
        with self._stance(False):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def _stance(self, compiled: bool) -> AbstractContextManager:
        if compiled or not self.compiled:  # what imports the compiler is called where it is used
            return nullcontext()
        return torch.compiler.set_stance("force_eager")


def compile_layers(students: Iterable[nn.Module], teachers: Iterable[nn.Module]) -> None:
    """Compile each layer, in place and when it is first called. Those of one kind share what is compiled.

    A teacher may be of any architecture: its layers may fall into several graphs.
    """
    torch._dynamo.reset()  # an earlier stage's layers are not told apart from these by their hooks
    for layer in students:
        layer.compile(fullgraph=True, dynamic=False)
    for layer in teachers:
        layer.compile(dynamic=False)


def check_compiler(on_gpu: bool) -> None:
    """See that torch.compile finds what it writes its code for."""
    if on_gpu:
        found, wanted = find_spec("triton"), "the package triton on a GPU"
    else:
        names = os.environ.get("CXX", "").split()[:1] or ["g++", "clang++"]
        found = any(shutil.which(name) for name in names)
        wanted = "a C++ compiler on a CPU (g++, clang++, or what CXX names)"
    if not found:
        raise ValueError(f"compile needs {wanted}, and there is none here")


class TokenBar(ProgressCallback):
    """Trainer's bar in tokens: it says how many a second, and how long it will take."""

    def __init__(self, tokens_a_step: int):
        super().__init__()
        self.tokens_a_step = tokens_a_step

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps * self.tokens_a_step, initial=state.global_step * self.tokens_a_step,
                unit="tok", unit_scale=True, dynamic_ncols=True,
            )  # fmt: skip
        self.current_step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar.update((state.global_step - self.current_step) * self.tokens_a_step)
            self.current_step = state.global_step


class Pace(TrainerCallback):
    """How fast a training goes, without its first step, which compiles kernels."""

    def __init__(self):
        self.steps, self.times = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps[1:], self.times[1:] = [state.global_step], [time.perf_counter()]

    def steps_per_second(self) -> float:
        """Of this call; 0 where it trained fewer than two steps."""
        steps, seconds = self.steps[-1] - self.steps[0], self.times[-1] - self.times[0]
        return steps / seconds if steps else 0.0


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
