"""From jsonl rows to token ids: every row is checked, then tokenised with the datasets library and its cache."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizer

from chatglm.chat import build_prompt

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
ROW_FEATURES = Features(
    {
        "query": Value("string"),
        "history": List(List(Value("string"))),
        "answer": Value("string"),
        "line": Value("int64"),
    }
)
Parsed = TypeVar("Parsed")
TOKENIZER_PROCESSES = 8  # at most; starting more costs more than it saves


@dataclass
class Row:
    """One checked sample: what is asked, the rounds before it, and the answer."""

    query: str
    history: list[list[str]]
    answer: str


def read_rows(path: str) -> Iterator[dict]:
    """Yields the checked rows of a jsonl file as dicts of `query`, `history`, `answer` and `line`, its number.

    A row has `instruction` (or AdvertiseGen's `content`), `output` (or `summary`), and optionally `input`, which is
    put below the instruction, and `history`, a list of [question, answer] pairs. Empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that cannot be trained on, with file, line number and reason.
    """
    empty = True
    for number, row in read_lines(path, lambda text: check_row(json.loads(text))):
        empty = False
        yield vars(row) | {"line": number}
    if empty:
        raise ValueError(f"{path} has no rows.")


def read_prompts(path: str) -> list[str]:
    """Prompts of a file: from the rows of a `.jsonl`, which need no `output` here, or one on each line of a text.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    is_text = Path(path).suffix != ".jsonl"
    prompt_of = str.strip if is_text else lambda text: build_prompt(*check_query(json.loads(text)))
    prompts = [prompt for _, prompt in read_lines(path, prompt_of) if prompt]
    if not prompts:
        raise ValueError(f"{path} has no prompts.")
    return prompts


def check_data_files(*paths: str | None):
    """FileNotFoundError unless every path that is given is a file."""
    for path in paths:
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"there is no data file {path}.")


def read_lines(path: str, parse: Callable[[str], Parsed]) -> Iterator[tuple[int, Parsed]]:
    """Number and parsed content of every line that is not empty; a failure names file, line number and reason."""
    check_data_files(path)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    parsed = parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: {describe(error)}.") from error
                yield number, parsed


def describe(error: Exception) -> str:
    """The reason in words a user of the file understands."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8 (byte {error.start + 1} of the line)"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def check_row(row: object) -> Row:
    """A row from parsed JSON; ValueError says what is wrong with it."""
    query, history = check_query(row)
    return Row(query, history, text_field(row, "output", "summary"))


def check_query(row: object) -> tuple[str, list[list[str]]]:
    """What a row asks, and the rounds before it."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with instruction and output, found a {type(row).__name__}")
    query = text_field(row, "instruction", "content")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise ValueError(f"field 'input' must be a string, found a {type(extra).__name__}")
    if extra and extra.strip():
        query = f"{query}\n{check_text(extra)}"
    return query, check_history(row.get("history"))


def text_field(row: dict, *names: str) -> str:
    """The first of the named fields that the row has; it must be a string with something in it."""
    name = next((name for name in names if name in row), None)
    if name is None:
        raise ValueError(f"field '{names[0]}' is missing; the row has {', '.join(map(repr, row)) or 'no fields'}")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"field '{name}' must be a string, found a {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"field '{name}' is empty")
    return check_text(value)


