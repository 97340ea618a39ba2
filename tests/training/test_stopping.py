"""How runs are kept apart and stopped: qlora/training/run_lock.py, stopping.py and processes.py, and Ctrl-C."""

import ast
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from socket import gethostname
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_same_adapter, error_of, flags_of, fork, history, run_main, write_json
from transformers import TrainerControl

import train_qlora
from qlora.errors import TrainingStopped, one_line_on_interrupt
from qlora.training import processes
from qlora.training.checkpoints import checkpoint_problem, checkpoints
from qlora.training.run_lock import LOCK_FILE, check_not_locked, lock_output_dir
from qlora.training.stopping import STOP_SIGNALS, StopOnSignal
from qlora.training.trainer import QLoRATrainer

STEPS = 5  # an epoch has 3
SETTINGS = {"max_steps": STEPS, "gradient_accumulation_steps": 4, "save_steps": 100, "eval_steps": 100}


@pytest.fixture
def flags(tiny_checkpoint, train_file, dev_file, tmp_path) -> Callable[..., list[str]]:
    """A function (values of the JSON) -> the flags of a run."""

    def make(evaluate: bool = True, **values) -> list[str]:
        args_json = write_json(tmp_path / "args.json", tmp_path / "out", **SETTINGS | values)
        return flags_of(args_json, tiny_checkpoint, train_file, dev_file if evaluate else "none")

    return make


# One run at a time.


def test_second_run_in_a_folder_is_refused_before_it_loads_the_model(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train_qlora, "prepare", lambda preflight: pytest.fail("the model is loaded"))
    with lock_output_dir(tmp_path / "out"):
        for check in ([], ["--check"]):
            message = error_of(train_qlora, *flags(), *check)
            assert f"{tmp_path}/out is in use by another run (process {os.getpid()} on {gethostname()})" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_run_that_starts_during_the_checks_of_another_is_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train_qlora, "prepare", lambda preflight: pytest.fail("the model is loaded"))
    monkeypatch.setattr("qlora.training.preflight.check_not_locked", lambda output_dir: None)
    with lock_output_dir(tmp_path / "out"), pytest.raises(SystemExit, match="is in use by another run"):
        run_main(train_qlora, *flags())


def test_run_that_ends_during_the_checks_of_another_is_not_overwritten(flags, tmp_path, monkeypatch):
    def end_another(output_dir):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "adapter_config.json").touch()
        return nullcontext()

    monkeypatch.setattr("qlora.training.run_lock.lock_output_dir", end_another)
    assert "holds an earlier run (a finished adapter)" in error_of(train_qlora, *flags())


def test_file_of_a_killed_run_does_not_block(tmp_path):
    (tmp_path / LOCK_FILE).write_text(f"process {os.getpid()} on {gethostname()}, which is not locked")
    check_not_locked(str(tmp_path))
    with lock_output_dir(tmp_path):
        assert "not locked" not in (tmp_path / LOCK_FILE).read_text()
    assert list(tmp_path.iterdir()) == []
    check_not_locked(str(tmp_path / "missing"))
    assert not (tmp_path / "missing").exists()


