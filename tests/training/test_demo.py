"""qlora/training/demo.py: the phases of `python train_qlora.py --demo`, with a stand-in for the programs it starts."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, error_of, import_script, run_main, write_rows

import train_qlora
from qlora import arguments
from qlora.arguments import InferenceArguments
from qlora.checkpoint import check_checkpoint
from qlora.command_line import parse_command_line
from qlora.training import demo, processes
from qlora.training.run_lock import lock_output_dir

STAND_IN = """#!/bin/sh
echo "$OMP_NUM_THREADS threads: $*"
echo "PYTHONPATH=$PYTHONPATH PYTHONUTF8=$PYTHONUTF8" >&2
case "$*" in *"${INTERRUPTED:-nothing at all}"*) exit 130 ;; *make_tiny_checkpoint*) exit "${STATUS:-0}" ;; esac
"""
ADAPTER = Path("saved_files", "chatglm_tiny_demo")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """The current folder: a repository with the settings of the demo, an earlier demo, and a stand-in for python."""
    folder = tmp_path / "my repository"
    for name in ("scripts", "bin", ADAPTER):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "demo.json", folder / "scripts")
    python = folder / "bin" / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("OMP_NUM_THREADS")
    for module in (arguments, demo):
        monkeypatch.setattr(module, "REPOSITORY", folder)
    monkeypatch.chdir(folder)
    return folder


def make_model(repository: Path):
    """What is left of the tiny model of an earlier demo."""
    (repository / "THUDM" / "chatglm-tiny").mkdir(parents=True)
    (repository / "THUDM" / "chatglm-tiny" / "config.json").touch()


def test_three_phases_on_one_thread(repository, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    run_main(train_qlora, "--demo", "--lora_rank", "8")
    printed, errors = capfd.readouterr()
    programs = ("scripts/make_tiny_checkpoint", "train_qlora", "inference_qlora")
    parts = [rf"{number}/3 \w[^\n]*\n1 threads: {name}\.py" for number, name in enumerate(programs, 1)]
    assert re.search(".*".join(parts), printed, re.S), printed
    assert f"--model_name_or_path THUDM/chatglm-tiny --output_dir {ADAPTER} --lora_rank 8\n" in printed
    assert f"--adapter_path {ADAPTER} --prompt_file data/dev.jsonl" in printed
    assert errors.count(f"PYTHONPATH={repository}{os.pathsep}elsewhere PYTHONUTF8=1") == 3
    assert not ADAPTER.exists()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run_main(train_qlora, "--demo")
    assert "3 threads: " in capfd.readouterr().out


@pytest.mark.parametrize("words", [["--demo", "chatglm2"], ["--demo=chatglm2"]])
def test_demo_of_another_model(repository, capfd, words):
    run_main(train_qlora, "--lora_rank", "8", *words, "--lora_alpha", "16")
    printed, own = capfd.readouterr().out, Path("saved_files", "chatglm2_tiny_demo")
    assert "--architecture chatglm2 --output_dir THUDM/chatglm2-tiny\n" in printed
    flags = f"--model_name_or_path THUDM/chatglm2-tiny --output_dir {own} --lora_rank 8 --lora_alpha 16\n"
    assert flags in printed and f"--adapter_path {own} --prompt_file" in printed
    assert ADAPTER.is_dir()  # that of the other demo
    assert "invalid choice: 'glm4'" in error_of(train_qlora, "--demo", "glm4")


def test_demo_of_another_model_runs(repository, sample_rows, capfd, monkeypatch):
    """Its programs, with so few steps that nothing is learned: a tiny ChatGLM2 is made, trained and asked."""
    (repository / "data").mkdir()
    for name, rows in (("train", sample_rows), ("dev", sample_rows[:2])):
        write_rows(repository / "data" / f"{name}.jsonl", rows)
    shorter = {"scripts/make_tiny_checkpoint.py": ("--vocab_size", 1100, "--max_steps", 2)}
    shorter |= {"train_qlora.py": ("--max_steps", 2), "inference_qlora.py": ("--max_new_tokens", 4)}

    def start(program: str, *flags: str, **_):
        run_main(import_script(ROOT / program), *flags, *shorter[program])

    monkeypatch.setattr(demo, "start", start)
    run_main(train_qlora, "--demo", "chatglm2")
    printed = capfd.readouterr().out
    assert "a ChatGLM of" in printed and printed.count("After: ") == 2
    assert (repository / "saved_files" / "chatglm2_tiny_demo" / "adapter_model.safetensors").is_file()
    assert check_checkpoint("THUDM/chatglm2-tiny").display_name == "ChatGLM2-6B"


def test_tiny_model_is_made_once(repository, capfd):
    make_model(repository)
    run_main(train_qlora, "--demo")
    printed = capfd.readouterr().out
    assert "THUDM/chatglm-tiny is there, from an earlier demo" in printed and "make_tiny_checkpoint" not in printed


@pytest.mark.parametrize("place", [".", ".."])
def test_commands_at_the_end_can_be_typed(repository, capfd, monkeypatch, place):
    monkeypatch.chdir(place)
    run_main(train_qlora, "--demo", "--output_dir", "my adapter")
    (end,) = re.findall(r"\nGo on with it:\n(.*)", capfd.readouterr().out, re.S)
    evaluation = import_script(ROOT / "scripts" / "evaluate_qlora.py").EvaluationArguments
    kinds = {"inference_qlora.py": InferenceArguments, "scripts/evaluate_qlora.py": evaluation}
    commands = [shlex.split(line) for line in end.splitlines()]
    assert len(commands) == 5 and {python for python, *_ in commands} == {"python"}
    for _, script, *flags in commands:
        if script != "-m":
            kind = kinds[os.path.relpath(script, repository)]
            assert parse_command_line(kind, flags).adapter_path in ("my adapter", ["my adapter"])


def test_commands_are_quoted_for_windows_and_name_an_interpreter_that_is_not_on_the_path(monkeypatch):
    monkeypatch.setattr(demo, "sys", SimpleNamespace(platform="win32", executable=r"C:\My Python\python.exe"))
    assert demo.as_typed(["train_qlora.py", r"D:\my data"]) == r'"C:\My Python\python.exe" train_qlora.py "D:\my data"'


def test_nothing_of_the_user_is_deleted(repository, capfd):
    own = repository / "own"
    own.mkdir()
    run_main(train_qlora, "--demo", "--output_dir", own)
    assert own.is_dir() and ADAPTER.is_dir()


@pytest.mark.parametrize("flag", ["--check", "--dry_run=2"])
def test_check_of_a_new_demo_takes_a_model_that_is_not_trained(repository, capfd, flag):
    shutil.rmtree(ADAPTER)
    run_main(train_qlora, "--demo", flag)
    printed = capfd.readouterr().out
    (model,) = re.findall(
        r"make_tiny_checkpoint.py --architecture chatglm --output_dir (\S+) --max_steps 0\n", printed
    )
    assert not Path(model).is_relative_to(repository) and not Path(model).parent.exists()
    assert f"--model_name_or_path {model} --output_dir {ADAPTER} {flag}\n" in printed
    assert "THUDM/chatglm-tiny would be made" in printed and "inference_qlora.py" not in printed


def test_check_after_a_demo_deletes_nothing_and_names_another_folder(repository, capfd):
    make_model(repository)
    run_main(train_qlora, "--demo", "--check")
    printed = capfd.readouterr().out
    assert f"--model_name_or_path THUDM/chatglm-tiny --output_dir {ADAPTER}.new --check\n" in printed
    assert "make_tiny_checkpoint" not in printed and f"{ADAPTER}, from an earlier demo, would be deleted" in printed
    assert ADAPTER.is_dir()


def test_check_of_another_folder_is_of_that_folder(repository, capfd):
    make_model(repository)
    run_main(train_qlora, "--demo", "--check", "--output_dir", "own")
    printed = capfd.readouterr().out
    assert f"--output_dir {ADAPTER} --check --output_dir own\n" in printed and "would be deleted" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rnak", "8"], "unknown argument --lora_rnak"),
        (["--learning_rate", "fast"], "--learning_rate is"),
        (["--lora_dropout", "1"], "--lora_dropout is 1.0"),
    ],
)
def test_wrong_flag_ends_the_demo_before_anything_is_made_or_deleted(repository, capfd, flags, message):
    assert message in error_of(train_qlora, "--demo", *flags)
    assert "threads" not in capfd.readouterr().out and ADAPTER.is_dir()


def test_demo_that_another_one_is_writing_is_not_deleted(repository, capfd):
    with lock_output_dir(ADAPTER):
        assert "is in use by another run" in error_of(train_qlora, "--demo")
    assert ADAPTER.is_dir()


def test_demo_that_began_during_the_making_of_the_model_is_not_deleted(repository, capfd, monkeypatch):
    checks = iter([True, ValueError("in use by another run")])

    def is_earlier_demo(*_) -> bool:
        if isinstance(check := next(checks), ValueError):
            raise check
        return check

    monkeypatch.setattr(demo, "is_earlier_demo", is_earlier_demo)
    assert "in use by another run" in error_of(train_qlora, "--demo")
    assert ADAPTER.is_dir() and "make_tiny_checkpoint" in capfd.readouterr().out


def test_program_that_fails_ends_the_demo_with_its_status(repository, capfd, monkeypatch):
    monkeypatch.setenv("STATUS", "3")
    with pytest.raises(SystemExit, match="3"):
        run_main(train_qlora, "--demo")
    assert "2/3" not in capfd.readouterr().out and ADAPTER.is_dir()


def test_interrupted_program_ends_the_demo_after_its_own_message(repository, monkeypatch):
    """Ctrl-C reaches all processes of a terminal: the demo waits for the one it has started, and adds nothing."""
    waits = iter([KeyboardInterrupt, 130])

    class Program:
        def wait(self):
            result = next(waits)
            if result is KeyboardInterrupt:
                raise result
            return result

    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: Program())
    with pytest.raises(SystemExit, match="130"):
        demo.start("train_qlora.py")
    assert next(waits, None) is None


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("make_tiny_checkpoint", "Nothing of the tiny model is kept; the same command begins anew."),
        ("train_qlora", "The tiny model in THUDM/chatglm-tiny is kept; the same command fine-tunes it."),
        (
            "inference_qlora",
            f"The adapter in {ADAPTER} is kept. To go on with it: python inference_qlora.py --adapter",
        ),
    ],
)
def test_interrupted_demo_says_what_is_kept_and_how_to_go_on(repository, capfd, monkeypatch, program, message):
    monkeypatch.setenv("INTERRUPTED", program)
    with pytest.raises(SystemExit, match="130"):
        run_main(train_qlora, "--demo")
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith(message)


def test_torchrun_is_refused(repository, monkeypatch):
    monkeypatch.setenv(processes.LAUNCHED_BY_TORCHRUN, "id")
    monkeypatch.setattr(train_qlora, "end_with_parents", lambda: None)
    assert "use `python train_qlora.py --demo`" in error_of(train_qlora, "--demo")
