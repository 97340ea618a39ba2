"""The folder in which the datasets library keeps what it made of a data file; what is damaged there is made anew."""

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from qlora.atomic import lack_of_room
from qlora.data.row_files import update_hash

logger = logging.getLogger(__name__)

NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.ENOTDIR)


def cache_folder(path: str, version: int) -> Path:
    """The folder for the rows of a file; it is another one for other bytes in the file, whatever its name and time.

    Args:
        path: of the file.
        version: of the code that reads it.
    Raises:
        FileNotFoundError: there is no such file.
    """
    digest = hashlib.sha256(f"{version}:".encode())
    update_hash(digest, path)
    return Path(datasets.config.HF_DATASETS_CACHE) / "chatglm_qlora" / digest.hexdigest()[:16]


def use_cache(folder: Path, build: Callable[[], Dataset]) -> Dataset:
    """Calls a function that keeps its result in a folder; if what is there is damaged, once more without it.

    Args:
        folder: the cache; it need not exist.
        build: reads the folder, or writes it; any error but one of reading the data means that the folder is damaged.
    Raises:
        ValueError: the folder cannot be written to.
        Exception: any other that `build` raises without the help of a damaged folder.
    """
    existed = folder.exists()
    try:
        return build()
    except Exception as error:
        in_data = isinstance(error, DatasetGenerationError)
        cause = (error.__cause__ or error) if in_data else error
        reason = lack_of_room(cause)
        if isinstance(cause, OSError) and cause.errno in NOT_WRITABLE:
            reason = os.strerror(cause.errno)
        if reason:
            shutil.rmtree(folder, ignore_errors=True)  # the library leaves the part of a file that it has written
            raise ValueError(
                f"the cache of tokenized rows in {datasets.config.HF_DATASETS_CACHE} cannot be written to: {reason}. "
                "Make room there, or name a folder on another disk in the environment variable HF_DATASETS_CACHE."
            ) from error
        if in_data or not existed:
            raise cause from None
        logger.warning("The cache in %s is damaged (%s); it is deleted and built anew.", folder, cause)
        shutil.rmtree(folder)
    return use_cache(folder, build)


def check_sums(samples: Dataset, count: int):
    """ValueError unless there are `count` samples whose `input_ids` and `labels` add up to `checksum`.

    A file that was being written when the power failed may have zeros in it, which the library reads as fewer samples,
    or as samples of zeros.
    """
    sums = list_sums(samples, "input_ids") + list_sums(samples, "labels")
    if len(samples) != count or not np.array_equal(sums, samples.with_format("numpy")["checksum"][:]):
        raise ValueError("samples are missing or changed")


def list_sums(samples: Dataset, name: str) -> np.ndarray:
    """The sum of each list of a column of lists of int."""
    sums = [np.zeros(0, np.int64)]
    for chunk in samples.data.column(name).chunks:
        totals = np.append(0, chunk.values.to_numpy().cumsum(dtype=np.int64))
        ends = totals[chunk.offsets.to_numpy()]
        sums.append(ends[1:] - ends[:-1])
    return np.concatenate(sums)
