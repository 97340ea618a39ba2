"""A JSON parser that refuses duplicate names, NaN and Infinity, which Python's own accepts."""

import json

KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}


def parse_json(text: str) -> object:
    """Parses JSON.

    Args:
        text: one JSON value.
    Returns:
        The value, as `json.loads` returns it.
    Raises:
        ValueError: not valid JSON (`json.JSONDecodeError`), a name that occurs twice in an object, NaN or Infinity.
    """
    return json.loads(text, object_pairs_hook=unambiguous_object, parse_constant=refuse_constant)


def unambiguous_object(pairs: list[tuple[str, object]]) -> dict:
    """The dict of an object's names and values; ValueError for a name that occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"{duplicate!r} stands twice in one object; keep one of them")
    return values


def kind_of(value: object) -> str:
    """What a parsed value is in JSON, for a message."""
    return KINDS.get(type(value), "an object")


def refuse_constant(name: str):
    """ValueError: NaN, Infinity and -Infinity are not JSON."""
    raise ValueError(f"not valid JSON ({name} is no JSON number)")