def test_lock_ends_with_a_killed_process(tmp_path):
    def hold():
        with lock_output_dir(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_forked(hold) == -signal.SIGKILL
    assert (tmp_path / LOCK_FILE).exists()
    with lock_output_dir(tmp_path):
        pass


def test_file_that_its_holder_deletes_while_it_is_opened_gives_no_lock(tmp_path, monkeypatch):
    """The second run locks the file of the first, which deletes it: the third must not get another one."""
    flock, path = fcntl.flock, tmp_path / LOCK_FILE

    def delete_first(*args):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with lock_output_dir(tmp_path), pytest.raises(TrainingStopped, match="in use"), lock_output_dir(tmp_path):
        pass


def test_checks_do_not_block_each_other(tmp_path):
    with open(tmp_path / LOCK_FILE, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as another check
        check_not_locked(str(tmp_path))
        fcntl.flock(file, fcntl.LOCK_EX)  # a run that has not yet written who it is
        with pytest.raises(ValueError, match=r"in use by another run \(which has just started\)"):
            check_not_locked(str(tmp_path))


def test_lock_file_that_is_gone_or_cannot_be_read_is_no_problem(tmp_path, monkeypatch):
    with lock_output_dir(tmp_path):
        (tmp_path / LOCK_FILE).unlink()

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    check_not_locked(str(tmp_path))


def test_folders_above_are_created_too(tmp_path):
    with lock_output_dir(tmp_path / "new" / "out"):
        assert (tmp_path / "new" / "out" / LOCK_FILE).exists()


def test_lock_file_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(TrainingStopped, match="cannot be written"), lock_output_dir(tmp_path):
        pass


def test_only_the_main_process_holds_the_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with lock_output_dir(tmp_path):
        assert not (tmp_path / LOCK_FILE).exists()


def test_file_system_without_locks_is_reported(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_output_dir(tmp_path):
        assert "has no locks (No locks available), so that nothing prevents a second run there" in caplog.text

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), lock_output_dir(tmp_path):
        pass


# Signals of a scheduler.

BY_EPOCH = {"save_strategy": "epoch", "evaluation_strategy": "epoch"}


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, train_file, dev_file, tmp_path_factory) -> Path:
    """The output of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    args_json = write_json(folder / "args.json", folder / "out", **SETTINGS, **BY_EPOCH)
    run_main(train_qlora, *flags_of(args_json, tiny_checkpoint, train_file, dev_file))
    return folder / "out"


def send(monkeypatch, number: int, step: int):
    """Sends a signal to this process in a step of the next run."""
    training_step = QLoRATrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            signal.raise_signal(number)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(QLoRATrainer, "training_step", interrupted)


@pytest.mark.parametrize(
    ("name", "step"),
    [("SIGTERM", 2), ("SIGUSR1", 3), ("SIGHUP", 4)],  # the third step is the last of an epoch
)
def test_stopped_run_resumes_to_identical_results(whole, flags, tmp_path, monkeypatch, caplog, name, step):
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as raised:
        send(patch, number, step)
        run_main(train_qlora, *flags(**BY_EPOCH))
    assert raised.value.code == 128 + number
    output = tmp_path / "out"
    newest = checkpoints(output)[0]
    advice = f"{newest} is whole: go on from it with --resume_from_checkpoint last."
    assert f"{name}: stopped after {step} steps. {advice}" in [record.message for record in caplog.records]
    assert newest.name == f"checkpoint-{step}" and checkpoint_problem(newest) is None
    assert not (output / "adapter_config.json").exists()
    run_main(train_qlora, *flags(**BY_EPOCH), "--resume_from_checkpoint", "last")
    for key in ("loss", "grad_norm", "eval_loss"):
        assert history(output, key) == history(whole, key) != []
    weights = "adapter_model.safetensors"
    assert (output / weights).read_bytes() == (whole / weights).read_bytes()


def test_stop_without_checkpoints_says_so(flags, tmp_path, monkeypatch, caplog):
    send(monkeypatch, signal.SIGTERM, 2)
    with pytest.raises(SystemExit, match="143"):
        run_main(train_qlora, *flags(evaluate=False, save_strategy="no"))
    assert 'SIGTERM: stopped after 2 steps. Nothing is kept, since save_strategy in the JSON is "no".' in caplog.text
    assert list((tmp_path / "out").iterdir()) == []


def test_signal_in_the_last_step_changes_nothing(whole, flags, tmp_path, monkeypatch):
    send(monkeypatch, signal.SIGTERM, STEPS)
    run_main(train_qlora, *flags(**BY_EPOCH))
    assert_same_adapter(tmp_path / "out", whole)
    assert history(tmp_path / "out", "eval_loss") == history(whole, "eval_loss")


def test_ignored_signals_stay_ignored_and_handlers_are_restored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stop, handlers = StopOnSignal(), {number: signal.getsignal(number) for number in STOP_SIGNALS}
        with stop.signals_handled():
            signal.raise_signal(signal.SIGHUP)
            assert not stop.received
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGTERM
        assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == handlers
    finally:
        signal.signal(signal.SIGHUP, previous)


def run_forked(function: Callable) -> int | None:
    """Runs a function in a forked process; returns its exit status, negative for a signal."""
    process = fork(function)
    process.join(30)
    return process.exitcode


def two_signals():
    with StopOnSignal().signals_handled():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)


def test_second_signal_ends_the_process_but_not_one_of_torchrun(monkeypatch):
    assert run_forked(two_signals) == -signal.SIGTERM
    monkeypatch.setenv(processes.LAUNCHED_BY_TORCHRUN, "id")
    assert run_forked(two_signals) == 0


def steps_of_a_job(rank: int, store: Path):
    """One of two processes, of which the second receives a signal in step 2; exits with its last step."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    stop, control = StopOnSignal(), TrainerControl()
    args = SimpleNamespace(world_size=2, save_strategy="steps")
    stop.on_train_begin(args, None, control)
    with stop.signals_handled():
        for step in range(1, 9):
            if (rank, step) == (1, 2):
                signal.raise_signal(signal.SIGUSR1)
            stop.on_step_end(args, SimpleNamespace(global_step=step, max_steps=9, epoch=step / 10), control)
            if control.should_training_stop and control.should_save:
                os._exit(step)


def test_all_processes_of_a_job_stop_after_the_same_step(tmp_path):
    other = fork(steps_of_a_job, 1, tmp_path / "store")
    assert run_forked(lambda: steps_of_a_job(0, tmp_path / "store")) == 2
    other.join(30)
    assert other.exitcode == 2


# Processes that end with their parents.


def test_forked_processes_end_with_their_parent_that_is_killed():
    read, write = os.pipe()

    def parent():
        processes.end_with_parents.cache_clear()
        processes.end_with_parents()
        ready, tell = os.pipe()
        if os.fork() == 0:
            os.close(read)
            signal.raise_signal(signal.SIGINT)  # Ctrl-C reaches all processes of a terminal; only the parent answers
            os.write(tell, b".")
            time.sleep(60)
        os.close(tell)
        if os.read(ready, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    started = time.monotonic()
    assert run_forked(parent) == -signal.SIGKILL
    os.close(write)
    assert os.read(read, 1) == b""  # the other end is closed in all processes
    assert time.monotonic() - started < 10
    os.close(read)


WAIT = """
import time
from qlora.training.processes import end_with_parents
end_with_parents()
print("ready", flush=True)
time.sleep(60)
"""


def test_process_of_torchrun_ends_with_it():
    """A launcher that is killed, and its process, which keeps a pipe open as long as it lives."""
    read, write = os.pipe()

    def launcher():
        environment = os.environ | {processes.LAUNCHED_BY_TORCHRUN: "id", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", WAIT], stdout=subprocess.PIPE, env=environment, pass_fds=[write]
        )
        process.stdout.readline()
        os.kill(os.getpid(), signal.SIGKILL)

    started = time.monotonic()
    assert run_forked(launcher) == -signal.SIGKILL
    os.close(write)
    assert os.read(read, 1) == b"" and time.monotonic() - started < 30
    os.close(read)


# A terminal or a log that goes away.

PRINT = """
import logging, sys
from tqdm import tqdm
from qlora.errors import set_up_logging
from qlora.training.processes import go_on_without_output
go_on_without_output()
set_up_logging()
for i in tqdm(range(3), mininterval=0):
    tqdm.write("{'loss': 1}")
    logging.getLogger().info("step %d", i)
    print(i, flush=True)
open(sys.argv[1], "w").close()
"""


@pytest.mark.parametrize("lost", ["reader", "disk"])
def test_run_goes_on_when_its_output_goes_away(tmp_path, lost):
    read, write = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    output = write if lost == "reader" else full
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-X", "dev", "-c", PRINT, str(tmp_path / "end")]
    for streams in ({"stdout": output, "stderr": output}, {"stdout": output, "stderr": subprocess.PIPE}):
        run = subprocess.run(command, env=environment, text=True, **streams)
        assert run.returncode == 0 and (tmp_path / "end").exists()
        assert "Error" not in (run.stderr or "")
    os.close(write)
    os.close(full)


# Ctrl-C.


def test_interrupt_is_one_line(capsys, monkeypatch):
    @one_line_on_interrupt()
    def main(*message):
        raise KeyboardInterrupt(*message)

    for message, line in (((), "interrupted"), (("interrupted after 3 steps.",), "interrupted after 3 steps.")):
        with pytest.raises(SystemExit, match="130"):
            main(*message)
        assert capsys.readouterr().err == f"\n{line}\n"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == ""


def test_interrupt_that_a_library_answers_with_its_own_error_is_one_line(capsys):
    @one_line_on_interrupt()
    def main():
        try:
            raise KeyboardInterrupt
        finally:
            raise TimeoutError("a worker does not answer")

    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError), one_line_on_interrupt():
        raise ZeroDivisionError from ValueError()


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")], ids=lambda path: path.name)
def test_every_script_ends_with_one_line(path):
    """Ctrl-C, wherever a script is: its main and the imports that take long are covered."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [ast.unparse(decorator) for decorator in main.decorator_list] == ["one_line_on_interrupt()"]
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name.split(".")[0] for node in imports for name in names(node)}
    assert modules <= sys.stdlib_module_names | {"qlora"}


def names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules of an import statement."""
    return [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
