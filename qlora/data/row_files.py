"""The rows of a file, one JSON value a line or in one array, and the message that lists those that cannot be used."""

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

LONGEST_LINE = 2**24  # bytes; a file with a longer line probably has no line breaks
LONGEST_REASON = 200  # characters of an error's reason, which may quote the row, in a message
MOST_LISTED = 10  # bad rows that a message lists
BLANKS = re.compile(r"[ \t\r\n]*")  # what JSON allows between values
ELEMENT = json.JSONDecoder(parse_int=str, parse_float=str)  # finds the end of an element, which is parsed later
Parsed = TypeVar("Parsed")


class Place(NamedTuple):
    """Where a row is: its line from 1, and its number from 1 in an array, or 0 where a row is a line.

    And the turn of its conversation from 1, or 0 for the whole row.
    """

    line: int
    element: int = 0
    turn: int = 0

    def __str__(self) -> str:
        row = f"element {self.element} (line {self.line})" if self.element else f"line {self.line}"
        return f"{row}, turn {self.turn}" if self.turn else row


Text: TypeAlias = str | Exception  # of a row, or why it has none


def read_json_rows(path: str, parse: Callable[[str], Parsed]) -> Iterator[tuple[Place, Parsed]]:
    """Parses the elements of a JSON array, if the first character of the file is `[`; otherwise as `read_lines`."""
    return parse_each(path, split_array(path) if is_array(path) else split_lines(path), parse)


def read_lines(path: str, parse: Callable[[str], Parsed]) -> Iterator[tuple[Place, Parsed]]:
    """Parses every line that is not empty.

    Args:
        path: of the file, in UTF-8, with or without a byte order mark.
        parse: text of a line -> its value; it raises ValueError with the reason for a line that cannot be used.
    Yields:
        The place of the line and its value; none after the first line that cannot be used.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: at the end of the file, with place and reason of the first lines that cannot be used.
    """
    return parse_each(path, split_lines(path), parse)


def parse_lines(path: str, lines: Iterable[bytes], parse: Callable[[str], Parsed]) -> Iterator[tuple[Place, Parsed]]:
    """Parses the lines of an open file, as `read_lines` does; `path` is for the messages."""
    texts = ((Place(number), decode(line)) for number, line in enumerate(lines, 1) if line.strip())
    return parse_each(path, texts, parse)


def parse_each(
    path: str, texts: Iterable[tuple[Place, Text]], parse: Callable[[str], Parsed]
) -> Iterator[tuple[Place, Parsed]]:
    """Parses texts with their places; see `read_lines`."""
    reasons: list[str] = []
    count = 0
    for place, text in texts:
        try:
            if isinstance(text, Exception):
                raise text
            parsed = parse(text)
        except (ValueError, RecursionError) as error:
            count += 1
            if count <= MOST_LISTED:
                reasons.append(f"{place}: {describe(error)}.")
        else:
            if not count:
                yield place, parsed
    if count:
        raise bad_rows(path, reasons, count)


def bad_rows(path: str, reasons: list[str], count: int) -> ValueError:
    """The error of a file with `count` bad rows; `reasons` has the place and the reason of each of the first ones."""
    if count == 1:
        return ValueError(f"{path}, {reasons[0]}")
    more = [f"and {count - len(reasons):,} more."] if count > len(reasons) else []
    return ValueError("\n- ".join([f"{path} has {count:,} rows that cannot be used:", *reasons, *more]))


def data_file(path: str) -> Path:
    """The path of a file that exists; FileNotFoundError with a hint otherwise."""
    if not Path(path).is_file():
        hint = ""
        if Path(path).is_dir():
            hint = " It is a folder: name the file in it."
        elif ":" in path:
            hint = " What follows the colon is no weight."
        raise FileNotFoundError(f"there is no data file {path}.{hint}")
    return Path(path)


def update_hash(digest: "hashlib._Hash", path: str):
    """Adds the content of a file to a hash, a part at a time; errors as for `data_file`."""
    with data_file(path).open("rb") as file:
        for piece in iter(lambda: file.read(2**20), b""):
            digest.update(piece)


def split_lines(path: str) -> Iterator[tuple[Place, Text]]:
    """The text of each line that is not empty."""
    with data_file(path).open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if line.strip():
                yield Place(number), decode(line, "utf-8-sig" if number == 1 else "utf-8")
            while len(line) > LONGEST_LINE and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = file.readline(LONGEST_LINE + 1)


def decode(line: bytes, encoding: str = "utf-8") -> Text:
    """The text of a line; the error of one that is too long or not in the encoding."""
    if len(line) > LONGEST_LINE:
        return ValueError(f"longer than {LONGEST_LINE:,} bytes; expected one JSON object a line")
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        return error


def is_array(path: str) -> bool:
    """Whether the first character of a file is the bracket of a JSON array."""
    with data_file(path).open("rb") as file:
        pieces = iter(lambda: file.readline(LONGEST_LINE).removeprefix(codecs.BOM_UTF8), b"")
        return next((piece for piece in pieces if piece.strip()), b"").lstrip().startswith(b"[")


def split_array(path: str) -> Iterator[tuple[Place, Text]]:
    """The text of each element of a JSON array; where the array is not valid JSON, the error, and no element more."""
    content = data_file(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].split(b"\n")
        yield Place(len(before)), decode(content[error.start - len(before[-1]) :].partition(b"\n")[0])
        return
    del content  # an array may have gigabytes
    yield from split_elements(text)


def split_elements(text: str) -> Iterator[tuple[Place, Text]]:
    """The text of each element, as `split_array`; `text` begins with a bracket, or blanks and a bracket."""
    line, counted, position = 1, 0, text.index("[")  # a bracket or comma: an element begins after it
    is_empty = text.startswith("]", skip_blanks(text, position + 1))
    for number in itertools.count(1):
        start = skip_blanks(text, position + 1)
        if is_empty or text[position] == "]":
            break
        line, counted = line + text.count("\n", counted, start), start
        try:
            _, end = ELEMENT.raw_decode(text, start)
            position = skip_blanks(text, end)
            if not text.startswith((",", "]"), position):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            yield Place(getattr(error, "lineno", line), number), error
            return
        yield Place(line, number), text[start:end]
    rest = skip_blanks(text, start + is_empty)
    if rest < len(text):
        extra = json.JSONDecodeError("Extra data", text, rest)
        yield Place(extra.lineno), extra


def skip_blanks(text: str, position: int) -> int:
    """The position of the next character that is not blank."""
    return BLANKS.match(text, position).end()  # type: ignore[union-attr]  # it matches everywhere


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
