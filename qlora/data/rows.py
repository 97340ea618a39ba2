"""What a data row may hold; a row that cannot be used is reported with file, place and reason."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from chatglm.chat import build_prompt
from qlora.data.row_files import read_json_rows, read_lines
from qlora.data.strict_json import parse_json

ROWS_VERSION = 4  # in the key of cached rows: raise it with every change of what is accepted or what a row becomes


@dataclass
class Row:
    """One checked data row: the question, the [question, answer] pairs before it, and the answer."""

    query: str
    history: list[list[str]]
    answer: str


def read_rows(path: str) -> Iterator[dict]:
    """Reads and checks the data rows of a file: one JSON object a line, or an array of objects.

    A row has `instruction` (or AdvertiseGen's `content`), `output` (or `summary`), and optionally `input`, which is
    appended to the instruction on a new line, and `history`, a list of [question, answer] pairs. Empty lines are
    skipped.

    Args:
        path: of the file, in UTF-8, with or without a byte order mark.
    Yields:
        Dicts of `line`, the number of the line from 1, `element`, the number in the array from 1 (0 without an array),
        `query`, `history` and `answer`.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: rows that cannot be trained on, with file, place and reason; or a file without rows.
    """
    empty = True
    for place, row in read_json_rows(path, lambda text: parse_row(parse_json(text))):
        empty = False
        yield {**place._asdict(), **vars(row)}
    if empty:
        raise ValueError(f"{path} has no rows.")


def read_prompts(path: str) -> dict[str, str]:
    """Reads the prompts of a file.

    Args:
        path: of a `.jsonl` or `.json` file of rows, which need no `output` here, or of strings, one a line or in an
            array; or of a text file with one prompt a line.
    Returns:
        Where each prompt stands -> the prompt, in the order of the file, with history as `build_prompt` formats it.
    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    if Path(path).suffix.lower() in (".jsonl", ".json"):
        places = read_json_rows(path, lambda text: parse_prompt(parse_json(text)))
    else:
        places = read_lines(path, str.strip)
    prompts = {f"{path}, {place}": prompt for place, prompt in places if prompt}
    if not prompts:
        raise ValueError(f"{path} has no prompts.")
    return prompts


def parse_prompt(value: object) -> str:
    """The prompt of a string or of a row; ValueError with the reason for another value."""
    return check_text(value) if isinstance(value, str) else build_prompt(*parse_query(value))


def parse_row(row: object) -> Row:
    """The checked row of a parsed line; ValueError with the reason if it cannot be trained on."""
    query, history = parse_query(row)
    return Row(query, history, text_field(cast(dict, row), "output", "summary"))


def parse_query(row: object) -> tuple[str, list[list[str]]]:
    """The question of a row, with its `input`, and its history; ValueError with the reason if one cannot be used."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with instruction and output, found a {type(row).__name__}")
    query = text_field(row, "instruction", "content")
    for name in ("input", "history"):
        check_spelling(row, name)
    input_text = row.get("input")
    if input_text is not None and not isinstance(input_text, str):
        raise ValueError(f"field 'input' must be a string, found a {type(input_text).__name__}")
    if input_text and input_text.strip():
        query = f"{query}\n{check_text(input_text)}"
    return query, check_history(row.get("history"))


def check_spelling(row: dict, name: str):
    """ValueError if an optional field is missing and another has a similar name; other unknown fields are ignored."""
    similar = [] if name in row else [field for field in row if resembles(field, name)]
    if similar:
        raise ValueError(f"unknown field '{similar[0]}' (did you mean '{name}'?)")


@functools.lru_cache  # a comparison takes longer than parsing a row, and all rows of a file have the same few fields
def resembles(field: str, name: str) -> bool:
    """Whether a field's name is so similar to another that it is probably a misspelling of it."""
    return bool(get_close_matches(name, [field.lower()], cutoff=0.8))


def text_field(row: dict, *names: str) -> str:
    """The text of the first of these fields in the row; ValueError without one, or if it is no string or blank."""
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
    """The text; ValueError for a lone surrogate, which an escape in JSON can express and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate (\\u{ord(text[error.start]):04x}), which is half a character") from error
    return text


def check_history(history: object) -> list[list[str]]:
    """The [question, answer] pairs of a row's history; an empty list for None. ValueError for anything else."""
    if history is None:
        return []
    if not isinstance(history, list) or not all(map(is_round, history)):
        raise ValueError("field 'history' must be a list of [question, answer] pairs of strings")
    for turn in history:
        check_text("".join(turn))
    return history


def is_round(turn: object) -> bool:
    """Whether a value is a [question, answer] pair of strings."""
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
