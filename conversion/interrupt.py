"""Ctrl-C during a training that costs nothing. For the stages of a conversion and the examples."""

import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback


ONE_CTRL_C = 1.0  # seconds in which it may arrive twice: from the terminal, and from a launcher that passes it on


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C (or SIGTERM, by which a scheduler asks for the machine) ends training at the next step, with a
    checkpoint; a second Ctrl-C ends the program at once.

    Several processes stop at the same step, whichever of them heard the signal: one that went on alone would wait for
    the others' gradients for ever.
    """

    def __init__(self):
        self.interrupted = False
        self.since = None
        self.processes = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = {s: signal.signal(s, self.interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.processes = dist.new_group(backend="gloo")  # on the CPU: asking does not wait for a GPU

    def interrupt(self, signum, frame):
        if self.since is None:
            self.since = time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self.since > ONE_CTRL_C:
            signal.signal(signal.SIGINT, self.previous[signal.SIGINT])
            raise KeyboardInterrupt("Stopped at once.")

    def on_step_end(self, args, state, control, **kwargs):
        interrupted = torch.tensor(int(self.since is not None))
        if self.processes is not None:
            dist.all_reduce(interrupted, dist.ReduceOp.MAX, self.processes)
        if interrupted:
            self.interrupted = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        if self.processes is not None:
            dist.destroy_process_group(self.processes)
            self.processes = None


class Stopped(KeyboardInterrupt):
    """Training ended in order after Ctrl-C, in all processes, and left a checkpoint."""


@contextmanager
def parting_at_the_end():
    """Processes that found each other inside the block part at its end. Left to the interpreter's, one may abort:
    "terminate called without an active exception" (gloo, torch 2.13).
    """
    had_met = dist.is_available() and dist.is_initialized()
    stopped = None
    try:
        yield
    except Stopped as stop:  # after another error, one process may still wait for the others
        stopped = stop
    if not had_met and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if stopped is not None:
        raise stopped


class AlreadyTrained(Exception):
    """Ends a training of which no step is left."""


class StopBeforeTooMuch(TrainerCallback):
    """Trainer looks at `max_steps` after a step only: it would train one more of a checkpoint that is finished."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise AlreadyTrained


def train_or_resume(trainer: Trainer) -> bool:
    """Train from the last checkpoint in the trainer's `output_dir`, or from the beginning. Whether it was trained to
    the end: False after Ctrl-C, and the same call goes on from there. After the end, it loads the last checkpoint.
    """
    checkpoint = last_checkpoint(trainer.args.output_dir)
    tied = getattr(trainer.model, "all_tied_weights_keys", None)
    if checkpoint is not None and tied:
        # Where Trainer looks before it warns of tied weights, which a checkpoint holds once.
        trainer.model._keys_to_ignore_on_save.update(tied)
    interrupt = SaveOnInterrupt()
    trainer.callback_handler.callbacks.insert(0, StopBeforeTooMuch())  # before others say that training begins
    trainer.add_callback(interrupt)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except AlreadyTrained:
        trainer.is_in_train = False
    return not interrupt.interrupted


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that is complete, if there is one. `trainer_state.json` is what Trainer writes last."""
    complete = [state.parent for state in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None
