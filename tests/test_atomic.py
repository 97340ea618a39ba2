"""qlora/atomic.py: the order in which files are published, their permissions, and what a full disk leaves of them."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import largest_file
from safetensors import SafetensorError
from safetensors.torch import save_file

from qlora.atomic import append_lines, atomic_file, lack_of_room, publish_files, publish_folder, write_json, writing


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_published_files_can_be_read_by_others_as_the_umask_allows(tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        for name in ("files", "folder"):
            (tmp_path / name / "inner").mkdir(parents=True)
            save_file({"weight": torch.zeros(1)}, tmp_path / name / "adapter_model.safetensors")
        save_file({"weight": torch.zeros(1)}, tmp_path / "folder" / "inner" / "adapter_model.safetensors")
        publish_folder(tmp_path / "folder", tmp_path / "published")
        (tmp_path / "files" / "inner").rmdir()
        publish_files(tmp_path / "files", tmp_path)
        assert os.umask(umask) == umask
    finally:
        os.umask(previous)
    published = list(tmp_path.rglob("*.safetensors"))
    assert [path.stat().st_mode & 0o777 for path in published] == [mode] * 3
    assert os.access(tmp_path / "published" / "inner", os.X_OK)


def test_file_that_marks_an_adapter_is_published_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(source.name) or replace(source, target))
    (tmp_path / "staged").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (tmp_path / "staged" / name).touch()
    publish_files(tmp_path / "staged", tmp_path)
    assert len(moved) == 3 and moved[-1] == "adapter_config.json"


def caused_by(cause: OSError) -> Exception:
    error = ValueError("another library's error")
    error.__cause__ = cause
    return error


OF_TORCH = "[enforce fail at inline_container.cc:672] . "


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "its disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the quota of its disk is reached"),
        (OSError(errno.EFBIG, "File too large"), "a file there must not be so large"),
        (caused_by(OSError(errno.ENOSPC, "No space left on device")), "its disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "its disk is full"),
        (RuntimeError(f"{OF_TORCH}unexpected pos 64 vs 0\nframe #0"), "its disk is full, or cannot be written to"),
        (OSError("Not enough disk space. Needed: Unknown size (download: Unknown size"), "its disk is full"),
        (RuntimeError(f"{OF_TORCH}PytorchStreamReader failed reading zip archive"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (PermissionError(errno.EACCES, "Permission denied", "out"), None),
        (SafetensorError("I/O error: Input/output error (os error 5)"), None),
        (OSError(), None),
    ],
)
def test_lack_of_room_is_told_from_other_errors(error, reason):
    assert lack_of_room(error) == reason
    with pytest.raises(type(error) if reason is None else OSError) as raised, writing("out", "wait"):
        raise error
    if reason:
        assert str(raised.value) == f"out cannot be written: {reason}. Make room, or wait."
    else:
        assert raised.value is error


def test_torch_says_that_the_disk_is_full():
    with pytest.raises(OSError, match="its disk is full"), writing("/dev/full"):
        torch.save(torch.zeros(10**5), "/dev/full")


def test_file_stays_as_it_was_where_there_is_no_room(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"index": 0}, {"text": "裙"}]
    append_lines(path, rows)
    with largest_file(100), pytest.raises(OSError, match=r"rows\.jsonl cannot be written: .* Make room\."):
        append_lines(path, [{"index": 1}, {"text": "裙" * 50}])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    write_json(tmp_path / "a.json", {"is": "whole"})
    with largest_file(100), pytest.raises(OSError, match=r"/a\.json cannot be written"):
        write_json(tmp_path / "a.json", {"is": "long" * 50})
    assert json.loads((tmp_path / "a.json").read_text()) == {"is": "whole"}
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", "rows.jsonl"}


def test_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    # A file system of another machine may say only then that it is full.
    monkeypatch.setattr(os, "fsync", lambda descriptor: Path("/dev/full").write_text("a"))
    with pytest.raises(OSError, match="a cannot be written: its disk is full"), atomic_file(tmp_path / "a") as partial:
        partial.write_text("new")
    assert not list(tmp_path.iterdir())
