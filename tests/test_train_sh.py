"""train.sh: what it starts, from which folder, and the phases of the demo, with a stand-in for python."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, import_script

from qlora.arguments import InferenceArguments
from qlora.command_line import parse_command_line

# Prints how it was called; the demo asks the first program it starts for the output_dir.
STAND_IN = """#!/bin/sh
if [ "$1" = -c ]; then echo "${OUTPUT_DIR:-saved_files/chatglm_tiny_demo}"; exit; fi
echo "$OMP_NUM_THREADS threads: $*"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with a copy of train.sh and an earlier demo."""
    folder = tmp_path / "repository"
    (folder / "saved_files" / "chatglm_tiny_demo").mkdir(parents=True)
    shutil.copy(ROOT / "train.sh", folder)
    return folder


def run(script: Path, *flags: str, cwd: Path, shell: str = "bash", **variables: str) -> subprocess.CompletedProcess:
    """Runs a copy of train.sh with a stand-in for python and torchrun."""
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
    assert result.stdout.split(": ")[1].split() == [str(repository / "train_qlora.py"), *flags]
    result = run(repository / "train.sh", *flags, cwd=repository)
    assert result.stdout.split(": ")[1].split() == ["train_qlora.py", *flags]


def test_one_process_per_gpu(repository):
    result = run(repository / "train.sh", cwd=repository, NPROC_PER_NODE="2")
    assert "--standalone --nproc_per_node 2 --signals_to_handle" in result.stdout
    assert "SIGUSR1 train_qlora.py" in result.stdout


def test_another_shell_is_told_in_one_line(repository):
    if not shutil.which("dash"):
        pytest.skip("dash is not installed")
    result = run(repository / "train.sh", cwd=repository, shell="dash")
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch("error: use bash train.sh[^\n]*\n", result.stderr)


def test_demo_has_three_phases_and_takes_one_thread(repository):
    printed = run(repository / "train.sh", "--demo", "--lora_rank", "8", cwd=repository).stdout
    programs = ("make_tiny_checkpoint", "train_qlora", "inference_qlora")
    parts = [rf"{number}/3 \w[^\n]*\n1 threads: [\w/]*{name}\.py" for number, name in enumerate(programs, 1)]
    assert re.search(".*".join(parts), printed, re.S), printed
    assert "--eval_data_path none --lora_rank 8\n" in printed
    assert not (repository / "saved_files" / "chatglm_tiny_demo").exists()
    assert "3 threads: " in run(repository / "train.sh", "--demo", cwd=repository, OMP_NUM_THREADS="3").stdout


@pytest.mark.parametrize("place", [".", ".."])
def test_commands_at_the_end_of_the_demo_can_be_typed(repository, place):
    printed = run(repository / "train.sh", "--demo", cwd=repository / place, OUTPUT_DIR="my_adapter").stdout
    (end,) = re.findall(r"\nGo on with it:\n(.*)", printed, re.S)
    evaluation = import_script(ROOT / "scripts" / "evaluate_qlora.py").EvaluationArguments
    kinds = {"inference_qlora.py": InferenceArguments, "scripts/evaluate_qlora.py": evaluation}
    commands = [shlex.split(line.split("python ")[1]) for line in end.splitlines()]
    assert len(commands) == 3
    for script, *flags in commands:
        name = os.path.relpath(repository / place / script, repository)
        assert parse_command_line(kinds[name], flags).adapter_path in ("my_adapter", ["my_adapter"])


def test_demo_deletes_nothing_of_the_user(repository):
    own = repository / "own"
    own.mkdir()
    run(repository / "train.sh", "--demo", "--output_dir", str(own), cwd=repository, OUTPUT_DIR=str(own))
    assert own.is_dir() and (repository / "saved_files" / "chatglm_tiny_demo").is_dir()


def test_check_of_the_demo_trains_and_deletes_nothing(repository):
    printed = run(repository / "train.sh", "--demo", "--check", cwd=repository).stdout
    assert "train_qlora.py" in printed and "inference_qlora.py" not in printed
    assert (repository / "saved_files" / "chatglm_tiny_demo").is_dir()
