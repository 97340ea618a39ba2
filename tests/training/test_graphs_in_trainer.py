"""qlora/training/trainer.py with graphs: a run is the same as without them, and whatever interrupts it.

It runs on a CPU, where a stand-in takes the place of the recording; tests/test_gpu_graphs.py has real graphs.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import StandInRecorder, flags_of, history, run_main, write_json
from safetensors.torch import load_file

import train_qlora
from qlora.training import trainer
from qlora.training.graphs import GraphedPasses

ADAPTER = "adapter_model.safetensors"
# Several micro-batches a step, clipped gradients, evaluations and checkpoints.
VALUES = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "max_grad_norm": 0.1}
FLAGS = ("--max_tokens", "150")


@pytest.fixture(scope="module")
def made() -> list[GraphedPasses]:
    """The graphs of each run so far."""
    return []


@pytest.fixture(scope="module")
def graphs(made) -> Iterator[None]:
    """Runs have graphs."""

    def make(*args) -> GraphedPasses:
        made.append(GraphedPasses(*args, recorder=StandInRecorder))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "kernels_supported", lambda tensor: True)
        patch.setattr(trainer, "GraphedPasses", make)
        yield


@pytest.fixture(scope="module")
def run(tiny_checkpoint, train_file, dev_file, tmp_path_factory) -> Callable[..., Path]:
    """Trains into a folder of this name, with these flags and values of the JSON; returns the folder."""
    root = tmp_path_factory.mktemp("runs")

    def train(name: str, *flags: str, evaluate: bool = True, **values) -> Path:
        path = write_json(root / f"{name}.json", root / name, **VALUES | values)
        rows = train_file, dev_file if evaluate else "none"
        run_main(train_qlora, *flags_of(path, tiny_checkpoint, *rows, *FLAGS, *flags))
        return root / name

    return train


@pytest.fixture(scope="module")
def plain(run) -> Path:
    """The output of a run without graphs; it comes before those with graphs."""
    return run("plain")


@pytest.fixture(scope="module")
def unbroken(plain, graphs, run) -> Path:
    """The output of a run with graphs."""
    return run("unbroken")


def assert_same_bits(one: Path, other: Path):
    assert (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()
    for key in ("loss", "grad_norm"):
        assert history(one, key) == history(other, key)


def test_run_is_that_without_graphs(plain, unbroken, made):
    for key in ("loss", "grad_norm", "eval_loss"):
        assert history(unbroken, key) == pytest.approx(history(plain, key), rel=1e-5)
    torch.testing.assert_close(load_file(unbroken / ADAPTER), load_file(plain / ADAPTER), atol=1e-5, rtol=1e-4)
    assert min(history(plain, "grad_norm")) > VALUES["max_grad_norm"]  # gradients are clipped
    assert {with_gradients for _, with_gradients in made[0].graphs} == {True, False}


def test_resumed_run_is_that_without_a_break(unbroken, run):
    name = "checkpoint-2"
    shutil.copytree(unbroken / name, unbroken.with_name("resumed") / name)
    resumed = run("resumed", "--resume_from_checkpoint", "last")
    assert_same_bits(resumed, unbroken)
    assert history(resumed, "eval_loss") == history(unbroken, "eval_loss")


def test_evaluations_between_steps_change_nothing(unbroken, run):
    assert_same_bits(run("not_evaluated", evaluate=False), unbroken)


def test_out_of_memory_while_a_graph_is_recorded(unbroken, run, made, monkeypatch):
    passes, recorded = GraphedPasses.passes, []

    def run_out_of_memory(self, inputs):
        recorded.append(inputs["input_ids"].shape[1])
        passes(self, inputs)  # leaves gradients and a loss behind
        if recorded[-1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(GraphedPasses, "passes", run_out_of_memory)
    assert_same_bits(run("larger", "--max_tokens", "300", evaluate=False), unbroken)
    assert max(recorded) > 200 >= max(size.tokens for size, _ in made[-1].graphs)


@pytest.mark.parametrize(
    ("failing", "max_tokens"),
    [({2}, "150"), ({2, 3}, "300"), ({2, 4}, "300")],
    ids=["once", "again at once", "again in the next step"],
)
def test_out_of_memory_beside_the_graphs_of_other_steps(unbroken, run, monkeypatch, caplog, failing, max_tokens):
    passes, attempts, failures = GraphedPasses.passes, [], []

    def run_out_of_memory(self, inputs):
        passes(self, inputs)  # leaves gradients and a loss behind
        if len(attempts) in failing and len(attempts) not in failures:
            failures.append(len(attempts))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    forward_backward = GraphedPasses.forward_backward
    monkeypatch.setattr(GraphedPasses, "passes", run_out_of_memory)
    monkeypatch.setattr(GraphedPasses, "forward_backward", lambda *args: attempts.append(1) or forward_backward(*args))
    caplog.set_level("INFO")
    output = run(f"failed_{max(failing)}", "--max_tokens", max_tokens, evaluate=False)
    assert {*failures} == failing
    assert caplog.text.count("CUDA out of memory after 1 steps: recording CUDA graphs anew") == 1
    assert ("going on with at most" in caplog.text) == (len(failing) == 2)
    if len(failing) == 1:
        assert_same_bits(output, unbroken)
