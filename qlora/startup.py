"""A program's start: what makes the imports of torch, transformers, peft and datasets shorter. Needs none of them."""

import contextlib
import gc
import os
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of a program that uses no torch.compile; any number of such blocks, nested or not.

    - torch.compile is switched off, as PyTorch documents it: bitsandbytes calls it when it is imported, for kernels
      that neither a GPU nor a CPU runs here, and PyTorch then imports its compiler, with 500 modules.
    - The garbage collector is off: nearly all that imports make stays, and it would look through all of it again and
      again. Afterwards it leaves out what is there.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
            gc.freeze()
