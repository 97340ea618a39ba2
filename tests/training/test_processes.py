"""Training by two processes, as `NPROC_PER_NODE=2 bash train.sh` starts them, on a CPU with gloo."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState
from conftest import ROOT, adapter, flags_of, fork, history, run_main, write_json, write_output_to
from torch.utils.data import BatchSampler, SequentialSampler

import train_qlora
from qlora.data.batching import own_samples
from qlora.training.checkpoints import checkpoint_problem, checkpoints

SETTINGS = {"max_steps": 24, "save_steps": 4, "eval_steps": 8, "use_cpu": True}
MOST_SECONDS = 30  # from the end of one process to the end of the job


class Job:
    """A training by two processes, in a new session, so that the test can kill all of its processes at the end."""

    def __init__(self, flags: list[str]):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", ROOT / "train.sh", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PATH": path, "NPROC_PER_NODE": "2"},
            start_new_session=True,
        )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def rank(self, number: int) -> psutil.Process:
        """The process with this rank."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        return next(process for process in started if process.environ().get("RANK") == str(number))

    def end(self, timeout: float = 300) -> str:
        """Waits for the end of the job; returns its output."""
        return self.process.communicate(timeout=timeout)[0]


@pytest.fixture(scope="module")
def paths(tiny_checkpoint, train_file, dev_file) -> tuple[Path, Path, Path]:
    return tiny_checkpoint, train_file, dev_file


def train(flags: list[str], log: Path, port: int, rank: int):
    """Trains as one of two processes of torchrun, whose variables it sets."""
    write_output_to(log)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    AcceleratorState._reset_state(reset_partial_state=True)  # left by runs in the process that was forked
    run_main(train_qlora, *flags)


def train_with_two_processes(flags: list[str], log: Path) -> list[int | None]:
    """Trains without torchrun, so that nothing needs to be imported; returns the exit statuses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [fork(train, flags, log, port, rank) for rank in range(2)]
    for process in ranks:
        process.join(100)
    return [process.exitcode for process in ranks]


@pytest.fixture(scope="module")
def two_processes(paths, tmp_path_factory) -> Path:
    """The output of two processes with 4 samples each in a step."""
    folder = tmp_path_factory.mktemp("two")
    args_json = write_json(folder / "args.json", folder / "out", gradient_accumulation_steps=1, **SETTINGS)
    statuses = train_with_two_processes(flags_of(args_json, *paths, "--lora_dropout", 0), folder / "log")
    printed = (folder / "log").read_text()
    assert statuses == [0, 0], printed
    assert printed.count("The adapter is in") == 1
    return folder / "out"


def test_two_processes_give_the_results_of_one(two_processes, paths, tmp_path):
    args_json = write_json(tmp_path / "args.json", tmp_path / "out", **SETTINGS)
    run_main(train_qlora, *flags_of(args_json, *paths, "--lora_dropout", 0))
    # The 11 rows of the evaluation cannot be divided evenly.
    for key in ("loss", "grad_norm", "eval_loss"):
        expected = history(tmp_path / "out", key)
        assert history(two_processes, key) == pytest.approx(expected, rel=1e-4) and expected
    one, two = adapter(tmp_path / "out"), adapter(two_processes)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=0)


def test_job_ends_when_a_process_is_killed_and_can_be_resumed(two_processes, paths, tmp_path):
    output = tmp_path / "out"
    args_json = write_json(tmp_path / "args.json", output, gradient_accumulation_steps=1, **SETTINGS)
    flags = flags_of(args_json, *paths, "--lora_dropout", 0)
    with Job(flags) as job:
        deadline = time.monotonic() + 200
        while not checkpoints(output):
            assert job.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        job.rank(1).kill()
        killed = time.monotonic()
        printed = job.end(timeout=MOST_SECONDS)
    assert job.process.returncode != 0 and time.monotonic() - killed < MOST_SECONDS
    assert "rank      : 1" in printed and "SIGKILL" in printed
    present = checkpoints(output)
    assert present and not any(map(checkpoint_problem, present)) and not (output / "adapter_config.json").exists()
    log = tmp_path / "log"
    assert train_with_two_processes([*flags, "--resume_from_checkpoint", "last"], log) == [0, 0], log.read_text()
    for key in ("loss", "grad_norm", "eval_loss"):
        assert history(output, key) == history(two_processes, key)
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (two_processes / name).read_bytes()


def test_loss_that_is_not_finite_ends_all_processes_with_one_message(paths, tmp_path):
    values = SETTINGS | {"gradient_accumulation_steps": 1, "learning_rate": 1e30, "warmup_ratio": 0}
    args_json = write_json(tmp_path / "args.json", tmp_path / "out", **values)
    assert train_with_two_processes(flags_of(args_json, *paths), tmp_path / "log") == [1, 1]
    (message,) = [line for line in (tmp_path / "log").read_text().splitlines() if "error: step 2" in line]
    lines = message.split("on lines ")[1].split(" of the training data")[0].split(", ")
    assert len(set(lines)) == 8  # of both processes
    assert checkpoints(tmp_path / "out") == []


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 11, 24, 25])
def test_every_row_is_evaluated_once(processes, rows):
    batch_size, evaluated = 4, []
    for rank in range(processes):
        sampler = BatchSampler(SequentialSampler(range(rows)), batch_size, drop_last=False)
        for number, batch in enumerate(BatchSamplerShard(sampler, processes, rank)):
            evaluated += own_samples(batch, number * processes + rank, batch_size, rows)
    assert sorted(evaluated) == list(range(rows))
