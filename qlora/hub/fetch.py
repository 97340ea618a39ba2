"""Downloads a model whose folder is missing: into that folder, after asking, only what it needs.

A folder that exists is used as it is; nothing in it is looked up anywhere. What has come of a download stays in a
folder beside it, named `.download`, until all of it is there.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
from pathlib import Path

from huggingface_hub.errors import HTTPError

from qlora.arguments import DEFAULT_MODEL, REPOSITORY, DownloadArguments
from qlora.atomic import existing_parent, lack_of_room, only_process, publish_folder, write_json
from qlora.checkpoint import HOW_TO_GET, MODELS, check_folder, read_config, weight_files
from qlora.errors import first_line
from qlora.hub import hugging_face, model_scope
from qlora.hub.repository import SOURCE_FILE, RemoteFile, Repository
from qlora.units import readable_size

logger = logging.getLogger(__name__)

HUBS = {"huggingface": hugging_face, "modelscope": model_scope}
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def fetch_model(path: str, flags: DownloadArguments, may_ask: bool = True):
    """Makes sure that there is the folder of a model: one whose name is that of a model on a hub is downloaded.

    On a terminal the user is asked, unless `--download` is given; elsewhere nothing is downloaded without it.

    Args:
        path: of the folder.
        flags: `--download`, and from where.
        may_ask: False for a report on a run, which only says what would be downloaded.
    Raises:
        FileNotFoundError: there is no folder, and the model is on no hub or not to be downloaded.
        ValueError: the download failed; the same command goes on with it.
        KeyboardInterrupt: with the same message.
    """
    name = hub_name(path)
    if name is None:
        check_folder(path)
        return
    try:
        source = HUBS[flags.hub].find(name, flags.revision)
    except ValueError as error:
        raise FileNotFoundError(f"there is no folder {path}, and {error}. {other_ways(name)}") from error
    staging = Path(path).absolute().with_name(f"{Path(path).name}.download")
    offer = describe(path, source, staging)
    if flags.download:
        logger.info(offer)
    elif not (may_ask and is_agreed(offer)):
        raise FileNotFoundError(f"{offer} To download them into this folder, add --download to the command.")
    download(source, staging, Path(path))


def other_ways(name: str) -> str:
    """How to get a model that is not downloaded, in a sentence; one of an unknown name is probably misspelt."""
    known = name.rpartition("/")[2] in MODELS
    return f'Or copy the files of {name} into this folder (README, "Weights").' if known else HOW_TO_GET


def hub_name(path: str) -> str | None:
    """The name on a hub of a model whose folder is missing; None if there is something, or the path is no name."""
    if os.path.lexists(path):
        return None
    if Path(path).absolute() == REPOSITORY / DEFAULT_MODEL:
        return DEFAULT_MODEL
    return path if NAME.fullmatch(path) else None


def describe(path: str, source: Repository, staging: Path) -> str:
    """What there is to download, in sentences for the user; ValueError if the disk has too little room."""
    here = staged_size(source, staging)
    missing, free = source.size - here, shutil.disk_usage(existing_parent(staging)).free
    text = f"there is no folder {path}. {source}"
    if here:
        text += f", of which {readable_size(here)} are in {staging}"
    if missing > free:
        raise ValueError(f"{text}. The disk has {readable_size(free)} free, which is too little: make room.")
    return f"{text}. The disk has {readable_size(free)} free."


def staged_size(source: Repository, staging: Path) -> int:
    """Bytes that an earlier try has left."""
    paths = [staging / file.name for file in source.files]
    return min(source.size, sum(path.stat().st_size for path in paths if path.is_file()))


def is_agreed(offer: str) -> bool:
    """Asks on the terminal, if there is one and one process."""
    if not (sys.stdin and sys.stdin.isatty()) or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return False
    try:
        return input(f"{offer} Download them? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def download(source: Repository, staging: Path, folder: Path):
    """Downloads a model into a staging folder, and renames this when it is complete.

    Raises:
        FileNotFoundError, ValueError: it failed, or the model is of another kind or not complete.
        KeyboardInterrupt: with a message.
    """
    staging.mkdir(parents=True, exist_ok=True)
    with only_process(staging, "downloads into"):
        if folder.exists():  # another process has downloaded it
            with contextlib.suppress(OSError):
                staging.rmdir()
            return
        download_files(source, source.files[:1], staging)
        read_config(staging)  # before gigabytes of another model are downloaded
        download_files(source, source.files[1:], staging)
        weight_files(staging)
        keep_only(staging, {file.name for file in source.files})
        write_json(staging / SOURCE_FILE, {"hub": source.hub, "repository": source.name, "revision": source.revision})
        publish_folder(staging, folder)
    logger.info("%s is complete", folder)


def keep_only(folder: Path, names: set[str]):
    """Deletes everything else in a folder, such as what a hub's package notes for itself."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()


def download_files(source: Repository, files: list[RemoteFile], staging: Path):
    """Downloads files into a staging folder; ValueError or KeyboardInterrupt, with how far it came, if that fails."""
    try:
        HUBS[source.hub].download(source, files, staging)
    except (OSError, HTTPError, KeyboardInterrupt, ValueError) as error:
        here, size = readable_size(staged_size(source, staging)), readable_size(source.size)
        rest = f"{here} of {size} are in {staging}, and the same command goes on from there"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted: {rest}") from None
        if no_room := lack_of_room(error):
            raise ValueError(f"{staging} cannot be written to: {no_room}. Make room: {rest}.") from error
        reason = str(error) if isinstance(error, ValueError) else f"the download broke off ({first_line(error)})"
        raise ValueError(f"{source.name} is not complete: {reason}. {rest}.") from error
