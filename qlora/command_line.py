"""Command lines from dataclasses, without importing torch or transformers: a wrong flag is answered at once.

transformers' HfArgumentParser does the same after nearly a second of imports. A field's metadata has what argparse
takes (`help`, `choices`, `nargs`, `const`, `action`), and besides

    old_names   names of an earlier release, still read but not shown
    expert      True for a flag that only `--help_all` shows
    hidden      True for a flag of an earlier release that has no present name, still read but not shown
    others      for a `dict[str, list[str]]` that is no flag itself: a function that returns the names of further
                flags, whose words the dict receives
"""

import argparse
import dataclasses
import difflib
import inspect
import logging
import sys
import typing
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments")
SHORTEST_WORDS = 6  # characters with the underscores around: `_lr_` is in lr_scheduler_type, and means another setting
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_command_line(kind: type[Arguments], args: list[str] | None = None) -> Arguments:
    """Parses flags into a dataclass; hyphens and underscores in a flag's name are alike.

    Args:
        kind: the dataclass, whose fields are str, int, float, bool, any of these or None, or list[str].
        args: the flags; by default those of the program.
    Raises:
        ValueError: an unknown flag (with the nearest known one), a value of another type or out of range.
        SystemExit: `--help`.
    """
    names = flag_names(kind)
    args = [present_name(arg, names) for arg in (sys.argv[1:] if args is None else args)]
    args, unknown = split_unknown(args, names)
    others = take_others(unknown, kind) if unknown else {}
    parsed, surplus = build_parser(kind, show_expert="--help_all" in args).parse_known_args(args)
    refuse_unknown(surplus, shown_flags(kind))
    for field in fields_of(kind):
        if field.metadata.get("hidden") and getattr(parsed, field.name) is not None:
            logger.warning("--%s is of an earlier release. %s", field.name, field.metadata["help"])
    return kind(**vars(parsed), **others)


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError where argparse prints its usage and ends the program."""

    def error(self, message: str):
        raise ValueError(f"{message}.")


def split_unknown(args: list[str], names: dict[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separates the flags with known names from the others.

    Args:
        args: flags, each followed by its words, or `--flag=word`.
        names: as `flag_names` returns them.
    Returns:
        The arguments of the known flags; and every other flag -> its words.
    """
    known: list[str] = []
    unknown: dict[str, list[str]] = {}
    words = known
    for arg in args:
        flag, equals, value = arg.partition("=")
        if flag.startswith("--") and flag not in names:
            words = unknown[flag] = [value] if equals else []
            continue
        words = known if flag in names else words
        words.append(arg)
    return known, unknown


def take_others(unknown: dict[str, list[str]], kind: type) -> dict[str, dict[str, list[str]]]:
    """The words of the further flags that a dataclass takes, under the name of its field; ValueError for any more."""
    field = others_field(kind)
    names = {f"--{name}": name for name in field.metadata["others"]()} if field else {}
    present = {flag: "--" + flag[2:].replace("-", "_") for flag in unknown}
    refuse_unknown([flag for flag in unknown if present[flag] not in names], [*shown_flags(kind), *names])
    return {field.name: {names[present[flag]]: words for flag, words in unknown.items()}} if field else {}


def refuse_unknown(unknown: list[str], known: list[str]):
    """ValueError with the nearest known flag for each argument, if there are any."""
    if unknown:
        raise ValueError("; ".join(f"unknown argument {name}{nearest(name, known)}" for name in unknown) + ".")


def fields_of(kind: Any) -> list[dataclasses.Field]:
    """The fields of a dataclass that are flags; inherited ones are the last."""
    own = inspect.get_annotations(kind)
    fields = [field for field in dataclasses.fields(kind) if "others" not in field.metadata]
    return sorted(fields, key=lambda field: field.name not in own)


def others_field(kind: Any) -> dataclasses.Field | None:
    """The field of a dataclass that receives further flags; None if it has none."""
    return next((field for field in dataclasses.fields(kind) if "others" in field.metadata), None)


def flag_names(kind: type) -> dict[str, str]:
    """Every name under which a flag is read -> its present name; all with underscores."""
    names = {"--help": "--help", "--help_all": "--help_all"}
    for field in fields_of(kind):
        flag = f"--{field.name}"
        names |= dict.fromkeys([flag, *(f"--{old}" for old in field.metadata.get("old_names", ()))], flag)
    return names


def present_name(arg: str, names: dict[str, str]) -> str:
    """An argument with its flag under its present name; as it is, if it is no known flag."""
    flag, equals, value = arg.partition("=")
    name = "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag
    return names.get(name, flag) + equals + value


def build_parser(kind: type, show_expert: bool) -> Parser:
    """The parser of a dataclass."""
    summary = (kind.__doc__ or "").splitlines()[0]
    others = others_field(kind)
    parser = Parser(
        description=summary,
        usage="%(prog)s [--FLAG VALUE ...]",
        epilog=others.metadata["help"] if others else None,
        allow_abbrev=False,
    )
    types = typing.get_type_hints(kind)
    if any(field.metadata.get("expert") for field in fields_of(kind)):
        parser.add_argument("--help_all", action="help", help="show the flags for experts, too, and exit")
    for field in fields_of(kind):
        given = field.metadata
        explicit = {name: given[name] for name in ("choices", "nargs", "const", "action") if name in given}
        is_shown = not given.get("hidden") and (show_expert or not given.get("expert"))
        help_or_not = help_text(field) if is_shown else argparse.SUPPRESS
        parser.add_argument(f"--{field.name}", **value_options(field, types[field.name]) | explicit, help=help_or_not)
    return parser


def value_options(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """What argparse needs to know of a field's type and default."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    options: dict[str, Any] = {"type": boolean if kinds[0] is bool else kinds[0]}
    if "choices" not in field.metadata:
        options["metavar"] = {int: "N", float: "X", bool: "true|false"}.get(kinds[0], "VALUE")
    if typing.get_origin(hint) is list:
        options["nargs"] = "+"
    if hint is bool:  # `--plain` alone is `--plain true`
        options |= {"nargs": "?", "const": True}
    if field.default_factory is not dataclasses.MISSING:
        options["default"] = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        options["default"] = field.default
    else:
        options["required"] = True
    return options


def boolean(text: str) -> bool:
    """`true`, `false` and the like."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return BOOLEANS[text.lower()]


def help_text(field: dataclasses.Field) -> str:
    """The help of a field with its default, where there is one."""
    default = shown_default(field)
    return (field.metadata["help"] + (f" (default: {default})" if default else "")).replace("%", "%%")


def shown_default(field: dataclasses.Field) -> str:
    """A default as the user would type it; empty where the flag has none, or where False is the default."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is None or value is False or value is dataclasses.MISSING:
        return ""
    return " ".join(value) if isinstance(value, list) else str(value)


def shown_flags(kind: type) -> list[str]:
    """Every flag that `--help_all` shows."""
    return [f"--{field.name}" for field in fields_of(kind) if not field.metadata.get("hidden")]


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean X?)`: the first known name that has these words among its own, or else one of like spelling.

    Nothing where there is neither.
    """
    words = f"_{name.lstrip('-').replace('-', '_')}_"
    longer = [other for other in known if len(words) >= SHORTEST_WORDS and words in f"_{other.lstrip('-')}_"]
    matches = longer or difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
