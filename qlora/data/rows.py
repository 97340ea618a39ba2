"""Data rows of jsonl files; a row that cannot be used is reported with file, line number and reason."""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar, cast

from chatglm.chat import build_prompt
from qlora.data.strict_json import parse_json

ROWS_VERSION = 3  # in the key of cached rows: raise it with every change of what is accepted or what a row becomes
LONGEST_LINE = 2**24  # bytes; a file with a longer line probably has no line breaks
LONGEST_REASON = 200  # characters of an error's reason, which may quote the row, in a message
Parsed = TypeVar("Parsed")


@dataclass
class Row:
    """One checked data row: the question, the [question, answer] pairs before it, and the answer."""

    query: str
    history: list[list[str]]
    answer: str


def read_rows(path: str) -> Iterator[dict]:
    """Reads and checks the data rows of a jsonl file.

    A row has `instruction` (or AdvertiseGen's `content`), `output` (or `summary`), and optionally `input`, which is
    appended to the instruction on a new line, and `history`, a list of [question, answer] pairs. Empty lines are
    skipped.

    Args:
        path: of the file, in UTF-8, with or without a byte order mark.
    Yields:
        Dicts of `line`, the number of the line from 1, `query`, `history` and `answer`.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that cannot be trained on, with file, line number and reason; or a file without rows.
    """
    empty = True
    for number, row in read_lines(path, lambda text: parse_row(parse_json(text))):
        empty = False
        yield {"line": number, **vars(row)}
    if empty:
        raise ValueError(f"{path} has no rows.")


def read_prompts(path: str) -> dict[str, str]:
    """Reads the prompts of a file.

    Args:
        path: of a `.jsonl` file of rows, which need no `output` here, or of strings; of a `.json` file with one array
            of these; or of a text file with one prompt a line.
    Returns:
        Where each prompt stands -> the prompt, in the order of the file, with history as `build_prompt` formats it.
    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        numbered, unit = read_array(path, parse_prompt), "entry"
    else:
        parse = (lambda text: parse_prompt(parse_json(text))) if suffix == ".jsonl" else str.strip
        numbered, unit = read_lines(path, parse), "line"
    prompts = {f"{path}, {unit} {number}": prompt for number, prompt in numbered if prompt}
    if not prompts:
        raise ValueError(f"{path} has no prompts.")
    return prompts


def parse_prompt(value: object) -> str:
    """The prompt of a string or of a row; ValueError with the reason for another value."""
    return check_text(value) if isinstance(value, str) else build_prompt(*parse_query(value))


def read_array(path: str, parse: Callable[[object], Parsed]) -> Iterator[tuple[int, Parsed]]:
    """Parses every entry of a file with one JSON array.

    Args:
        path: of the file.
        parse: entry -> its value; it raises ValueError with the reason for an entry that cannot be used.
    Yields:
        The number of the entry, from 1, and its value.
    Raises:
        FileNotFoundError, ValueError: as `read_lines`.
    """
    lines = dict(read_lines(path, str))
    try:
        entries = parse_json("".join(lines.get(number, "\n") for number in range(1, max(lines, default=0) + 1)))
        if not isinstance(entries, list):
            raise ValueError(f"expected an array, found a {type(entries).__name__}")
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"{path}{line}: {describe(error)}. A .json file holds one array; name one with a JSON a line .jsonl."
        raise ValueError(reason) from error
    for number, entry in enumerate(entries, 1):
        try:
            yield number, parse(entry)
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {describe(error)}.") from error


def read_lines(path: str, parse: Callable[[str], Parsed]) -> Iterator[tuple[int, Parsed]]:
    """Parses every line that is not empty.

    Args:
        path: of the file.
        parse: text of a line -> its value; it raises ValueError with the reason for a line that cannot be used.
    Yields:
        The number of the line, from 1, and its value.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: of `parse` or of the decoding, with file and line number added.
    """
    if not Path(path).is_file():
        hint = ""
        if Path(path).is_dir():
            hint = " It is a folder: name the file in it."
        elif ":" in path:
            hint = " What follows the colon is no weight."
        raise FileNotFoundError(f"there is no data file {path}.{hint}")
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if line.strip():
                try:
                    parsed = parse(decode(line, "utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: {describe(error)}.") from error
                yield number, parsed


def decode(line: bytes, encoding: str) -> str:
    """The text of a line; ValueError for one that is too long or not in the encoding."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes; expected one JSON object a line")
    return line.decode(encoding)


def describe(error: Exception) -> str:
    """The reason of an error, for the message to the user; cut to LONGEST_REASON characters."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8 (byte {error.start + 1} of the line)"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    reason = str(error)
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} (and more)"


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
