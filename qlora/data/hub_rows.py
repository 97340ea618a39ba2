"""Data sets on the Hugging Face Hub: each is written to a file with a row a line, which is read as any other."""

import dataclasses
import os
import re
from pathlib import Path

import datasets
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from qlora.arguments import FinetuneArguments
from qlora.atomic import writing
from qlora.data.row_files import LONGEST_REASON

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".parquet", ".gz", ".zip")
TRAIN_SPLIT, EVAL_SPLIT = "train", "test"


def is_hub_name(path: str) -> bool:
    """Whether a path is no file here, and has the form `organization/name` or `organization/name/subset`."""
    is_file_here = Path(path).suffix.lower() in FILE_SUFFIXES or Path(path.partition("/")[0]).exists()
    return not is_file_here and NAME.fullmatch(path) is not None


def with_local_files(args: FinetuneArguments) -> FinetuneArguments:
    """The flags with files in place of the names of data sets, which are downloaded.

    Raises:
        ValueError: a data set cannot be had, or a flag is given that has no data set to apply to.
    """
    columns = parse_columns(args.column_map)
    has_hub_rows = [any(is_hub_name(path) for path, _ in args.train_files()), is_hub_name(args.eval_data_path or "")]
    useful = {"train_split": has_hub_rows[0], "eval_split": has_hub_rows[1], "column_map": any(has_hub_rows)}
    useless = [f"--{name}" for name, is_useful in useful.items() if getattr(args, name) and not is_useful]
    if useless:
        raise ValueError(f"{', '.join(useless)}: this is for a data set of the Hugging Face Hub, and none is named.")

    def local(path: str, split: str) -> str:
        return fetch_rows(path, split, columns) if is_hub_name(path) else path

    train = [
        local(path, args.train_split or TRAIN_SPLIT) + text.removeprefix(path)
        for text, (path, _) in zip(args.train_data_path, args.train_files(), strict=True)
    ]
    evaluation = args.eval_data_path and local(args.eval_data_path, args.eval_split or EVAL_SPLIT)
    return dataclasses.replace(args, train_data_path=train, eval_data_path=evaluation)


def parse_columns(texts: list[str]) -> dict[str, str]:
    """`output=answer` -> {"output": "answer"}; ValueError for another form."""
    pairs = [text.partition("=") for text in texts]
    if not all(field and column for field, _, column in pairs):
        raise ValueError(f"--column_map {' '.join(texts)}: expected field=column, such as instruction=question.")
    return {field: column for field, _, column in pairs}


def fetch_rows(name: str, split: str, columns: dict[str, str]) -> str:
    """Downloads a data set, or finds it in the cache of the datasets library.

    Args:
        name: `organization/name` or `organization/name/subset`.
        split: as the datasets library has it, such as `train` or `train[:1000]`.
        columns: field of a row -> the column that has it, where the names differ.
    Returns:
        The path of a file with a row a line.
    Raises:
        ValueError: there is no such data set, split or column, or it cannot be downloaded.
    """
    organization, data_set, *subset = name.split("/")
    repository = f"{organization}/{data_set}"
    try:
        with writing(datasets.config.HF_DATASETS_CACHE):
            rows = rename_columns(load_dataset(repository, *subset, split=split), columns)
            part = re.sub(r"[^\w.-]+", "_", "_".join([*subset, split]))
            path = folder_of_files() / repository / f"{part}.{rows._fingerprint}.jsonl"
            if not path.exists():
                write_lines(rows, path)
    except RepositoryNotFoundError as error:
        where = f"{datasets.config.HF_ENDPOINT} has no public data set {repository}"
        raise ValueError(f"there is no data file {name}, and {where}.") from error
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) else None
        reason = " ".join(str(cause or error).split())[:LONGEST_REASON].removesuffix(".")
        raise ValueError(f"the data set {name} cannot be read, split {split}: {reason}.") from error
    return str(path)


def rename_columns(rows: Dataset, columns: dict[str, str]) -> Dataset:
    """The data set with the fields' names for its columns; a column of that name that is not asked for is dropped."""
    missing = [column for column in columns.values() if column not in rows.column_names]
    if missing:
        raise ValueError(f"it has no column {missing[0]}, but {', '.join(rows.column_names)}")
    taken = [name for name in columns if name in rows.column_names and name not in columns.values()]
    return rows.remove_columns(taken).rename_columns({column: field for field, column in columns.items()})


def write_lines(rows: Dataset, path: Path):
    """Writes a row a line into a file, which appears when it is complete: several processes may write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        rows.to_json(partial, force_ascii=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def folder_of_files() -> Path:
    """Where the files are written; their paths from there begin with the name of the data set."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "chatglm_qlora" / "hub"


def data_set_of(path: str) -> str | None:
    """The name of the data set whose file this is; None for any other file."""
    folder = folder_of_files()
    return "/".join(Path(path).relative_to(folder).parts[:2]) if Path(path).is_relative_to(folder) else None
