"""How a user's mistake, or a run that cannot continue, reaches the user: as one message without a traceback."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


class TrainingStopped(Exception):
    """A run that cannot continue; the message says why, what is saved, and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def is_main_process() -> bool:
    """Whether this is the process that prints, as torchrun numbers processes; known before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def set_up_logging():
    """Progress goes to stderr as plain lines; of several processes only the main one reports more than errors."""
    logging.basicConfig(level=logging.INFO if is_main_process() else logging.ERROR, format="%(message)s")


def stop_all_processes(message: str) -> NoReturn:
    """Ends a run for a reason that every process has found; only the main process reports it."""
    raise TrainingStopped(message) if is_main_process() else SystemExit(1)


@contextlib.contextmanager
def one_line_on_interrupt() -> Iterator[None]:
    """Ends the program on Ctrl-C with one line: around imports that take seconds, and as the decorator of a main.

    Raises:
        SystemExit: with exit status 130, 128 + SIGINT, as shells have it.
    """
    try:
        yield
    except BaseException as error:
        interrupt = interrupt_behind(error)
        if interrupt is None:
            raise
        if is_main_process():
            print(f"\n{interrupt}" if interrupt.args else "\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


def interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C that an error is or came from: libraries that are interrupted may raise errors of their own."""
    while error:
        if isinstance(error, KeyboardInterrupt):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def message_instead_of_traceback(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the program with the message of an error.

    Args:
        kinds: of errors that a user can correct; by default ValueError and OSError.
    Raises:
        SystemExit: with `error: ...`, exit status 1.
    """
    kinds = kinds or (ValueError, OSError)
    try:
        yield
    except kinds as error:
        if isinstance(error, TrainingStopped):
            print(file=sys.stderr)  # a new line, below the progress bar
        raise SystemExit(f"error: {error}") from None
