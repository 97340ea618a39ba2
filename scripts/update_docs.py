"""Write the tables of flags from the code, and the tables of figures from docs/benchmarks.jsonl.

    python scripts/update_docs.py             # rewrites the tables
    python scripts/update_docs.py --check     # ends with an error if one of them is out of date

A table is between `<!-- flags: common -->` or `<!-- flags: expert -->` and `<!-- end of flags -->`. In pages in
Chinese, `*_zh.md`, the meanings are not changed; flags and defaults come from the code.

A row of a table of figures has `<!-- measured: NAME -->` in a column. Those after it come from the newest record of
this name, as `scripts/benchmark.py --record docs/benchmarks.jsonl` adds them; all rows of a table must have been
measured with the same version on the same kind of machine.
"""

import os
import re
from dataclasses import Field, dataclass, field
from pathlib import Path

from qlora.arguments import FinetuneArguments
from qlora.benchmark.records import check_comparable, newest_records
from qlora.command_line import fields_of, parse_command_line, shown_default
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLE = re.compile(r"(<!-- flags: (\w+) -->\n(?:\|[^\n]*\n){2})((?:\|[^\n]*\n)*)(<!-- end of flags -->)")
ROWS = re.compile(r"(?:^\|[^\n]*\n)+", re.M)  # of any table
MEASURED = re.compile(r"^(\|[^\n]*<!-- measured: (.+?) -->[^|\n]*\|)([^\n]*)\|$", re.M)
ROW = re.compile(r"^\| `--(\w+)` \|.*?\| (.*) \|$", re.M)
CONTROL_TOKEN = re.compile(r"(\[gMASK\]|<\w+>)")


@dataclass
class DocsArguments:
    """Whether to rewrite the tables or only to check them."""

    check: bool = field(default=False, metadata={"help": "Change nothing; fail if a table is out of date."})


@one_line_on_interrupt()
def main():
    with message_instead_of_traceback():
        args = parse_command_line(DocsArguments)
        os.chdir(DOCS.parent)  # from where the defaults are shown
        records = newest_records(DOCS / "benchmarks.jsonl")
        for page in sorted([*DOCS.glob("*.md"), *DOCS.parent.glob("README*.md")]):
            text = page.read_text(encoding="utf-8")
            updated = TABLE.sub(lambda table, page=page: rewritten(table, page), text)
            updated = ROWS.sub(lambda rows: measured_rows(rows.group(), records), updated)
            if updated != text and args.check:
                raise ValueError(f"{page} is out of date: run `python scripts/update_docs.py`.")
            if updated != text:
                page.write_text(updated, encoding="utf-8")
                print(f"Updated {page}")


def rewritten(table: re.Match, page: Path) -> str:
    """A table with the flags of the code; a page in Chinese keeps its own meanings."""
    head, audience, rows, end = table.groups()
    given = dict(ROW.findall(rows)) if page.stem.endswith("_zh") else None
    shown = [flag for flag in fields_of(FinetuneArguments) if audience_of(flag) == audience]
    missing = [flag.name for flag in shown if given is not None and flag.name not in given]
    if missing:
        raise ValueError(f"{page}: the table needs a row with a meaning for --{', --'.join(missing)}.")
    lines = [row(flag, meaning(flag) if given is None else given[flag.name]) for flag in shown]
    return head + "".join(lines) + end


def measured_rows(rows: str, records: dict[str, dict]) -> str:
    """The rows of a table, with the figures of those that have a record."""
    names = [name for _, name, _ in MEASURED.findall(rows)]
    for name in names:
        if name not in records:
            raise ValueError(f"docs/benchmarks.jsonl has no record {name!r}.")
    check_comparable(records[name] for name in names)
    return MEASURED.sub(lambda row: measured_row(row, records), rows)


def measured_row(row: re.Match, records: dict[str, dict]) -> str:
    """A row of a table of figures, with as many columns as it has."""
    head, name, columns = row.groups()
    count = columns.count("|") + 1
    cells = figures(records[name]) + [""] * count
    return head + "".join(f" {cell} |" if cell else " |" for cell in cells[:count])


def figures(record: dict) -> list[str]:
    """The figures of a record as they are shown: of training tokens/s, memory, predicted memory, and busy share."""
    if "tokens_per_second" not in record:
        return [f"{record['tokens_per_second_batch_1']:,}"]
    memory = [f"{record[key]:.1f} GiB" for key in ("peak_memory_gib", "predicted_memory_gib")]
    return [f"{record['tokens_per_second']:,}", *memory, f"{record['gpu_busy']:.0%}"]


def audience_of(flag: Field) -> str:
    """Whether `--help` shows a flag ("common"), only `--help_all` does ("expert"), or neither ("hidden")."""
    if flag.metadata.get("hidden"):
        return "hidden"
    return "expert" if flag.metadata.get("expert") else "common"


def row(flag: Field, meaning: str) -> str:
    """A row of the table."""
    default = shown_default(flag)
    return f"| `--{flag.name}` | {f'`{default}` ' if default else ''}| {meaning} |\n"


def meaning(flag: Field) -> str:
    """The help of a flag, with control tokens as code."""
    return CONTROL_TOKEN.sub(r"`\1`", flag.metadata["help"])


if __name__ == "__main__":
    main()
