"""What the examples share: flags and input that are refused in a sentence, training that Ctrl-C cannot cost, a
tokenizer made from the text at hand.
"""

import quiet  # noqa: F401


# isort: split
import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import is_tensorboard_available

from deltanet_conversion.interrupt import Stopped, parting_at_the_end, train_or_resume


# Every message between the tokens that begin and end a text. What the assistant says is marked for trainers that learn
# nothing else (TRL's `assistant_only_loss`).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)
SETTINGS = "settings.json"


# -------------------------------------------------------------------------------- arguments


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and every flag with its default."""


class Parser(HfArgumentParser):
    """Flags from dataclasses. What is wrong is said in a sentence, without the usage of two hundred flags."""

    def __init__(self, *kinds: type, description: str):
        super().__init__(kinds, description=description, formatter_class=Help)

    def parse(self) -> tuple:
        *parsed, rest = self.parse_args_into_dataclasses(return_remaining_strings=True)
        if rest:
            known = [f"--{flag.name}" for kind in self.dataclass_types for flag in dataclasses.fields(kind)]
            close = difflib.get_close_matches(rest[0].split("=")[0], known, n=1)
            self.error(f"there is no {rest[0]}" + (f": did you mean {close[0]}?" if close else ""))
        return tuple(parsed)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


@contextmanager
def refusals(parser: argparse.ArgumentParser):
    """Within it, what comes from the user is read and checked: an error is his, and is told in a sentence."""
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        parser.error(" ".join(str(error).split()))


def check_setup(trainer_args: TrainingArguments) -> None:
    """Refuse what would fail only after the data has been read; warn of a launch that is not what it looks like."""
    if "tensorboard" in trainer_args.report_to and not is_tensorboard_available():
        raise ValueError("--report_to tensorboard needs TensorBoard: pip install '.[tensorboard]'")
    for name in ("logging_steps", "eval_steps", "save_steps"):  # a share, of which Trainer would warn when it resumes
        if 0 < (getattr(trainer_args, name) or 0) < 1 and trainer_args.max_steps > 0:
            setattr(trainer_args, name, max(1, math.ceil(getattr(trainer_args, name) * trainer_args.max_steps)))
    # What `accelerate launch` leaves in the environment for more than one process, and the count, which is missing
    # where it started only one.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        warnings.warn(
            "`accelerate launch` has started one process: without a GPU it takes no notice of --num_processes; "
            "`torchrun --nproc_per_node N` starts N",
            stacklevel=2,
        )


def load(auto_class, name: str, flag: str, **options):
    """`from_pretrained` of a name that came by a flag."""
    try:
        return auto_class.from_pretrained(name, **options)
    except OSError as error:
        reason = str(error) if Path(name).is_dir() else f"no such folder, and none from the Hub ({error})"
        raise ValueError(f"{flag} {name}: {reason}") from error


# -------------------------------------------------------------------------------- training


def check_run(folder: Path, settings: dict) -> None:
    """Refuse a folder that holds a run with other settings: from its checkpoint, another model would go on."""
    if not (folder / SETTINGS).exists():
        return
    there = json.loads((folder / SETTINGS).read_text())
    here = json.loads(json.dumps(settings, default=str))
    if other := [f"{name} {there.get(name)!r}, not {x!r}" for name, x in here.items() if there.get(name) != x]:
        raise ValueError(f"{folder} holds a run with other settings ({'; '.join(other)}): name another --output_dir")


def claim(folder: Path, settings: dict) -> None:
    """Make the folder of a run, once nothing is left to be refused: what fails before leaves nothing behind."""
    check_run(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, default=str) + "\n")


def train(trainer: Trainer) -> None:
    """Train from the last checkpoint of the run, or from the beginning; after Ctrl-C, end the program.

    Every example trains by this call, so every one can be stopped and goes on by the same command.
    """
    trainer.add_callback(SayWhenSafe)
    if not train_or_resume(trainer):
        raise Stopped(
            f"Stopped at step {trainer.state.global_step}, with a checkpoint; the same command goes on from there."
        )


class SayWhenSafe(TrainerCallback):
    """Says from when on Ctrl-C costs nothing."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print("Training. Ctrl-C saves a checkpoint and stops.", flush=True)


def log_in_lines(trainer: Trainer) -> Trainer:
    """The trainer, which tells its losses in readable lines, in place of dictionaries (`disable_tqdm=True`)."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines)
    return trainer


class Lines(TrainerCallback):
    """A line for each loss."""

    def on_log(self, args, state, control, logs, **kwargs):
        step = f"  step {state.global_step}" + (f" of {state.max_steps}" if state.max_steps else "")
        if state.is_world_process_zero and "loss" in logs:
            print(f"{step}: loss {float(logs['loss']):.3f}", flush=True)
        if state.is_world_process_zero and "eval_loss" in logs:
            print(f"{step}: held-out perplexity {math.exp(logs['eval_loss']):.1f}", flush=True)


def run(main: Callable[[], None]) -> None:
    """`main()`. Ctrl-C ends it in a sentence, whatever it was doing."""
    try:
        with parting_at_the_end():
            main()
    except KeyboardInterrupt as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\n{stop or 'Stopped; the same command goes on.'}", flush=True)
        sys.exit(130)


# -------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special)
