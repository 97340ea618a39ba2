"""A program's start, until its libraries are imported: quicker imports, and the weights read meanwhile.

Needs none of these libraries.
"""

import contextlib
import functools
import gc
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from qlora.arguments import copy_folder

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of a program that uses no torch.compile; any number of such blocks, nested or not.

    - torch.compile is switched off, as PyTorch documents it: bitsandbytes calls it when it is imported, for kernels
      that neither a GPU nor a CPU runs here, and PyTorch then imports its compiler, with 500 modules.
    - The garbage collector is off: nearly all that imports make stays, and it would look through all of it again and
      again.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
    advise_bytecode()


@functools.cache
def advise_bytecode():
    """Logs, once, what to do if Python compiles the libraries anew at every start, since it cannot keep the result."""
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin and torch.cached and not Path(torch.cached).is_file():
        logger.info(
            "torch was installed without bytecode, and Python does not write it (PYTHONDONTWRITEBYTECODE, or no "
            "permission), so that every start takes seconds more. Once is enough: python -m compileall -q %s",
            Path(torch.origin).parents[1],
        )


def read_ahead(path: str):
    """Asks Linux to read a model's weights into memory, while the program does something else.

    Args:
        path: of its folder, which may be missing; a 4-bit copy beside it takes its place.
    """
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=advise_reading, args=(path,), daemon=True).start()


def advise_reading(path: str):
    """Says that the files with the weights will be read soon, if they take less than half of the machine's memory."""
    with contextlib.suppress(OSError, ValueError):  # what is wrong with them is reported when they are checked
        copy = copy_folder(path)
        folder = copy if copy.is_dir() else Path(path)
        files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        if sum(file.stat().st_size for file in files) < machine_memory() / 2:
            for name in files:
                with name.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def machine_memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
