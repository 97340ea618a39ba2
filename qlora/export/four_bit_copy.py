"""Writes folders with 4-bit weights in the format of bitsandbytes, and the 4-bit copy that is loaded for a model."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizer

from qlora.arguments import copy_folder
from qlora.atomic import only_process, publish_folder, write_json, writing
from qlora.loading import COPY_SOURCE, is_copy_of

logger = logging.getLogger(__name__)


def write_quantized(model: PreTrainedModel, tokenizer: PreTrainedTokenizer, folder: str | Path):
    """Writes a 4-bit model, which `load_quantized_model` then loads without quantizing again.

    Packed weights and scales are bit-equal when they are read back. The other weights are stored in their present
    dtype, and converted if they are loaded for another `compute_dtype`.

    Args:
        model: as `load_quantized_model` returns it, without an adapter.
        tokenizer: of the model; its files are written, too.
        folder: created if it is missing.
    Raises:
        ValueError: the model has an adapter.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("a model with an adapter in its layers cannot be written in 4 bits: write its base model.")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def save_copy(model: PreTrainedModel, tokenizer: PreTrainedTokenizer, path: str, source: dict):
    """Writes the 4-bit copy of a model, which `load_quantized_model` loads in its place; nothing if it is there.

    Args:
        model, tokenizer: see `write_quantized`.
        path: of the 16-bit folder.
        source: as `copy_source` returned it before the model was loaded.
    Raises:
        OSError, ValueError: it cannot be written; what came of it is deleted.
    """
    target = copy_folder(path)
    staging = target.with_name(f"{target.name}.partial")
    staging.mkdir(exist_ok=True)
    with writing(target, "leave out --save_4bit"), only_process(staging, "writes"), deleted_on_error(staging):
        if is_copy_of(target, source):  # another process has written it meanwhile
            shutil.rmtree(staging, ignore_errors=True)
            return
        for file in staging.iterdir():  # left by a run that was killed
            file.unlink()
        write_quantized(model, tokenizer, staging)
        write_json(staging / COPY_SOURCE, source)
        if target.exists():
            shutil.rmtree(target)  # made from other files
        publish_folder(staging, target)
    logger.info("Wrote the 4-bit copy %s: from now on it is loaded in place of %s", target, path)


@contextlib.contextmanager
def deleted_on_error(folder: Path) -> Iterator[None]:
    """Deletes a folder that cannot be finished."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
