"""Models on ModelScope, through its own package, which resumes downloads and compares checksums."""

import importlib.util
from pathlib import Path

from qlora.checkpoint import needed_files
from qlora.errors import first_line
from qlora.hub.repository import RemoteFile, Repository

OWNERS = {"THUDM": "ZhipuAI", "zai-org": "ZhipuAI"}  # organization on Hugging Face -> the same one on ModelScope
BRANCH = "master"  # with the newest files


def find(name: str, revision: str | None) -> Repository:
    """What ModelScope has of a model.

    Args:
        name: organization and model, as on Hugging Face or as on ModelScope.
        revision: branch, tag or commit; None for the newest files.
    Raises:
        ValueError: the package is missing, there is no such model, ModelScope cannot be asked, or a file is missing.
    """
    if importlib.util.find_spec("modelscope") is None:
        raise ValueError("--hub modelscope needs the package modelscope: pip install modelscope")
    from modelscope.hub.api import HubApi

    organization, _, model = name.partition("/")
    name = f"{OWNERS.get(organization, organization)}/{model}"
    try:
        files = HubApi().get_model_files(name, revision=revision or BRANCH, recursive=False)
    except Exception as error:  # its errors have no common type in all of its releases
        raise ValueError(f"ModelScope does not list the files of {name} ({first_line(error)})") from error
    sizes = {file["Path"]: file["Size"] for file in files}
    needed = [RemoteFile(path, sizes[path], "") for path in needed_files(name, sizes)]
    return Repository("modelscope", name, revision or BRANCH, needed)


def download(source: Repository, files: list[RemoteFile], folder: Path):
    """Downloads files into a folder, and goes on with what is there of them.

    Raises:
        OSError: the connection or the disk fails, or a file has another checksum.
    """
    from modelscope import snapshot_download

    names = [file.name for file in files]
    try:
        snapshot_download(source.name, revision=source.revision, local_dir=str(folder), allow_patterns=names)
    except OSError:
        raise
    except Exception as error:  # as in `find`
        raise OSError(" ".join(str(error).split())) from error
