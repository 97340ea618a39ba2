"""From checked rows to token ids, with the datasets library and its cache."""

import bisect
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizer

from chatglm.chat import build_prompt
from qlora.data.rows import read_rows

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
ROW_FEATURES = Features(
    {
        "line": Value("int64"),
        "query": Value("string"),
        "history": List(List(Value("string"))),
        "answer": Value("string"),
    }
)
ROWS_VERSION = 3  # to be raised when other rows are accepted: the cache goes by it
ROWS_AT_ONCE = 100  # in memory, for each process; rows may have megabytes
TOKENIZER_PROCESSES = 8  # at most; starting more costs more than it saves


@dataclass
class SampleEncoder:
    """Turns rows into `prompt [gMASK] <sop> answer <eop>` with labels on the answer and `<eop>`.

    Control tokens written in a row stay text. A prompt that is too long first loses its oldest rounds, then its end;
    an answer that is too long loses its end.

    Raises:
        ValueError: a row of which the tokenizer leaves nothing, with its line number.
    """

    tokenizer: PreTrainedTokenizer
    prompt_text: str
    max_input_length: int
    max_output_length: int
    version: int = 2  # to be raised when the code changes what comes out: the cache of datasets goes by the fields

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """A batch of rows -> `input_ids`, `labels`, `length`, `prompt_cut`, `answer_cut`."""
        columns: dict[str, list] = {"input_ids": [], "labels": [], "length": [], "prompt_cut": [], "answer_cut": []}
        for line, *row in zip(rows["line"], rows["query"], rows["history"], rows["answer"], strict=True):
            try:
                sample = self.encode(*row)
            except ValueError as error:
                raise ValueError(f"line {line}: {error}") from error
            for name, value in zip(columns, sample, strict=True):
                columns[name].append(value)
        return columns

    def encode(
        self, query: str, history: list[list[str]], answer: str
    ) -> tuple[list[int], list[int], int, bool, bool]:
        """One row -> ids, labels, number of tokens, whether the prompt was cut, whether the answer was cut."""
        prompt_room, answer_room = self.max_input_length - 2, self.max_output_length - 1
        prompt_ids, answer_ids = self.prompt_ids(query, history), self.text_ids(answer)
        for name, ids in {"instruction": prompt_ids, "output": answer_ids}.items():
            if not ids:
                raise ValueError(f"field '{name}' has nothing but characters that the tokenizer drops")
        prompt_cut, answer_cut = len(prompt_ids) > prompt_room, len(answer_ids) > answer_room
        if prompt_cut and history:
            dropped = bisect.bisect_left(
                range(len(history)), True, key=lambda i: len(self.prompt_ids(query, history[i:])) <= prompt_room
            )
            prompt_ids = self.prompt_ids(query, history[dropped:])
        prompt_ids, answer_ids = prompt_ids[:prompt_room], answer_ids[:answer_room]
        input_ids = self.tokenizer.build_inputs_with_special_tokens(prompt_ids, answer_ids)
        prompt_length = len(prompt_ids) + 2
        labels = [IGNORE_INDEX] * prompt_length + input_ids[prompt_length:]
        return input_ids, labels, len(input_ids), prompt_cut, answer_cut

    def prompt_ids(self, query: str, history: list[list[str]]) -> list[int]:
        """Ids of a whole prompt, not cut."""
        return self.text_ids(self.prompt_text + build_prompt(query, history))

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def load_rows(path: str) -> Dataset:
    """The checked rows of a file, cached by its path, size and time of change."""
    source = Path(path)
    stat = source.stat() if source.is_file() else None
    version = f"{ROWS_VERSION}:{source.resolve()}:{stat.st_size}:{stat.st_mtime_ns}" if stat else path
    try:
        return Dataset.from_generator(
            read_rows,
            features=ROW_FEATURES,
            gen_kwargs={"path": path},
            writer_batch_size=ROWS_AT_ONCE,
            fingerprint=hashlib.sha256(version.encode()).hexdigest()[:16],
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def load_samples(path: str, encoder: SampleEncoder) -> Dataset:
    """Reads, checks and tokenises a jsonl file; says how many tokens it has and how much was cut.

    Returns:
        A Dataset with `input_ids` and `labels`, lists of int of equal length, that `length`, the row's `line`, and
        whether its prompt (`prompt_cut`) or answer (`answer_cut`) was cut.
    Raises:
        FileNotFoundError, ValueError: see `read_rows`; also for a file without rows, and for a row without tokens.
    """
    rows = load_rows(path)
    workers = min(TOKENIZER_PROCESSES, os.cpu_count() or 1, 1 + len(rows) // 5000)
    try:
        samples = rows.map(
            encoder,
            batched=True,
            batch_size=ROWS_AT_ONCE,
            writer_batch_size=ROWS_AT_ONCE,
            remove_columns=["query", "history", "answer"],
            num_proc=workers if workers > 1 else None,
            desc=f"Tokenizing {path}",
        )
    except ValueError as error:
        raise ValueError(f"{path}, {error}.") from error
    logger.info("%s: %s", path, summary(samples))
    return samples


def mix_samples(parts: list[tuple[str, Dataset, float]], seed: int) -> Dataset:
    """Several files as one data set; where there are several, each sample names its `file`.

    Args:
        parts: name of the file, its samples, and a weight that says how often its rows stand: 2 is twice, 0.5 is a
            half of them, drawn by the seed.
        seed: of the draw.
    Raises:
        ValueError: a weight that leaves no row.
    """
    shares = []
    for path, samples, weight in parts:
        share = take_share(samples, weight, seed)
        if not len(share):
            raise ValueError(f"--train_data_path {path}:{weight:g}: so small a weight leaves none of its rows.")
        shares.append(share.add_column("file", [path] * len(share)) if len(parts) > 1 else share)
    return concatenate_datasets(shares)


def take_share(samples: Dataset, weight: float, seed: int) -> Dataset:
    """`weight` times as many samples: all of them as often as it goes, and a random part of them."""
    if weight == 1:
        return samples
    times, rest = divmod(round(weight * len(samples)), len(samples))
    part = np.random.default_rng(seed).permutation(len(samples))[:rest]
    return samples.select(np.concatenate([*[np.arange(len(samples))] * times, np.sort(part)]))


def numpy_column(samples: Dataset, name: str) -> np.ndarray:
    """A column of numbers at once; a list of millions of Python's own would take some time and memory."""
    return samples.with_format("numpy").select_columns(name)[:][name]


def summary(samples: Dataset) -> str:
    """One line on the size of a data set and on what was cut."""
    lengths = numpy_column(samples, "length")
    return (
        f"{len(lengths)} samples, {lengths.sum()} tokens (mean {lengths.mean():.1f}, longest {lengths.max()}); cut to "
        f"the length limits: {numpy_column(samples, 'prompt_cut').sum()} prompts, "
        f"{numpy_column(samples, 'answer_cut').sum()} answers"
    )
