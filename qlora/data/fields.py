"""The fields of a data row: texts, and names that are misspelt."""

import functools
from difflib import get_close_matches

from qlora.data.strict_json import kind_of


def check_spelling(row: dict, *names: str):
    """ValueError if an optional field is missing and another has a similar name; other unknown fields are ignored."""
    for name in names:
        similar = [] if name in row else [field for field in row if resembles(field, name)]
        if similar:
            raise ValueError(f"unknown field '{similar[0]}' (did you mean '{name}'?)")


@functools.lru_cache  # a comparison takes longer than parsing a row, and all rows of a file have the same few fields
def resembles(field: str, name: str) -> bool:
    """Whether a field's name is so similar to another that it is probably a misspelling of it."""
    return bool(get_close_matches(name, [field.lower()], cutoff=0.8))


def text_field(row: dict, *names: str, of: str = "row") -> str:
    """The text of the first of these fields in a row; ValueError without one, or if it is no string or blank."""
    name = first_field(row, *names, of=of)
    text = string(row[name], name)
    if not text.strip():
        raise ValueError(f"field '{name}' is empty")
    return text


def first_field(row: dict, *names: str, of: str = "row") -> str:
    """The first of these names that the row has; ValueError without one."""
    name = next((name for name in names if name in row), None)
    if name is None:
        check_spelling(row, *names)
        raise ValueError(f"field '{names[0]}' is missing; the {of} has {', '.join(map(repr, row)) or 'no fields'}")
    return name


def optional_text(row: dict, name: str) -> str:
    """The text of a field, empty where there is none or a blank one; ValueError if it is no string."""
    text = string(row[name], name) if row.get(name) is not None else ""
    return text if text.strip() else ""


def string(value: object, name: str) -> str:
    """The value of a field; ValueError if it is no string."""
    if not isinstance(value, str):
        raise ValueError(f"field '{name}' must be a string, found {kind_of(value)}")
    return check_text(value)


def check_text(text: str) -> str:
    """The text; ValueError for a lone surrogate, which an escape in JSON can express and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate (\\u{ord(text[error.start]):04x}), which is half a character") from error
    return text
