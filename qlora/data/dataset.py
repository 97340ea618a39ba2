"""Tokenizes data rows into samples, with the datasets library and its cache."""

import bisect
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from glm_shared.chat import ChatTokenizer, Rounds
from qlora.data.cache import cache_folder, check_sums, use_cache
from qlora.data.row_files import MOST_LISTED, Place, bad_rows
from qlora.data.rows import ROWS_VERSION, read_rows
from qlora.data.tool_messages import answers_of

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
PLACE_FEATURES = {"line": Value("int64"), "element": Value("int64")}
ROW_FEATURES = Features(
    {
        **PLACE_FEATURES,
        "query": Value("string"),
        "history": List(List(Value("string"))),
        "answer": Value("string"),
        "system": Value("string"),
        "turns": List(Value("int32")),
        "messages": Value("string"),
    }
)
SAMPLE_FEATURES = Features(
    {
        **PLACE_FEATURES,
        "turn": Value("int64"),
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
    """Tokenizes rows into samples, prompt and answer, with labels on the answer and the token that ends it.

    A conversation has a sample for each answer that is trained on, whose prompt has all messages before it: a prompt
    is read in both directions, so that its hidden states depend on its last question, and no two prompts share them.

    Control tokens written in a row stay text. From a prompt that is too long the oldest rounds are dropped first; what
    is still too long is cut at the end. An answer that is too long is cut at the end.

    Args:
        tokenizer: of the model.
        prompt_text: put before every prompt.
        max_input_length: most tokens of a prompt, control tokens included.
        max_output_length: most tokens of an answer, the one that ends it included.
        train_on: answers of a conversation that are trained on: "all", or the "last".
    """

    tokenizer: ChatTokenizer
    prompt_text: str
    max_input_length: int
    max_output_length: int
    train_on: str = "all"
    version: int = 5  # to be raised when the code gives other samples; part of the cache key, as all fields are

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Columns of ROW_FEATURES of a batch -> the columns of SAMPLE_FEATURES, with all samples of these rows."""
        batch = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        samples = [sample for row in batch for sample in self.samples(row)]
        return {name: [sample[name] for sample in samples] for name in SAMPLE_FEATURES}

    def samples(self, row: dict) -> Iterator[dict]:
        """The samples of a row.

        One that has no tokens has the reason in `problem`, and a length of 0: in a worker process an error would end
        at the first one.
        """
        rounds = [*row["history"], [row["query"], row["answer"]]]
        turns = row["turns"] or [0]  # the last round; the numbers of those of a conversation count from 1
        for turn in turns if self.train_on == "all" else turns[-1:]:
            try:
                if row["messages"]:
                    ids, labels, *rest = self.encode_turn(json.loads(row["messages"]), turn)
                else:
                    query, answer = rounds[turn - 1]
                    ids, labels, *rest = self.encode(query, rounds[: turn - 1], answer, row["system"])
                values = (ids, labels, *rest, sum(ids) + sum(labels), "")
            except ValueError as error:
                values = ([], [], 0, False, False, 0, str(error))
            yield dict(zip(SAMPLE_FEATURES, (row["line"], row["element"], turn, *values), strict=True))

    def count(self, rows: Dataset) -> int:
        """The number of samples of checked rows."""
        if self.train_on != "all":
            return len(rows)
        chunks = rows.data.column("turns").chunks
        return sum(int(np.maximum(np.diff(chunk.offsets.to_numpy()), 1).sum()) for chunk in chunks)

    def encode(
        self, query: str, history: Rounds, answer: str, system: str = ""
    ) -> tuple[list[int], list[int], int, bool, bool]:
        """Tokenizes one sample.

        Args:
            query, history, answer, system: as `read_rows` yields them.
        Returns:
            Token ids, labels, number of tokens, whether the prompt was cut, whether the answer was cut.
        Raises:
            ValueError: the question or the answer has no token.
        """
        prompt_ids, prompt_cut = self.encode_prompt(query, history, system)
        answer_ids = self.tokenizer.build_answer_ids(answer)
        if len(answer_ids) == 1:  # the token that ends it
            raise ValueError("the answer has nothing but characters that the tokenizer drops")
        return self.join(prompt_ids, prompt_cut, answer_ids)

    def encode_turn(self, messages: list[dict], turn: int) -> tuple[list[int], list[int], int, bool, bool]:
        """Tokenizes one answer of a conversation with tools.

        Args:
            messages: of a row, see `qlora.data.tool_messages`.
            turn: number of the answer, from 1.
        Returns:
            As `encode`.
        Raises:
            ValueError: the model has no tools.
        """
        place = answers_of(messages)[turn - 1]
        before, answer = messages[: place.start], messages[place.start : place.stop]
        head = before[:1] if before[0]["role"] == "system" else []
        # As many rounds as fit, each from a question of the user on; the last one in any case.
        for start in [i for i, message in enumerate(before) if message["role"] == "user"]:
            ids = self.tokenizer.conversation_ids([*head, *before[start:]], self.prompt_text)
            if len(ids) <= self.max_input_length:
                break
        cut = start > len(head) or len(ids) > self.max_input_length
        ids = self.tokenizer.cut_prompt_ids(ids, self.max_input_length)
        return self.join(ids, cut, self.tokenizer.turn_ids(answer))

    def join(
        self, prompt_ids: list[int], prompt_cut: bool, answer_ids: list[int]
    ) -> tuple[list[int], list[int], int, bool, bool]:
        """A sample as `encode` returns it, with an answer that is cut if it is too long."""
        answer_cut = len(answer_ids) > self.max_output_length
        if answer_cut:
            answer_ids = [*answer_ids[: self.max_output_length - 1], answer_ids[-1]]
        labels = [IGNORE_INDEX] * len(prompt_ids) + answer_ids
        return prompt_ids + answer_ids, labels, len(labels), prompt_cut, answer_cut

    def encode_prompt(self, query: str, history: Rounds, system: str) -> tuple[list[int], bool]:
        """Token ids of a prompt, and whether it was cut; ValueError if the question has no token."""
        limit, end = self.max_input_length, self.tokenizer.prompt_end
        recent = history[-limit:]  # a round has at least one token
        ids = self.prompt_ids(query, recent, system)
        if len(ids) == end:
            raise ValueError("the question has nothing but characters that the tokenizer drops")
        if len(ids) <= limit:
            return ids, False
        if recent:
            dropped = bisect.bisect_left(
                range(len(recent)), True, key=lambda i: len(self.prompt_ids(query, recent[i:], system)) <= limit
            )
            ids = self.prompt_ids(query, recent[dropped:], system)
        ids = self.tokenizer.cut_prompt_ids(ids, limit)
        return ids, True

    def prompt_ids(self, query: str, history: Rounds, system: str) -> list[int]:
        """Token ids of a prompt, not cut."""
        return self.tokenizer.build_prompt_ids(query, history, system, self.prompt_text)


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
        remove_columns=rows.column_names,
        features=SAMPLE_FEATURES,
        num_proc=workers if workers > 1 else None,
        desc=f"Tokenizing {path}",
    )
    check_sums(samples, encoder.count(rows))
    return samples


def load_samples(path: str, encoder: SampleEncoder) -> Dataset:
    """Reads, checks and tokenizes a file of rows; logs the number of tokens and of cut samples.

    Args:
        path: of the file.
        encoder: tokenizes the rows.
    Returns:
        A Dataset with `input_ids` and `labels`, lists of int of the same length; this `length`; `line`, `element` and
        `turn`, as `Place` has them; `prompt_cut` and `answer_cut`, whether prompt and answer were cut.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: rows that cannot be used, with their places and reasons; the cache cannot be written to.
    """
    folder = cache_folder(path, ROWS_VERSION)
    samples = use_cache(folder, lambda: cached_samples(path, encoder, folder))
    without_tokens = np.flatnonzero(numpy_column(samples, "length") == 0)
    if len(without_tokens):
        first = samples.select(without_tokens[:MOST_LISTED])
        reasons = [f"{Place(row['line'], row['element'], row['turn'])}: {row['problem']}." for row in first]
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
