"""qlora/startup.py: imports without torch's compiler and without collections of garbage."""

import gc
import os
import subprocess
import sys

import pytest
from conftest import ROOT, flags_of, write_json

from qlora.startup import quick_imports

# Of these a run needs nothing until its first step. All but the first come from packages that may be installed.
NOT_NEEDED = ("torch._inductor.compile_fx", "matplotlib", "tensorboard", "tensorflow", "jax", "gradio", "nltk")


def test_a_run_imports_only_what_it_needs(tiny_checkpoint, train_file, tmp_path):
    flags = flags_of(write_json(tmp_path / "args.json", tmp_path / "out"), tiny_checkpoint, train_file, train_file)
    code = f"""
import sys
import train_qlora
sys.argv = ["train_qlora.py", "--check", *{flags!r}]
train_qlora.main()
import qlora.layers.replacement, qlora.export.official_folder, qlora.training.trainer
print("imported", [name for name in {NOT_NEEDED!r} if name in sys.modules])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.stdout.endswith("imported []\n"), run.stdout[-300:] + run.stderr


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_not_collected_meanwhile(collects):
    frozen = gc.get_freeze_count()
    (gc.enable if collects else gc.disable)()
    try:
        with quick_imports():
            with quick_imports():
                assert not gc.isenabled()
            assert not gc.isenabled()
            made_by_an_import = [[] for _ in range(1000)]
        assert gc.isenabled() == collects
        assert (gc.get_freeze_count() - frozen >= len(made_by_an_import)) == collects
    finally:
        gc.enable()


def test_the_compiler_stays_as_the_user_sets_it(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    with quick_imports():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "0"
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with quick_imports():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
