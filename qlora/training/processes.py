"""Processes of a run that end with their parents, and that go on without a terminal. Needs no torch."""

import contextlib
import ctypes
import functools
import os
import signal
import sys
from typing import TextIO

PR_SET_PDEATHSIG = 1  # of prctl(2)
LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"  # environment variable


@functools.cache
def end_with_parents():
    """Lets no process outlive its parent, even one that is killed; further calls do nothing.

    Processes that this one forks, to tokenize and to load data, end with it. A process of torchrun ends with torchrun.
    Only Linux can do this; elsewhere the processes of a run that is killed may go on until they are ended by hand.
    """
    if sys.platform == "linux":
        os.register_at_fork(after_in_child=end_with_run)
        if LAUNCHED_BY_TORCHRUN in os.environ:
            end_with_parent()


def end_with_run():
    """For a forked process: it ends when this run does, which alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent():
    """Asks Linux to kill this process when its parent has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class LossyStream:
    """A text stream that drops what cannot be written: its terminal was closed, its reader ended, its disk is full."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def go_on_without_output():
    """Lets the run go on when its stdout or stderr goes away."""
    for name in ("stdout", "stderr"):
        if stream := getattr(sys, name):  # None where it was closed from the start
            setattr(sys, name, LossyStream(stream))
