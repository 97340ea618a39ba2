"""How a user's mistake, or a run that cannot go on, reaches the user: one message, no traceback."""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn


class TrainingStopped(Exception):
    """A run that must not go on, with what the user is to know and to do."""


def stop_all_processes(message: str, is_main_process: bool) -> NoReturn:
    """Ends a run that every process has found to be bad; the main one has the message."""
    raise TrainingStopped(message) if is_main_process else SystemExit(1)


@contextlib.contextmanager
def message_instead_of_traceback(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the program with the message of an error.

    Args:
        kinds: of errors that are the user's to mend; by default those raised while a run is being set up, ValueError
            and OSError.
    Raises:
        SystemExit: with `error: ...`, exit status 1.
    """
    kinds = kinds or (ValueError, OSError)
    try:
        yield
    except kinds as error:
        if isinstance(error, TrainingStopped):
            print(file=sys.stderr)  # below the progress bar, not behind it
        raise SystemExit(f"error: {error}") from None
