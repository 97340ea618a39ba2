"""Models on the Hugging Face Hub, or on the mirror that the environment variable HF_ENDPOINT names.

huggingface_hub's `snapshot_download` compares no checksums, and keeps nothing of a file that broke off; with files of
2 GB on a slow line, that matters.
"""

import functools
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,  # of the HTTP library: without a response, too
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from qlora.checkpoint import needed_files
from qlora.errors import first_line
from qlora.hub.repository import RemoteFile, Repository

TIMEOUT = 10  # seconds to wait for the list of files
RENAMED = {"THUDM": "zai-org"}  # organizations; the Hub forwards old names, a mirror may not

SHA1_DIGITS = 40


def find(name: str, revision: str | None) -> Repository:
    """What the Hub has of a model.

    Args:
        name: organization and model.
        revision: branch, tag or commit; None for the newest commit.
    Raises:
        ValueError: it has no such model, it cannot be asked, or the model lacks a file.
    """
    try:
        info = model_info(name, revision)
    except OfflineModeIsEnabled as error:
        raise ValueError("HF_HUB_OFFLINE is set, so that it is not looked up on Hugging Face: unset it") from error
    except GatedRepoError as error:
        raise ValueError(f"the authors of {name} want you to accept its terms, on its page on Hugging Face") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{constants.ENDPOINT} has no public model {name}") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{constants.ENDPOINT} has no revision {revision} of {name}") from error
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"{constants.ENDPOINT} cannot be reached ({first_line(error)}): name a mirror in the environment variable "
            "HF_ENDPOINT, or add --hub modelscope"
        ) from error
    return repository(info)


def model_info(name: str, revision: str | None) -> ModelInfo:
    """Commit and files of a model, with sizes and checksums; if it is not found, of its organization's new name."""
    ask = functools.partial(HfApi().model_info, revision=revision, files_metadata=True, timeout=TIMEOUT)
    organization, _, model = name.partition("/")
    try:
        return ask(name)
    except RepositoryNotFoundError as error:
        if organization not in RENAMED or isinstance(error, GatedRepoError):
            raise
        return ask(f"{RENAMED[organization]}/{model}")


def repository(info: ModelInfo) -> Repository:
    """The needed files of a model; ValueError if one is missing, or the Hub does not tell its size and checksum."""
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    files = []
    for name in needed_files(info.id, siblings):
        sibling = siblings[name]
        checksum = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if sibling.size is None or not checksum:
            raise ValueError(f"{constants.ENDPOINT} tells no size and checksum of {name} in {info.id}")
        files.append(RemoteFile(name, sibling.size, checksum))
    return Repository("huggingface", info.id, info.sha, files)


def download(source: Repository, files: list[RemoteFile], folder: Path):
    """Downloads files into a folder, and goes on with what is there of them.

    Args:
        source: of the files.
        files: to download.
        folder: that exists.
    Raises:
        OSError, HTTPError: the connection or the disk fails; what has come is kept.
        ValueError: a file has another checksum than the Hub says; it is deleted.
    """
    for file in files:
        if (folder / file.name).exists() and complete(source, file, folder):
            continue  # also where what an earlier try left is damaged, or of another revision: it is deleted
        if not complete(source, file, folder):
            raise ValueError(
                f"{file.name} of {source.name} came with another checksum than {constants.ENDPOINT} says, and was "
                "deleted: it was changed on the way, or is damaged there. Try again, or another HF_ENDPOINT"
            )


def complete(source: Repository, file: RemoteFile, folder: Path) -> bool:
    """Downloads what is missing of a file; deletes it and returns False if it then has another checksum."""
    path = folder / file.name
    start = path.stat().st_size if path.exists() else 0
    if start <= file.size:
        with path.open("ab") as output:
            http_get(
                hf_hub_url(source.name, file.name, revision=source.revision),
                output,
                resume_size=start,
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},  # a part of a compressed file has no use
                expected_size=file.size,
                displayed_filename=file.name,
            )
    if checksum(path, file) == file.checksum:
        return True
    path.unlink()
    return False


def checksum(path: Path, file: RemoteFile) -> str:
    """The checksum of a file on the disk, by the same function as the Hub's."""
    if len(file.checksum) == SHA1_DIGITS:
        return git_hash(path.read_bytes())
    with path.open("rb") as content:
        return sha_fileobj(content).hex()
