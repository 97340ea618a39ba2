"""Tokenizes data rows into samples, with the datasets library and its cache."""

import bisect
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizer

from chatglm.chat import build_prompt
from qlora.data.cache import cache_folder, check_sums, use_cache
from qlora.data.row_files import MOST_LISTED, Place, bad_rows
from qlora.data.rows import ROWS_VERSION, read_rows

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
PLACE_FEATURES = {"line": Value("int64"), "element": Value("int64")}
ROW_FEATURES = Features(
    {
        **PLACE_FEATURES,
        "query": Value("string"),
        "history": List(List(Value("string"))),
        "answer": Value("string"),
    }
)
SAMPLE_FEATURES = Features(
    {
        **PLACE_FEATURES,
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int64"),
        "prompt_cut": Value("bool"),
        "answer_cut": Value("bool"),
        "checksum": Value("int64"),  # of the two lists
        "problem": Value("string"),  # why the row has no sample
    }
)
ROWS_AT_ONCE = 100  # rows that a process holds in memory; a row may have megabytes
TOKENIZER_PROCESSES = 8  # at most; starting more takes longer than they save
ROWS_PER_PROCESS = 5000  # below, the same holds for one more


@dataclass
class SampleEncoder:
    """Tokenizes rows into samples `prompt [gMASK] <sop> answer <eop>`, with labels on the answer and `<eop>`.

    Control tokens written in a row stay text. From a prompt that is too long the oldest rounds are dropped first; what
    is still too long is cut at the end. An answer that is too long is cut at the end.

    Args:
        tokenizer: of the model.
        prompt_text: put before every prompt.
        max_input_length: most tokens of a prompt, `[gMASK]` and `<sop>` included.
        max_output_length: most tokens of an answer, `<eop>` included.
    """

    tokenizer: PreTrainedTokenizer
    prompt_text: str
    max_input_length: int
    max_output_length: int
    version: int = 3  # to be raised when the code gives other samples; part of the cache key, as all fields are

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Columns `query`, `history`, `answer` of a batch -> the columns of SAMPLE_FEATURES but for the place.

        A row without a sample has the reason in `problem`, and a length of 0: in a worker process an error would end
        at the first one.
        """
        samples = []
        for row in zip(rows["query"], rows["history"], rows["answer"], strict=True):
            try:
                ids, labels, *rest = self.encode(*row)
                samples.append((ids, labels, *rest, sum(ids) + sum(labels), ""))
            except ValueError as error:
                samples.append(([], [], 0, False, False, 0, str(error)))
        names = [name for name in SAMPLE_FEATURES if name not in PLACE_FEATURES]
        return dict(zip(names, map(list, zip(*samples, strict=True)), strict=True))

    def encode(
        self, query: str, history: list[list[str]], answer: str
    ) -> tuple[list[int], list[int], int, bool, bool]:
        """Tokenizes one row.

        Args:
            query, history, answer: as `read_rows` yields them.
        Returns:
            Token ids, labels, number of tokens, whether the prompt was cut, whether the answer was cut.
        Raises:
            ValueError: the question or the answer has no token.
        """
        max_prompt_ids, max_answer_ids = self.max_input_length - 2, self.max_output_length - 1
        prompt_ids, answer_ids = self.prompt_ids(query, history), self.text_ids(answer)
        for name, ids in {"instruction": prompt_ids, "output": answer_ids}.items():
            if not ids:
                raise ValueError(f"field '{name}' has nothing but characters that the tokenizer drops")
        prompt_cut, answer_cut = len(prompt_ids) > max_prompt_ids, len(answer_ids) > max_answer_ids
        if prompt_cut and history:
            dropped = bisect.bisect_left(
                range(len(history)), True, key=lambda i: len(self.prompt_ids(query, history[i:])) <= max_prompt_ids
            )
            prompt_ids = self.prompt_ids(query, history[dropped:])
        prompt_ids, answer_ids = prompt_ids[:max_prompt_ids], answer_ids[:max_answer_ids]
        input_ids = self.tokenizer.build_inputs_with_special_tokens(prompt_ids, answer_ids)
        prompt_length = len(prompt_ids) + 2
        labels = [IGNORE_INDEX] * prompt_length + input_ids[prompt_length:]
        return input_ids, labels, len(input_ids), prompt_cut, answer_cut

    def prompt_ids(self, query: str, history: list[list[str]]) -> list[int]:
        """Token ids of a prompt with its history, not cut."""
        return self.text_ids(self.prompt_text + build_prompt(query, history))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text; control tokens written in it stay text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def load_rows(path: str) -> Dataset:
    """The checked rows of a file, from the cache or into it; errors as for `read_rows`."""
    folder = cache_folder(path, ROWS_VERSION)
    return use_cache(folder, lambda: cached_rows(path, folder))


def cached_rows(path: str, folder: Path) -> Dataset:
    """The rows of a file, kept in a folder; ValueError if rows are missing there."""
    rows = Dataset.from_generator(
        read_rows,
        features=ROW_FEATURES,
        gen_kwargs={"path": path},
        writer_batch_size=ROWS_AT_ONCE,
        cache_dir=str(folder),
        fingerprint=folder.name,
    )
    if len(rows) != rows.info.splits["train"].num_examples:
        raise ValueError("rows are missing")
    return rows


def cached_samples(path: str, encoder: SampleEncoder, folder: Path) -> Dataset:
    """Samples with the columns of SAMPLE_FEATURES, kept in a folder; ValueError if they were changed there."""
    rows = cached_rows(path, folder)
    workers = min(TOKENIZER_PROCESSES, os.cpu_count() or 1, 1 + len(rows) // ROWS_PER_PROCESS)
    samples = rows.map(
        encoder,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        writer_batch_size=ROWS_AT_ONCE,
        remove_columns=["query", "history", "answer"],
        features=SAMPLE_FEATURES,
        num_proc=workers if workers > 1 else None,
        desc=f"Tokenizing {path}",
    )
    check_sums(samples, len(rows))
    return samples


def load_samples(path: str, encoder: SampleEncoder) -> Dataset:
    """Reads, checks and tokenizes a file of rows; logs the number of tokens and of cut samples.

    Args:
        path: of the file.
        encoder: tokenizes the rows.
    Returns:
        A Dataset with `input_ids` and `labels`, lists of int of the same length; this `length`; the row's `line`, and
        its `element` in an array, or 0; `prompt_cut` and `answer_cut`, whether prompt and answer were cut.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: rows that cannot be used, with their places and reasons; the cache cannot be written to.
    """
    folder = cache_folder(path, ROWS_VERSION)
    samples = use_cache(folder, lambda: cached_samples(path, encoder, folder))
    without_tokens = np.flatnonzero(numpy_column(samples, "length") == 0)
    if len(without_tokens):
        first = samples.select(without_tokens[:MOST_LISTED])
        reasons = [f"{Place(row['line'], row['element'])}: {row['problem']}." for row in first]
        raise bad_rows(path, reasons, len(without_tokens))
    samples = samples.remove_columns(["checksum", "problem"])
    logger.info("%s: %s", path, summary(samples))
    return samples


def mix_samples(parts: list[tuple[str, Dataset, float]], seed: int) -> Dataset:
    """Concatenates the samples of several files into one data set.

    Args:
        parts: for each file its path, its samples, and its weight, by which the number of its samples is multiplied:
            2 repeats each sample, 0.5 selects a random half of them.
        seed: of the random selection.
    Returns:
        The data set; if there are several files, with their paths in the column `file`.
    Raises:
        ValueError: a weight so small that no sample of its file is selected.
    """
    shares = []
    for path, samples, weight in parts:
        share = take_share(samples, weight, seed)
        if not len(share):
            raise ValueError(f"--train_data_path {path}:{weight:g}: so small a weight leaves none of its rows.")
        shares.append(share.add_column("file", [path] * len(share)) if len(parts) > 1 else share)
    return concatenate_datasets(shares)


def take_share(samples: Dataset, weight: float, seed: int) -> Dataset:
    """`weight` times as many samples: all of them floor(weight) times, and a random selection of them once more."""
    if weight == 1:
        return samples
    times, rest = divmod(round(weight * len(samples)), len(samples))
    part = np.random.default_rng(seed).permutation(len(samples))[:rest]
    return samples.select(np.concatenate([*[np.arange(len(samples))] * times, np.sort(part)]))


def numpy_column(samples: Dataset, name: str) -> np.ndarray:
    """A column of numbers as one array; a list of millions of Python numbers would take more time and memory."""
    return samples.with_format("numpy").select_columns(name)[:][name]


def summary(samples: Dataset) -> str:
    """One line of text: the size of a data set, and the number of samples that were cut."""
    lengths = numpy_column(samples, "length")
    return (
        f"{len(lengths)} samples, {lengths.sum()} tokens (mean {lengths.mean():.1f}, longest {lengths.max()}); cut to "
        f"the length limits: {numpy_column(samples, 'prompt_cut').sum()} prompts, "
        f"{numpy_column(samples, 'answer_cut').sum()} answers"
    )
