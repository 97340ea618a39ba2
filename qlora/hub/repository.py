"""What a hub has of a model, and the note in a downloaded folder that says where it came from."""

import json
from pathlib import Path
from typing import NamedTuple

from qlora.units import readable_size

SOURCE_FILE = "downloaded_from.json"
HUB_TITLES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}


class RemoteFile(NamedTuple):
    """A file that a model needs; `checksum` is a SHA-256, or as git has it a SHA-1, in hexadecimal digits."""

    name: str
    size: int
    checksum: str


class Repository(NamedTuple):
    """A model on a hub.

    Attributes:
        hub: a key of HUB_TITLES.
        name: organization and model, as the hub has them.
        revision: the commit; on ModelScope the branch, tag or commit that was asked for.
        files: that a folder with the model needs, config.json first.
    """

    hub: str
    name: str
    revision: str
    files: list[RemoteFile]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def __str__(self) -> str:
        return (
            f"{HUB_TITLES[self.hub]} has {self.name} (revision {self.revision}): {len(self.files)} files, "
            f"{readable_size(self.size)}"
        )


def model_source(folder: str) -> dict[str, str] | None:
    """`hub`, `repository` and `revision` of a folder that was downloaded; None for any other."""
    try:
        source = json.loads((Path(folder) / SOURCE_FILE).read_text(encoding="utf-8"))
        return {name: str(source[name]) for name in ("hub", "repository", "revision")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
