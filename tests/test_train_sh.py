"""train.sh: what it starts, and from which folder, with stand-ins for python and torchrun."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with a copy of train.sh."""
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copy(ROOT / "train.sh", folder)
    return folder


def run(script: Path, *flags: str, cwd: Path, shell: str = "bash", **variables: str) -> subprocess.CompletedProcess:
    """Runs a copy of train.sh."""
    programs = script.parent / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("python", "torchrun"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.run([shell, script, *flags], cwd=cwd, env=env, capture_output=True, text=True)


def test_paths_count_from_where_the_user_stands(repository, tmp_path):
    flags = ("--train_data_path", "my.jsonl")
    result = run(repository / "train.sh", *flags, cwd=tmp_path)
    assert result.stdout.split() == ["python", str(repository / "train_qlora.py"), *flags]
    result = run(repository / "train.sh", *flags, cwd=repository)
    assert result.stdout.split() == ["python", "train_qlora.py", *flags]


def test_one_process_per_gpu(repository):
    result = run(repository / "train.sh", cwd=repository, NPROC_PER_NODE="2")
    assert "torchrun --standalone --nproc_per_node 2 --signals_to_handle" in result.stdout
    assert "SIGUSR1 train_qlora.py" in result.stdout


@pytest.mark.parametrize("flag", ["--demo", "--help", "--help_all", "-h"])
def test_demo_and_help_take_one_process(repository, flag):
    result = run(repository / "train.sh", "--lora_rank", "8", flag, cwd=repository, NPROC_PER_NODE="2")
    assert result.stdout == f"python train_qlora.py --lora_rank 8 {flag}\n"


def test_another_shell_is_told_in_one_line(repository):
    if not shutil.which("dash"):
        pytest.skip("dash is not installed")
    result = run(repository / "train.sh", cwd=repository, shell="dash")
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch("error: use bash train.sh[^\n]*\n", result.stderr)
