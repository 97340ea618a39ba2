"""Rows of jsonl files: each is checked, and one that cannot be used is named by file, line number and reason."""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar, cast

from chatglm.chat import build_prompt
from qlora.data.strict_json import parse_json

LONGEST_LINE = 2**24  # bytes; a longer one is no sample, but a file without line ends
LONGEST_REASON = 200  # characters of a row that a message may repeat
Parsed = TypeVar("Parsed")


@dataclass
class Row:
    """One checked sample: what is asked, the rounds before it, and the answer."""

    query: str
    history: list[list[str]]
    answer: str


def read_rows(path: str) -> Iterator[dict]:
    """Yields the checked rows of a jsonl file as dicts of `line`, its number, `query`, `history` and `answer`.

    A row has `instruction` (or AdvertiseGen's `content`), `output` (or `summary`), and optionally `input`, which is
    put below the instruction, and `history`, a list of [question, answer] pairs. Empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that cannot be trained on, with file, line number and reason.
    """
    empty = True
    for number, row in read_lines(path, lambda text: check_row(parse_json(text))):
        empty = False
        yield {"line": number, **vars(row)}
    if empty:
        raise ValueError(f"{path} has no rows.")


def read_prompts(path: str) -> list[str]:
    """Prompts of a file: from the rows of a `.jsonl`, which need no `output` here, or one on each line of a text.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    is_text = Path(path).suffix != ".jsonl"
    prompt_of = str.strip if is_text else lambda text: build_prompt(*check_query(parse_json(text)))
    prompts = [prompt for _, prompt in read_lines(path, prompt_of) if prompt]
    if not prompts:
        raise ValueError(f"{path} has no prompts.")
    return prompts


def read_lines(path: str, parse: Callable[[str], Parsed]) -> Iterator[tuple[int, Parsed]]:
    """Parses every line that is not empty, and gives its number; a failure names file, line number and reason."""
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
    """The text of a line, unless it is too long to be one."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes; expected one JSON object a line")
    return line.decode(encoding)


def describe(error: Exception) -> str:
    """The reason in words a user of the file understands."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8 (byte {error.start + 1} of the line)"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    reason = str(error)
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} (and more)"


def check_row(row: object) -> Row:
    """A row from parsed JSON; ValueError says what is wrong with it."""
    query, history = check_query(row)
    return Row(query, history, text_field(cast(dict, row), "output", "summary"))


def check_query(row: object) -> tuple[str, list[list[str]]]:
    """What a row asks, and the rounds before it."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with instruction and output, found a {type(row).__name__}")
    query = text_field(row, "instruction", "content")
    for name in ("input", "history"):
        check_spelling(row, name)
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise ValueError(f"field 'input' must be a string, found a {type(extra).__name__}")
    if extra and extra.strip():
        query = f"{query}\n{check_text(extra)}"
    return query, check_history(row.get("history"))


def check_spelling(row: dict, name: str):
    """A field that may be missing must not be so because it is misspelt; other fields are nobody's concern."""
    near = [] if name in row else [field for field in row if resembles(field, name)]
    if near:
        raise ValueError(f"unknown field '{near[0]}' (did you mean '{name}'?)")


@functools.lru_cache  # the rows of a file have the same few fields, and to compare takes longer than to read a row
def resembles(field: str, name: str) -> bool:
    """Whether a field looks like a name with a slip in it."""
    return bool(get_close_matches(name, [field.lower()], cutoff=0.8))


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
