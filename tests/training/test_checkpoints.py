"""qlora/training/checkpoints.py: a checkpoint or adapter is complete or absent, even if writing it fails."""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SAVE_STEPS, STEPS, error_of, flags_of, history, run_main, write_json
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import Trainer

import train_qlora
from chatglm import ChatGLMForConditionalGeneration
from qlora.errors import TrainingStopped
from qlora.loading import add_lora, load_quantized_model
from qlora.training.checkpoints import (
    CHECKPOINT_FILES,
    STAGING,
    check_output_dir,
    check_same_adapter,
    check_saved_adapter,
    checkpoint_problem,
    checkpoints,
    delete_old_checkpoints,
    find_checkpoint,
    staging_dir,
)

KILLS = 6  # of each kind: at random times, at random file accesses, in random forward passes
LOGGED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")


# A run that is killed several times.


def train(flags: list[str], log: Path, kind: str, kill_at: int | None, counts: Path | None):
    """Trains in this process and sends it SIGKILL.

    Args:
        flags: of train_qlora.py.
        log: file for stdout and stderr.
        kind: of the events to count for the kill: "access" to a file of the output, or forward "pass".
        kill_at: number of the event at which the process is killed; None for never.
        counts: file for the numbers of events; None for no file.
    """
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    output_dir, counted = json.loads(Path(flags[1]).read_text())["output_dir"], Counter()

    def count_event(event_kind: str, description: str):
        counted[event_kind] += 1
        if event_kind == kind and counted[event_kind] == kill_at:
            print(f"killed: {description}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_audit_event(event: str, arguments: tuple):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and output_dir in str(arguments[0]):
            count_event("access", f"{event} {arguments[0]}")

    def model_pass(self, *args, **kwargs):
        count_event("pass", "training" if self.training else "evaluation")
        return forward(self, *args, **kwargs)

    forward, ChatGLMForConditionalGeneration.forward = ChatGLMForConditionalGeneration.forward, model_pass
    sys.addaudithook(on_audit_event)
    run_main(train_qlora, *flags)
    if counts:
        counts.write_text(json.dumps(counted))


@pytest.fixture(scope="session")
def processes() -> multiprocessing.context.BaseContext:
    """Starts processes by forking one that has done the imports, which saves seconds."""
    context = multiprocessing.get_context("forkserver")
    training = ("preflight_report", "trainer", "memory_plan", "curves")  # train_qlora imports them when it needs them
    modules = [
        "pytest",
        "qlora.layers.replacement",
        "matplotlib.figure",
        *(f"qlora.training.{name}" for name in training),
    ]
    context.set_forkserver_preload(modules)
    first = context.Process(target=time.perf_counter)
    first.start()
    first.join()
    return context


class Run:
    """A training run that ends in its second epoch; checkpoints, evaluations and logs are at different steps."""

    def __init__(self, folder: Path, processes: multiprocessing.context.BaseContext, *paths: Path):
        folder.mkdir()
        self.output, self.log, self.processes = folder / "out", folder / "log.txt", processes
        values = {"max_steps": 10, "save_steps": 2, "eval_steps": 3, "logging_steps": 5}
        values["lr_scheduler_type"] = "constant_with_warmup"  # the last steps change the adapter, too
        self.flags = flags_of(write_json(folder / "args.json", self.output, **values), *paths)

    def start(
        self, kind: str = "", kill_at: int | None = None, counts: Path | None = None
    ) -> multiprocessing.process.BaseProcess:
        resume = ["--resume_from_checkpoint", "last"] if checkpoints(self.output) else []
        process = self.processes.Process(target=train, args=(self.flags + resume, self.log, kind, kill_at, counts))
        process.start()
        return process

    def finish(self):
        process = self.start()
        process.join()
        assert process.exitcode == 0, self.log.read_text()

    def results(self) -> tuple[list[dict], bytes]:
        """The results that must not depend on interruptions: the log without times, and the file of the adapter."""
        state = json.loads((self.output / "trainer_state.json").read_text())
        entries = [{key: entry[key] for key in LOGGED if key in entry} for entry in state["log_history"]]
        entries = [entry for entry in entries if "loss" in entry or "eval_loss" in entry]
        return entries, (self.output / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def uninterrupted(processes, tiny_checkpoint, train_file, dev_file, tmp_path_factory) -> tuple[tuple, float, dict]:
    """Results and seconds of an uninterrupted run, and its numbers of file accesses and forward passes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = Run(folder / "run", processes, tiny_checkpoint, train_file, dev_file)
    started = time.perf_counter()
    process = run.start(counts=folder / "counts")
    process.join()
    assert process.exitcode == 0, run.log.read_text()
    return run.results(), time.perf_counter() - started, json.loads((folder / "counts").read_text())


@pytest.mark.parametrize("kind", ["time", "access", "pass"])
def test_killed_run_resumes_to_identical_results(
    kind, uninterrupted, processes, tiny_checkpoint, train_file, dev_file, tmp_path
):
    expected, seconds, counts = uninterrupted
    draw, killed = random.Random(kind), 0
    run = Run(tmp_path / "run", processes, tiny_checkpoint, train_file, dev_file)
    while killed < KILLS:
        if kind == "time":
            process = run.start()
            process.join(draw.uniform(0.2, 1.0) * seconds)
            process.kill()
        else:
            process = run.start(kind, kill_at=draw.randint(1, counts[kind] // 2))
        process.join()
        if process.exitcode == 0:  # the run ended before the kill
            assert run.results() == expected
            shutil.rmtree(run.output)
            continue
        assert process.exitcode == -signal.SIGKILL, run.log.read_text()
        killed += 1
        assert [checkpoint_problem(path) for path in checkpoints(run.output)] == [None] * len(checkpoints(run.output))
    run.finish()
    assert run.results() == expected
    assert not (run.output / STAGING).exists()
    if kind == "pass":
        assert set(re.findall(r"killed: (\w+)", run.log.read_text())) == {"training", "evaluation"}


# Which checkpoint to resume from, and where to write.


@pytest.fixture(scope="session")
def trained(tiny_checkpoint, train_file, dev_file, tmp_path_factory) -> Path:
    """The output of a run of 8 steps with checkpoints after 4 and 8. Do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    args_json = write_json(folder / "args.json", folder / "out", lr_scheduler_type="constant")
    run_main(train_qlora, *flags_of(args_json, tiny_checkpoint, train_file, dev_file))
    return folder / "out"


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    """A folder with copies of the checkpoints of `trained`, as after a run that did not end."""
    for step in (SAVE_STEPS, STEPS):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    return tmp_path / "out"


def truncate(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def fill_with_zeros(path: Path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [Path.unlink, truncate, fill_with_zeros, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("pattern", CHECKPOINT_FILES)
def test_incomplete_checkpoint_is_skipped(output, caplog, pattern, damage):
    newest = output / f"checkpoint-{STEPS}"
    (file,) = newest.glob(pattern)
    damage(file)
    assert find_checkpoint("last", str(output)) == str(output / f"checkpoint-{SAVE_STEPS}")
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"{newest} is passed over: ") and file.stem.removesuffix("_state") in line
    with pytest.raises(FileNotFoundError, match=f"--resume_from_checkpoint {newest}: not a whole checkpoint"):
        find_checkpoint(str(newest), str(output))


def test_flipped_bit_in_the_optimizer_is_detected(output):
    path = output / f"checkpoint-{STEPS}" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "optimizer.pt is damaged" in checkpoint_problem(path.parent)


@pytest.mark.parametrize("pattern", CHECKPOINT_FILES)
def test_flipped_bits_raise_no_exception(output, pattern):
    draw, (path,) = random.Random(pattern), (output / f"checkpoint-{STEPS}").glob(pattern)
    content, found = path.read_bytes(), []
    ends = [*range(min(len(content), 100)), *range(max(len(content) - 500, 0), len(content))]  # where headers are
    for _ in range(150):
        damaged = bytearray(content)
        for position in (*draw.choices(ends, k=draw.randint(0, 3)), draw.randrange(len(content))):
            damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found.append(checkpoint_problem(path.parent))
    assert all(reason is None or reason.startswith(f"{path.name} ") for reason in found)
    assert sum(reason is not None for reason in found) > 5  # not more, since safetensors has no check sums


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '"'])
def test_invalid_json_is_reported(output, content):
    (output / f"checkpoint-{STEPS}" / "trainer_state.json").write_text(content)
    assert "trainer_state.json is damaged" in checkpoint_problem(output / f"checkpoint-{STEPS}")


def test_scaler_may_be_missing_but_not_damaged(output):
    scaler = output / f"checkpoint-{STEPS}" / "scaler.pt"
    torch.save({"scale": 1.0}, scaler)
    assert checkpoint_problem(scaler.parent) is None
    truncate(scaler)
    assert "scaler.pt is damaged" in checkpoint_problem(scaler.parent)


def test_folders_with_other_names_are_no_checkpoints(output):
    for name in ("checkpoint-99.old", "checkpoint-best", STAGING):
        shutil.copytree(output / f"checkpoint-{STEPS}", output / name)
    shutil.copytree(output / f"checkpoint-{STEPS}", output / STAGING / "checkpoint-100")
    assert find_checkpoint("last", str(output)) == str(output / f"checkpoint-{STEPS}")


def test_resuming_with_another_adapter_is_refused(output):
    checkpoint = str(output / f"checkpoint-{STEPS}")
    saved = LoraConfig.from_pretrained(checkpoint)
    given = {"rank": saved.r, "alpha": float(saved.lora_alpha), "target_modules": sorted(saved.target_modules)}
    check_same_adapter(checkpoint, **given)
    check_same_adapter(checkpoint, **given | {"target_modules": given["target_modules"] * 2})
    for flag, old, change in [
        ("--lora_rank", saved.r, {"rank": 16}),
        ("--lora_alpha", saved.lora_alpha, {"alpha": 16}),
        ("--lora_target_modules", "query_key_value", {"target_modules": ["query_key_value", "dense"]}),
    ]:
        new = " ".join(sorted(value)) if isinstance(value := next(iter(change.values())), list) else value
        with pytest.raises(ValueError, match=re.escape(f"an adapter of {flag} {old} (not {new}), and")):
            check_same_adapter(checkpoint, **given | change)


@pytest.mark.parametrize("config", [{}, {"target_modules": None}, {"r": "4", "target_modules": "all-linear"}])
def test_checkpoint_with_an_invalid_adapter_config_is_refused(output, config):
    checkpoint = output / f"checkpoint-{STEPS}"
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"--lora_rank .* --lora_target_modules"):
        check_same_adapter(str(checkpoint), 4, 32, ["query_key_value"])


def test_finished_run_is_not_overwritten(trained, tiny_checkpoint, train_file, dev_file, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    flags = flags_of(write_json(tmp_path / "args.json", trained), tiny_checkpoint, train_file, dev_file)
    elsewhere = tmp_path / "elsewhere" / "checkpoint-4"
    shutil.copytree(trained / "checkpoint-4", elsewhere)
    for resume in ((), ("--resume_from_checkpoint", elsewhere)):
        message = error_of(train_qlora, *flags, *resume)
        assert f"{trained} holds an earlier run (a finished adapter, checkpoint-{STEPS})" in message
        assert "another output_dir" in message and "--resume_from_checkpoint last" in message
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_folder_of_a_model_is_refused_as_output_dir(tiny_checkpoint, train_file, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    flags = flags_of(write_json(tmp_path / "args.json", folder), folder, train_file, "none")
    assert f"output_dir {folder} holds a model (config.json)" in error_of(train_qlora, *flags)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_resuming_is_advised_only_if_a_checkpoint_is_complete(output):
    with pytest.raises(ValueError, match="or go on with --resume_from_checkpoint last"):
        check_output_dir(str(output), None)
    for checkpoint in checkpoints(output):  # as with save_only_model
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=rf"earlier run \(checkpoint-{STEPS}, .*move or delete this one\.$"):
        check_output_dir(str(output), None)


@pytest.mark.parametrize("resume", [None, SAVE_STEPS])
def test_later_checkpoints_of_another_run_are_not_mixed_with_this_one(
    output, tiny_checkpoint, train_file, tmp_path, resume
):
    flags = flags_of(write_json(tmp_path / "args.json", output), tiny_checkpoint, train_file, "none")
    if resume:
        flags += ["--resume_from_checkpoint", str(output / f"checkpoint-{resume}")]
    assert f"{output} holds an earlier run (checkpoint-{STEPS}" in error_of(train_qlora, *flags)


@pytest.mark.parametrize("damaged", [False, True])
def test_finished_run_can_be_resumed(trained, tiny_checkpoint, train_file, dev_file, tmp_path, damaged):
    output = shutil.copytree(trained, tmp_path / "out")
    if damaged:  # the checkpoint that is skipped is replaced
        truncate(output / f"checkpoint-{STEPS}" / "optimizer.pt")
    args_json = write_json(tmp_path / "args.json", output, lr_scheduler_type="constant")
    flags = flags_of(args_json, tiny_checkpoint, train_file, dev_file)
    run_main(train_qlora, *flags, "--resume_from_checkpoint", "last")
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (trained / name).read_bytes()
    assert history(output, "loss") == history(trained, "loss")
    assert checkpoint_problem(output / f"checkpoint-{STEPS}") is None


def test_state_has_the_final_path_of_the_best_checkpoint(tiny_checkpoint, train_file, dev_file, tmp_path):
    output = tmp_path / "out"
    values = {"load_best_model_at_end": True, "save_total_limit": 2, "save_steps": 2, "eval_steps": 2}
    args_json = write_json(tmp_path / "args.json", output, **values)
    run_main(train_qlora, *flags_of(args_json, tiny_checkpoint, train_file, dev_file))
    state = json.loads((output / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = output / f"checkpoint-{min(losses, key=losses.get)}"
    assert state["best_model_checkpoint"] == str(best) and checkpoint_problem(best) is None
    assert len(checkpoints(output)) == 2


@pytest.mark.parametrize(
    ("limit", "best", "remaining"),
    [
        (None, None, {2, 4, 6, 8, 10}),
        (0, None, {2, 4, 6, 8, 10}),
        (-1, None, {2, 4, 6, 8, 10}),
        (1, None, {8, 10}),
        (2, None, {6, 8, 10}),
        (2, "elsewhere/checkpoint-2", {2, 8, 10}),
        (1, "checkpoint-4", {4, 8, 10}),
        (9, "checkpoint-4", {2, 4, 6, 8, 10}),
    ],
)
def test_only_old_checkpoints_are_deleted(tmp_path, limit, best, remaining):
    # checkpoint-10 belongs to another run. Folders with other names belong to the user.
    others = {"checkpoint-best", "checkpoint-4-copy", "checkpoint-", "my-checkpoint-2"}
    for name in (*others, *(f"checkpoint-{step}" for step in (2, 4, 6, 8, 10))):
        (tmp_path / name).mkdir()
    delete_old_checkpoints(tmp_path / "checkpoint-8", limit, best)
    assert {path.name for path in tmp_path.iterdir()} == others | {f"checkpoint-{step}" for step in remaining}


def test_run_does_not_delete_folders_of_the_user(tiny_checkpoint, train_file, tmp_path):
    output = tmp_path / "out"
    (output / "checkpoint-best").mkdir(parents=True)
    args_json = write_json(tmp_path / "args.json", output, save_total_limit=1, save_steps=2)
    run_main(train_qlora, *flags_of(args_json, tiny_checkpoint, train_file, "none"))
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-best", f"checkpoint-{STEPS}"}


# A full disk.


@contextlib.contextmanager
def small_files() -> None:
    """Limits the files that this process can write to 7 kB; the adapter has 9 kB."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def message_of_full_disk(tiny_checkpoint, train_file, tmp_path, monkeypatch) -> Callable[[str, str, str], str]:
    """Trains, and lets a method of the Trainer fail when it writes a file of a folder, as on a full disk.

    Returns:
        A function (method, folder in the staging folder, file or "any") -> error message.
    """

    def run(method: str, folder: str, file: str) -> str:
        write, target = getattr(Trainer, method), tmp_path / "out" / STAGING / folder

        def write_on_full_disk(self, *args):
            if target.name not in (f"checkpoint-{self.state.global_step}", Path(str(args[0])).name):
                return write(self, *args)
            if file == "any":
                with small_files():
                    return write(self, *args)
            target.mkdir(parents=True)
            (target / file).symlink_to("/dev/full")
            return write(self, *args)

        monkeypatch.setattr(Trainer, method, write_on_full_disk)
        args_json = write_json(tmp_path / "args.json", tmp_path / "out")
        return error_of(train_qlora, *flags_of(args_json, tiny_checkpoint, train_file, "none"))

    return run


@pytest.mark.parametrize("file", ["any", "training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_full_disk_while_a_checkpoint_is_written(message_of_full_disk, tmp_path, file):
    output = tmp_path / "out"
    message = message_of_full_disk("_save_checkpoint", f"checkpoint-{STEPS}", file)
    assert f"saving in {output} failed" in message and "MiB are free" in message
    assert f"checkpoint-{SAVE_STEPS} is whole: go on from it with --resume_from_checkpoint last" in message
    assert [path.name for path in output.iterdir()] == [f"checkpoint-{SAVE_STEPS}"]
    assert checkpoint_problem(output / f"checkpoint-{SAVE_STEPS}") is None


@pytest.mark.parametrize("file", ["any", "ice_text.model"])
def test_full_disk_while_the_result_is_written(message_of_full_disk, tmp_path, file):
    message = message_of_full_disk("_save", "", file)
    assert f"checkpoint-{STEPS} is whole" in message
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"checkpoint-{s}" for s in (SAVE_STEPS, STEPS)}


@pytest.mark.parametrize(
    ("error", "lacks_space"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe #0: ..."), True),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out"), False),
        (OSError(errno.EIO, os.strerror(errno.EIO)), False),
        (SafetensorError("I/O error: Input/output error (os error 5)"), False),
        (OSError(), False),
    ],
)
def test_message_asks_for_space_only_if_it_may_be_missing(tmp_path, error, lacks_space):
    with pytest.raises(TrainingStopped) as raised, staging_dir(str(tmp_path), owner=True):
        raise error
    ending = r" \([\d,]+ MiB are free there\)\. Make room" if lacks_space else ""
    first_line = re.escape(str(error).partition("\n")[0])
    pattern = rf"saving in \S+ failed: {first_line}{ending}\. There is no checkpoint yet\."
    assert re.fullmatch(pattern, str(raised.value))


# The saved adapter is the trained one.


@pytest.fixture
def peft_model(tiny_checkpoint):
    return add_lora(load_quantized_model(str(tiny_checkpoint), torch.float32), 4, 32, 0.0, ["query_key_value"])


def test_saved_adapter_is_compared_with_the_one_in_memory(peft_model, tmp_path):
    peft_model.save_pretrained(tmp_path)
    check_saved_adapter(peft_model, tmp_path, Path("out"))
    with torch.no_grad():
        next(p for p in peft_model.parameters() if p.requires_grad)[0, 0] += 1e-6
    with pytest.raises(TrainingStopped, match=r"as it was saved for out: .* was read back differently"):
        check_saved_adapter(peft_model, tmp_path, Path("out"))


def test_adapter_with_values_that_are_not_finite_is_refused(peft_model, tmp_path):
    with torch.no_grad():
        next(p for p in peft_model.parameters() if p.requires_grad)[0, 0] = float("nan")
    peft_model.save_pretrained(tmp_path)
    with pytest.raises(TrainingStopped, match="is not finite"):
        check_saved_adapter(peft_model, tmp_path, Path("out"))


def test_untrained_adapter_is_reported(peft_model, tmp_path, caplog):
    peft_model.save_pretrained(tmp_path)
    check_saved_adapter(peft_model, tmp_path, Path("out"))
    assert "The adapter in out is untrained: every lora_B is zero" in caplog.text
    caplog.clear()
    with torch.no_grad():
        for name, tensor in get_peft_model_state_dict(peft_model).items():
            if "lora_B" in name:
                tensor[0, 0] = 1.0
                break
    peft_model.save_pretrained(tmp_path)
    check_saved_adapter(peft_model, tmp_path, Path("out"))
    assert caplog.text == ""
