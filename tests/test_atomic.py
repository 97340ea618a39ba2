"""qlora/atomic.py: the order in which files are published, and their permissions."""

import os

import pytest
import torch
from safetensors.torch import save_file

from qlora.atomic import publish_files, publish_folder


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
