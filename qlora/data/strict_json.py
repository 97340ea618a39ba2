"""JSON to the letter, for what a user writes by hand or with a script."""

import json


def parse_json(text: str) -> object:
    """Parses JSON that says one thing only.

    Raises:
        ValueError: not valid JSON (`json.JSONDecodeError`), or what Python's own parser would take all the same: a
            name that stands twice in an object, NaN, Infinity.
    """
    return json.loads(text, object_pairs_hook=unambiguous_object, parse_constant=refuse_constant)


def unambiguous_object(pairs: list[tuple[str, object]]) -> dict:
    """An object in which no name stands twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"{twice!r} stands twice in one object; keep one of them")
    return values


def refuse_constant(name: str):
    """NaN, Infinity and -Infinity are no JSON."""
    raise ValueError(f"not valid JSON ({name} is no JSON number)")
