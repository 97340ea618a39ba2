"""Ends training between two optimizer steps when a scheduler asks for it with a signal, and keeps a checkpoint."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import torch
from transformers import TrainerCallback

from qlora.training.processes import LAUNCHED_BY_TORCHRUN

STOP_SIGNALS = [signal.SIGTERM]
if sys.platform != "win32":  # further ones of schedulers, and of a terminal that is closed
    STOP_SIGNALS += [signal.SIGUSR1, signal.SIGHUP]


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which the first of `STOP_SIGNALS` arrives, in all processes after the same one.

    A checkpoint is written, unless the JSON's save_strategy is "no". After the last step of an epoch, it is written
    again with what belongs to the end of the epoch, so that a resumed run lacks nothing.

    Attributes:
        received: the signal that this process has received; 0 for none.
        stopping: the signal that any process had received when the run was stopped; 0 for none.
    """

    def __init__(self):
        self.received = self.stopping = 0
        self.group = None

    @contextlib.contextmanager
    def signals_handled(self) -> Iterator[None]:
        """Notes signals instead of dying of them, except those that are ignored, as SIGHUP is with nohup."""
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
        for number in handlers:
            signal.signal(number, self.receive)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: object):
        """Notes the first signal; the second one ends the process."""
        if self.received and LAUNCHED_BY_TORCHRUN not in os.environ:  # torchrun repeats what a scheduler sent to all
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = self.received or number

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:  # on the CPU, since reading a result of the GPU would wait for the step
            self.group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        self.stopping = self.received
        if self.group:
            highest = torch.tensor(self.received)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, self.group)
            self.stopping = int(highest)
        if state.global_step == state.max_steps:  # the run comes to its end anyway
            self.stopping = 0
        self.stop(args, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.epoch % 1 == 0:
            self.stop(args, control)
        elif self.stopping:  # stopped within the epoch
            control.should_log = control.should_evaluate = control.should_save = False

    def stop(self, args, control):
        """Ends training if a signal was received."""
        if self.stopping:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