def check_text(text: str) -> str:
    """The text, if it is one: JSON can spell halves of characters that no text has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate (\\u{ord(text[error.start]):04x}), which is half a character") from error
    return text


def check_history(history: object) -> list[list[str]]:
    """The rounds before this one; None is no rounds."""
    if history is None:
        return []
    if not isinstance(history, list) or not all(map(is_round, history)):
        raise ValueError("field 'history' must be a list of [question, answer] pairs of strings")
    for turn in history:
        check_text("".join(turn))
    return history


def is_round(turn: object) -> bool:
    """A [question, answer] pair of strings."""
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


@dataclass
class SampleEncoder:
    """Turns rows into `prompt [gMASK] <sop> answer <eop>` with labels on the answer and `<eop>`.

    Control tokens written in a row stay text. A prompt that is too long first loses its oldest rounds, then its end;
    an answer that is too long loses its end.
    """

    tokenizer: PreTrainedTokenizer
    prompt_text: str
    max_input_length: int
    max_output_length: int
    version: int = 2  # to be raised when the code changes what comes out: the cache of datasets goes by the fields

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """A batch of rows -> `input_ids`, `labels`, `length`, `prompt_cut`, `answer_cut`."""
        columns = {"input_ids": [], "labels": [], "length": [], "prompt_cut": [], "answer_cut": []}
        for sample in map(self.encode, rows["query"], rows["history"], rows["answer"]):
            for name, value in zip(columns, sample, strict=True):
                columns[name].append(value)
        return columns

    def encode(
        self, query: str, history: list[list[str]], answer: str
    ) -> tuple[list[int], list[int], int, bool, bool]:
        """One row -> ids, labels, number of tokens, whether the prompt was cut, whether the answer was cut."""
        rounds = list(history)
        prompt_ids = self.text_ids(self.prompt_text + build_prompt(query, rounds))
        prompt_room, answer_room = self.max_input_length - 2, self.max_output_length - 1
        prompt_cut = len(prompt_ids) > prompt_room
        while rounds and len(prompt_ids) > prompt_room:
            rounds.pop(0)
            prompt_ids = self.text_ids(self.prompt_text + build_prompt(query, rounds))
        answer_ids = self.text_ids(answer)
        answer_cut = len(answer_ids) > answer_room
        prompt_ids, answer_ids = prompt_ids[:prompt_room], answer_ids[:answer_room]
        input_ids = self.tokenizer.build_inputs_with_special_tokens(prompt_ids, answer_ids)
        prompt_length = len(prompt_ids) + 2
        labels = [IGNORE_INDEX] * prompt_length + input_ids[prompt_length:]
        return input_ids, labels, len(input_ids), prompt_cut, answer_cut

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def load_rows(path: str) -> Dataset:
    """The checked rows of a file, cached by its path, size and time of change, and by the columns."""
    source = Path(path)
    stat = source.stat() if source.is_file() else None
    version = f"{source.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{[*ROW_FEATURES]}" if stat else path
    try:
        return Dataset.from_generator(
            read_rows,
            features=ROW_FEATURES,
            gen_kwargs={"path": path},
            fingerprint=hashlib.sha256(version.encode()).hexdigest()[:16],
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def load_samples(path: str, encoder: SampleEncoder) -> Dataset:
    """Reads, checks and tokenises a jsonl file; says how many tokens it has and how much was cut.

    Returns:
        A Dataset with `input_ids` and `labels`, lists of int of equal length, that `length`, and the row's `line`.
    Raises:
        FileNotFoundError, ValueError: see `read_rows`; also for a file without rows.
    """
    rows = load_rows(path)
    workers = min(TOKENIZER_PROCESSES, os.cpu_count() or 1, 1 + len(rows) // 5000)
    samples = rows.map(
        encoder,
        batched=True,
        remove_columns=["query", "history", "answer"],
        num_proc=workers if workers > 1 else None,
        desc=f"Tokenizing {path}",
    )
    report(path, samples)
    return samples.remove_columns(["prompt_cut", "answer_cut"])


def report(path: str, samples: Dataset):
    """One line on the size of a data set and on what was cut."""
    lengths = samples["length"]
    prompts_cut, answers_cut = sum(samples["prompt_cut"]), sum(samples["answer_cut"])
    logger.info(
        "%s: %d samples, %d tokens (mean %.1f, longest %d); cut to the length limits: %d prompts, %d answers",
        *(path, len(lengths), sum(lengths), sum(lengths) / len(lengths), max(lengths), prompts_cut, answers_cut),
    )
