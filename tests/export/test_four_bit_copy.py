"""The 4-bit copy of a model: written once, whole or not at all, and loaded in its place while it belongs to it."""

import logging
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_adapter, flags_of, import_script, largest_file, run_main
from conftest import write_json as write_args

import train_qlora
from qlora.arguments import FinetuneArguments, copy_folder
from qlora.export import four_bit_copy
from qlora.export.four_bit_copy import save_copy
from qlora.loading import COPY_SOURCE, copy_source, find_copy, load_quantized_model, load_tokenizer
from qlora.training import preflight

FP32 = torch.float32
LOADED = "Loading the 4-bit copy"


@pytest.fixture(autouse=True)
def progress(caplog):
    caplog.set_level(logging.INFO)


def write_copy(folder: Path) -> Path:
    """Writes the copy of a folder; returns where it belongs."""
    source = copy_source(str(folder), FP32)
    model = load_quantized_model(str(folder), FP32)
    save_copy(model, load_tokenizer(str(folder)), str(folder), source)
    return copy_folder(str(folder))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_copy_is_loaded_in_place_of_the_model(golden_folder, caplog):
    original = load_quantized_model(str(golden_folder), FP32)
    copy = write_copy(golden_folder)
    assert LOADED not in caplog.text and copy == golden_folder.with_name("golden-nf4")
    loaded = load_quantized_model(str(golden_folder), FP32)
    assert f"{LOADED} {copy}" in caplog.text
    assert loaded.name_or_path == original.name_or_path == str(golden_folder)
    for (name, expected), found in zip(original.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize("change", ["time", "size", "config", "dtype"])
def test_copy_of_other_files_is_not_loaded_and_is_replaced(golden_folder, caplog, change):
    copy = write_copy(golden_folder)
    weights = max(golden_folder.glob("*.bin"), key=lambda path: path.stat().st_size)
    if change == "time":
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    elif change == "size":
        state = weights.stat()
        with weights.open("ab") as file:
            file.write(b"\0")
        os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "config":
        os.utime(golden_folder / "config.json", ns=(0, 0))
    dtype = torch.bfloat16 if change == "dtype" else FP32
    assert find_copy(str(golden_folder), dtype) is None and "it is not used" in caplog.text
    if change == "time":
        written = (copy / COPY_SOURCE).read_bytes()
        write_copy(golden_folder)
        assert LOADED not in caplog.text and (copy / COPY_SOURCE).read_bytes() != written
        assert find_copy(str(golden_folder), FP32) == copy


def test_copy_that_is_not_finished_is_not_there(golden_folder, monkeypatch, capsys):
    copy, partial = copy_folder(str(golden_folder)), golden_folder.with_name("golden-nf4.partial")
    for size in (100, 100_000):  # the tokenizer's files, the weights
        with largest_file(size), pytest.raises(OSError, match=r"-nf4 cannot be written: .* leave out --save_4bit"):
            write_copy(golden_folder)
        assert not copy.exists() and not partial.exists()
    with monkeypatch.context() as patch:  # killed in the last moment: nothing is cleaned up
        patch.setattr(four_bit_copy, "publish_folder", lambda *paths: (_ for _ in ()).throw(SystemExit))
        patch.setattr(four_bit_copy.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(SystemExit):
            write_copy(golden_folder)
    assert (partial / COPY_SOURCE).is_file() and find_copy(str(golden_folder), FP32) is None
    (partial / "model.safetensors.index.json").write_text("left over")
    assert "model.safetensors.index.json" not in names(write_copy(golden_folder))
    assert not partial.exists() and find_copy(str(golden_folder), FP32) == copy


def test_copy_that_another_process_wrote_is_left_alone(golden_folder, tmp_path, monkeypatch):
    copy = write_copy(golden_folder)
    before = copy.stat().st_ino
    copy.rename(tmp_path / "of another process")

    @contextmanager
    def only_process(*args: object) -> Iterator[None]:
        (tmp_path / "of another process").rename(copy)  # while this one waits
        yield

    monkeypatch.setattr(four_bit_copy, "only_process", only_process)
    write_copy(golden_folder)
    assert copy.stat().st_ino == before and not golden_folder.with_name("golden-nf4.partial").exists()


def test_damaged_copy_is_named(golden_folder):
    copy = write_copy(golden_folder)
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the 4-bit copy .*golden-nf4 is damaged: delete it"):
        load_quantized_model(str(golden_folder), FP32)


def test_quantize_checkpoint_writes_the_copy(golden_folder, caplog, monkeypatch):
    script = import_script(ROOT / "scripts" / "quantize_checkpoint.py")
    script.quantize(script.QuantizeArguments(model_name_or_path=str(golden_folder), compute_dtype="fp32"))
    load_quantized_model(str(golden_folder), FP32)
    assert LOADED in caplog.text


def test_training_writes_the_copy_once_and_learns_the_same_from_it(tiny_checkpoint, train_file, tmp_path, caplog):
    folder, results = shutil.copytree(tiny_checkpoint, tmp_path / "model"), []
    for number in range(2):
        args_json = write_args(tmp_path / "args.json", tmp_path / str(number), max_steps=2, save_strategy="no")
        flags = flags_of(args_json, folder, train_file, "none", *["--save_4bit"] * (number == 0))
        caplog.clear()
        run_main(train_qlora, *flags, "--eval_strategy", "no")
        assert ("Wrote the 4-bit copy" in caplog.text) == (number == 0)
        assert (LOADED in caplog.text) == (number > 0)
        results.append(tmp_path / str(number))
    assert_same_adapter(*results)
    written, loaded = ((folder / "adapter_config.json").read_bytes() for folder in results)
    assert written == loaded


def check(folder: Path) -> preflight.Preflight:
    """What the check before a run finds for `--save_4bit`."""
    found = preflight.Preflight(FinetuneArguments(model_name_or_path=str(folder), save_4bit=True))
    preflight.find_model(found)
    preflight.check_save_4bit(found, found.config)
    return found


def problems(folder: Path) -> list[str]:
    return check(folder).problems


def test_copy_is_not_written_where_there_is_one(golden_folder):
    assert check(golden_folder).copy_source == copy_source(str(golden_folder), FP32)
    copy = write_copy(golden_folder)
    for folder in (golden_folder, copy):
        found = check(folder)
        assert found.copy_source is None and found.problems == []


def test_copy_that_cannot_be_written_is_reported_before_the_run(golden_folder, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
        (problem,) = problems(golden_folder)
        assert problem == (
            f"--save_4bit needs 0.2 MB, and the disk of {golden_folder.parent} has 0.0 MB free. "
            "Make room, or leave it out."
        )
    with monkeypatch.context() as patch:
        patch.setattr(preflight.os, "access", lambda path, mode: False)
        assert "cannot be written to: leave it out" in problems(golden_folder)[0]
    copy_folder(str(golden_folder)).mkdir()
    assert "golden-nf4 exists, and was not written by it" in problems(golden_folder)[0]
