"""Folders and files that appear under their final name only when they are complete."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from qlora.units import readable_size

logger = logging.getLogger(__name__)

NO_ROOM = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "the quota of its disk is reached",
    errno.EFBIG: "a file there must not be so large",
}
OF_TORCH = re.compile("inline_container(?!.*StreamReader)|iostream", re.S)  # torch.save gives no cause
OF_DATASETS = "Not enough disk space"


def lack_of_room(error: BaseException | None) -> str | None:
    """Why there was no room for what was written, as a clause; None for any other error.

    Args:
        error: of the system, or what safetensors, torch or datasets made of it.
    """
    while error:
        text = str(error)
        in_text = re.search(r"os error (\d+)", text)  # safetensors gives the number in its text
        number = int(in_text[1]) if in_text else getattr(error, "errno", None)
        if number in NO_ROOM:
            return NO_ROOM[number]
        if text.startswith(OF_DATASETS):
            return NO_ROOM[errno.ENOSPC]
        if isinstance(error, RuntimeError) and OF_TORCH.search(text):
            return "its disk is full, or cannot be written to"
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def writing(path: str | Path, advice: str = "") -> Iterator[None]:
    """Names the file or folder that is written, if there is no room for it.

    Args:
        path: of it.
        advice: what else to do than to make room, after `or`.
    Raises:
        OSError: in place of an error for which `lack_of_room` has a reason; others are not changed.
    """
    try:
        yield
    except Exception as error:
        reason = lack_of_room(error)
        if reason is None:
            raise
        make_room = f"Make room, or {advice}" if advice else "Make room"
        raise OSError(f"{path} cannot be written: {reason}. {make_room}.") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file to write; it is renamed to `path` at the end, and deleted where writing fails.

    Raises:
        OSError: see `writing`.
    """
    partial = path.with_name(f"partial.{path.name}")  # the suffix may say in which format to write
    with writing(path):
        try:
            yield partial
            flush(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def json_lines(rows: Iterable[dict]) -> str:
    """A line of JSON for each row."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_lines(path: Path, rows: Iterable[dict]):
    """Adds rows to a file, a line of JSON each; the file stays as it was where there is no room for all of them.

    Raises:
        OSError: see `writing`.
    """
    lines = json_lines(rows)
    size = path.stat().st_size if path.exists() else 0
    with writing(path):
        try:
            with path.open("ab") as file:
                file.write(lines.encode())
        except OSError:
            if path.exists():
                os.truncate(path, size)
            raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into; it is renamed to `path` at the end, and deleted where writing fails.

    Raises:
        ValueError: `path` exists.
        OSError: see `writing`.
    """
    target = Path(path)
    if target.exists():
        raise ValueError(f"--output_dir {path} exists already: name another folder, or delete it.")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    with writing(path, "name a folder on another disk"):
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        publish_folder(partial, target)


def publish_folder(source: Path, target: Path, replaced: Path | None = None):
    """Renames a folder to its final name, after its contents are on the disk.

    Args:
        source: the folder.
        target: its final name, on the same file system.
        replaced: new name of an existing `target`; without it nothing may exist under this name.
    """
    set_permissions(source.rglob("*"))
    flush(*source.rglob("*"), source)
    if replaced and target.exists():
        os.rename(target, replaced)
    os.rename(source, target)
    flush(target.parent)


def publish_files(source: Path, target: Path):
    """Moves files into a folder, after they are on the disk; adapter_config.json, which marks an adapter, last."""
    files = sorted(source.iterdir(), key=lambda path: path.name == "adapter_config.json")
    set_permissions(files)
    flush(*files)
    for path in files:
        os.replace(path, target / path.name)
    flush(target)


@contextlib.contextmanager
def only_process(folder: Path, what: str) -> Iterator[None]:
    """Lets one process at a time work on a folder, where the system and the file system have locks.

    Args:
        folder: that exists; it may be renamed meanwhile.
        what: the other process does, for the message of the one that waits.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # shared storage may have none
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("Another process %s %s; waiting for it", what, folder)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_room(what: str, folder: Path, needed: int, advice: str):
    """OSError if the disk of a folder has fewer than `needed` bytes free; `what` needs them."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{what} needs {readable_size(needed)}, and the disk of {folder} has {readable_size(free)} free. "
            f"Make room, or {advice}."
        )


def set_permissions(paths: Iterable[Path]):
    """Gives files the permissions of any new file, since safetensors lets only the owner read; where there are any."""
    umask = os.umask(0)  # can only be read by setting it
    os.umask(umask)
    for path in filter(Path.is_file, paths):
        with contextlib.suppress(OSError):  # some file systems have no permissions
            path.chmod(0o666 & ~umask)


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def flush(*paths: Path):
    """Waits until files and folders are on the disk; some file systems cannot do so for folders."""
    for path in paths:
        is_folder = path.is_dir()
        with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():
            # Windows flushes only what is open for writing, Linux opens folders only for reading.
            descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def write_json(path: Path, values: dict):
    """One key a line, sorted."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
