"""One run at a time in an output_dir: the run holds a lock on a file there, which the kernel releases when it dies."""

import contextlib
import errno
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from qlora.errors import TrainingStopped, is_main_process

logger = logging.getLogger(__name__)

LOCK_FILE = "_lock"  # in output_dir; what begins with an underscore is not uploaded to a hub
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of shared storage that was mounted without them


@contextlib.contextmanager
def lock_output_dir(output_dir: Path) -> Iterator[None]:
    """Holds the lock of a run's folder, which is created; in the main process only.

    The file names the process that holds the lock. A file that a run left behind when it was killed is not locked, and
    is used again. On Windows, and where the file system has no locks, a warning says so and the run goes on.

    Args:
        output_dir: of the run.
    Raises:
        TrainingStopped: another run holds the lock, or the file cannot be written.
    """
    if sys.platform == "win32":
        logger.warning("%s: on Windows no folder is locked, so that nothing prevents a second run there.", output_dir)
    if sys.platform == "win32" or not is_main_process():
        yield
        return
    path = output_dir / LOCK_FILE
    with contextlib.ExitStack() as stack:
        file = None
        while not file or not is_at(path, file):  # the run that held the lock may have deleted its file
            file = stack.enter_context(open_lock_file(path))
            if problem := lock_problem(file, exclusive=True):
                raise TrainingStopped(problem)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        stack.callback(path.unlink, missing_ok=True)
        yield


def open_lock_file(path: Path) -> TextIO:
    """Opens a lock file and creates it and its folder; TrainingStopped if they cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise TrainingStopped(f"{path} cannot be written ({error.strerror}): name another output_dir.") from error


def check_not_locked(output_dir: str):
    """ValueError if another run holds the lock of a folder; creates nothing, and passes over a file it cannot read."""
    path = Path(output_dir) / LOCK_FILE
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        if problem := lock_problem(file, exclusive=False):
            raise ValueError(problem)


def lock_problem(file: TextIO, exclusive: bool) -> str | None:
    """Locks an open lock file, shared or exclusively, without waiting.

    Returns:
        A sentence for the user, if another process has locked it; None on Windows, where nothing is locked.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    folder = Path(file.name).parent
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "which has just started"
        return (
            f"output_dir {folder} is in use by another run ({holder}). Wait until it ends, stop it, or name another "
            "output_dir in the JSON."
        )
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        reason = f"this file system has no locks ({error.strerror})"
        logger.warning("%s: %s, so that nothing prevents a second run there.", folder, reason)
    return None


def is_at(path: Path, file: TextIO) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
