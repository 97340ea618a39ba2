"""Convert the official AdvertiseGen download to this project's row format.

Usage:
    python scripts/convert_advertisegen.py AdvertiseGen/ [--output_dir data/adgen] [--overwrite]

The source is the folder with train.json and dev.json, or the .tar.gz with this folder. Each line of these files is
{"content": ..., "summary": ...}; each line of the output is {"instruction": ..., "output": ...}.
"""

import argparse
import gzip
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from qlora.atomic import writing
from qlora.data.fields import text_field
from qlora.data.row_files import parse_lines
from qlora.data.strict_json import kind_of, parse_json
from qlora.errors import one_line_on_interrupt

SPLITS = ("train", "dev")
FIELDS = {"content": "instruction", "summary": "output"}  # name in AdvertiseGen -> name in this project's rows


def check_source(source: Path) -> None:
    """FileNotFoundError for a folder or archive that does not exist, or a folder without one of the two files."""
    if not source.exists():
        raise FileNotFoundError(f"there is no folder or archive {source}; docs/data.md says where to download it")
    missing = [f"{split}.json" for split in SPLITS if source.is_dir() and not (source / f"{split}.json").is_file()]
    if missing:
        raise FileNotFoundError(f"the folder {source} has no {' and no '.join(missing)}")


@contextmanager
def open_split(source: Path, name: str) -> Iterator[Iterable[bytes]]:
    """Open a file of a folder or of a .tar.gz; nothing is extracted to disk.

    Args:
        source: of the folder or archive.
        name: of the file, in any folder of the archive.
    Yields:
        Its lines.
    Raises:
        ValueError: the archive is damaged, or has no file of this name, or several.
    """
    with ExitStack() as stack:
        if source.is_dir():
            yield stack.enter_context((source / name).open("rb"))
            return
        archive = stack.enter_context(tarfile.open(source, "r:gz"))
        members = [m for m in archive if m.isfile() and PurePosixPath(m.name).name == name]
        if len(members) != 1:
            raise ValueError(f"{source}: expected one file named {name} in the archive, found {len(members)}")
        yield stack.enter_context(archive.extractfile(members[0]))


def convert_row(text: str) -> bytes:
    """Convert one line of AdvertiseGen to a row of this project.

    Raises:
        ValueError: the line is not a JSON object, or has no text in a field; the message gives the reason.
    """
    row = parse_json(text)
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {kind_of(row)}")
    converted = {target_name: text_field(row, source_name) for source_name, target_name in FIELDS.items()}
    return (json.dumps(converted, ensure_ascii=False) + "\n").encode("utf-8")


def convert_split(source: Path, name: str, target: Path) -> int:
    """Convert one file, without its empty lines.

    Args:
        source: folder or .tar.gz.
        name: of the file in it.
        target: file to write.
    Returns:
        Number of rows.
    Raises:
        ValueError: lines that cannot be converted, with file, line numbers and reasons; or the file has no rows.
    """
    rows = 0
    with open_split(source, name) as lines, target.open("wb") as output:
        for _, row in parse_lines(str(source / name), lines, convert_row):
            output.write(row)
            rows += 1
    if rows == 0:
        raise ValueError(f"{source / name} has no rows")
    return rows


def convert(source: Path, output_dir: Path, overwrite: bool) -> None:
    """Convert both files under temporary names, and rename them when both are complete.

    Args:
        source: folder or .tar.gz.
        output_dir: folder to write into.
        overwrite: whether existing files are replaced.
    Raises:
        FileNotFoundError: see `check_source`.
        ValueError: a file exists and `overwrite` is False, or see `convert_split`.
    """
    check_source(source)
    targets = {split: output_dir / f"{split}.jsonl" for split in SPLITS}
    existing = [str(target) for target in targets.values() if target.exists()]
    if existing and not overwrite:
        raise ValueError(f"{' and '.join(existing)} exist already; pass --overwrite to replace")
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = {split: output_dir / f"{split}.jsonl.{os.getpid()}.tmp" for split in SPLITS}
    try:
        counts = {split: convert_split(source, f"{split}.json", partial[split]) for split in SPLITS}
        for split in SPLITS:
            partial[split].replace(targets[split])
            print(f"{source / split}.json -> {targets[split]}: {counts[split]} rows")
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Convert the official AdvertiseGen download.")
    parser.add_argument("source", type=Path, help="Folder with train.json and dev.json, or the .tar.gz that holds it.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/adgen"), help="Folder for the converted files.")
    parser.add_argument("--overwrite", action="store_true", help="Replace converted files that are already there.")
    return parser.parse_args()


@one_line_on_interrupt()
def main() -> None:
    """Convert, or end with one message and exit status 1."""
    args = parse_args()
    try:
        with writing(args.output_dir):
            convert(args.source, args.output_dir, args.overwrite)
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        reason = f"is not a whole .tar.gz, nor the folder that it holds: {error}"
        raise SystemExit(f"error: {args.source} {reason}") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
