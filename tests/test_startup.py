"""qlora/startup.py: imports without torch's compiler and without collections of garbage; weights read ahead."""

import gc
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, flags_of, write_json

from qlora import startup
from qlora.startup import advise_bytecode, quick_imports, read_ahead

# Of these a run needs nothing until its first step. All but the first come from packages that may be installed.
NOT_NEEDED = ("torch._inductor.compile_fx", "matplotlib", "tensorboard", "tensorflow", "jax", "gradio", "nltk")


def test_a_run_imports_only_what_it_needs(tiny_checkpoint, train_file, tmp_path):
    flags = flags_of(write_json(tmp_path / "args.json", tmp_path / "out"), tiny_checkpoint, train_file, train_file)
    code = f"""
import sys
import train_qlora
sys.argv = ["train_qlora.py", "--check", *{flags!r}]
train_qlora.main()
import qlora.layers.replacement, qlora.export.four_bit_copy, qlora.training.trainer
print("imported", [name for name in {NOT_NEEDED!r} if name in sys.modules])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.stdout.endswith("imported []\n"), run.stdout[-300:] + run.stderr
    assert "leaked" not in run.stderr  # as Triton would report at the end what can no longer be collected


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_not_collected_meanwhile(collects):
    (gc.enable if collects else gc.disable)()
    try:
        with quick_imports():
            with quick_imports():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled() == collects
    finally:
        gc.enable()


def test_the_compiler_stays_as_the_user_sets_it(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    with quick_imports():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "0"
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with quick_imports():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"


@pytest.mark.parametrize("has_bytecode", [True, False])
def test_missing_bytecode_is_named_once(monkeypatch, caplog, tmp_path, has_bytecode):
    cached = tmp_path / "torch" / "__pycache__" / "__init__.pyc"
    spec = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"), cached=str(cached))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    caplog.set_level("INFO")
    if has_bytecode:
        cached.parent.mkdir(parents=True)
        cached.touch()
    advise_bytecode.cache_clear()
    for _ in range(2):
        with quick_imports():
            pass
    assert caplog.text.count(f"python -m compileall -q {tmp_path}\n") == (not has_bytecode)
    advise_bytecode.cache_clear()


def files_read_ahead(monkeypatch: pytest.MonkeyPatch, model: Path) -> set[str]:
    """The files that the system is asked to read for a model, in a thread."""
    names = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *args: names.append(os.readlink(f"/proc/self/fd/{file}")))
    before = set(threading.enumerate())
    read_ahead(str(model))
    for thread in set(threading.enumerate()) - before:
        thread.join()
    return {str(Path(name).relative_to(model.parent)) for name in names}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reads ahead")
def test_weights_are_read_ahead(monkeypatch, tmp_path):
    model, copy = tmp_path / "model", tmp_path / "model-nf4"
    assert files_read_ahead(monkeypatch, model) == set()
    for folder, names in ((model, ("a.bin", "b.bin", "config.json")), (copy, ("model.safetensors", "config.json"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"12345678")
        expected = {f"{folder.name}/{name}" for name in names if name != "config.json"}
        assert files_read_ahead(monkeypatch, model) == expected
    monkeypatch.setattr(startup, "machine_memory", lambda: 16)
    assert files_read_ahead(monkeypatch, model) == set()  # it would only displace other files
