"""Ctrl-C during a training that costs nothing. For the stages of a conversion and the examples."""

import signal

from transformers import TrainerCallback


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C ends training at the next step, with a checkpoint; a second Ctrl-C ends the program at once."""

    def __init__(self):
        self.interrupted = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, signum, frame):
        signal.signal(signal.SIGINT, self.previous)
        self.interrupted = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.previous)
