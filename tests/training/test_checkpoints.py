"""qlora/training/checkpoints.py: a checkpoint or adapter is complete or absent, even if writing it fails."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import (
    HOSTILE_TIMES,
    SAVE_STEPS,
    STEPS,
    error_of,
    flags_of,
    fork,
    history,
    hostile_random,
    largest_file,
    run_main,
    write_json,
    write_output_to,
)
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerState, TrainingArguments

import train_qlora
from chatglm import ChatGLMForConditionalGeneration
from qlora.adapter import add_lora
from qlora.arguments import FinetuneArguments, LoraSettings
from qlora.errors import TrainingStopped
from qlora.loading import load_quantized_model
from qlora.training import model_card
from qlora.training.checkpoints import (
    ADAPTER_FILE,
    CHECKPOINT_FILES,
    STAGING,
    check_best_checkpoint,
    check_output_dir,
    check_same_adapter,
    check_saved_adapter,
    checkpoint_problem,
    checkpoints,
    delete_old_checkpoints,
    find_checkpoint,
    staging_dir,
)
from qlora.training.model_card import CARD, PICTURE
from qlora.training.preflight import run_preflight
from qlora.training.same_run import RUN_FILE, describe_run
from qlora.training.trainer import FindBestCheckpoint, QLoRATrainer
from qlora.training.training_args import read_training_args

KILLS = 6 * HOSTILE_TIMES  # of each kind: at random times, at random file accesses, in random forward passes
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
    write_output_to(log)
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


class Run:
    """A training run that ends in its second epoch; checkpoints, evaluations and logs are at different steps."""

    def __init__(self, folder: Path, *paths: Path):
        folder.mkdir()
        self.output, self.log = folder / "out", folder / "log.txt"
        values = {"max_steps": 10, "save_steps": 2, "eval_steps": 3, "logging_steps": 5}
        values["lr_scheduler_type"] = "constant_with_warmup"  # the last steps change the adapter, too
        self.flags = flags_of(write_json(folder / "args.json", self.output, **values), *paths)

    def start(self, kind: str = "", kill_at: int | None = None, counts: Path | None = None) -> BaseProcess:
        resume = ["--resume_from_checkpoint", "last"] if checkpoints(self.output) else []
        return fork(train, self.flags + resume, self.log, kind, kill_at, counts)

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
def uninterrupted(tiny_checkpoint, train_file, dev_file, tmp_path_factory) -> tuple[tuple, float, dict]:
    """Results and seconds of an uninterrupted run, and its numbers of file accesses and forward passes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = Run(folder / "run", tiny_checkpoint, train_file, dev_file)
    started = time.perf_counter()
    process = run.start(counts=folder / "counts")
    process.join()
    assert process.exitcode == 0, run.log.read_text()
    return run.results(), time.perf_counter() - started, json.loads((folder / "counts").read_text())


@pytest.mark.parametrize("kind", ["time", "access", "pass"])
def test_killed_run_resumes_to_identical_results(kind, uninterrupted, tiny_checkpoint, train_file, dev_file, tmp_path):
    expected, seconds, counts = uninterrupted
    draw, killed = hostile_random(kind), 0
    run = Run(tmp_path / "run", tiny_checkpoint, train_file, dev_file)
    while killed < KILLS:
        started, from_the_start = time.perf_counter(), not checkpoints(run.output)
        if kind == "time":
            process = run.start()
            process.join(draw.uniform(0.2, 1.0) * seconds)
            process.kill()
        else:
            process = run.start(kind, kill_at=draw.randint(1, counts[kind] // 2))
        process.join()
        if process.exitcode == 0:  # the run ended before the kill
            if from_the_start:
                seconds = time.perf_counter() - started  # the machine is less busy than before
            assert run.results() == expected
            shutil.rmtree(run.output)
            continue
        assert process.exitcode == -signal.SIGKILL, run.log.read_text()
        killed += 1
        assert [checkpoint_problem(path) for path in checkpoints(run.output)] == [None] * len(checkpoints(run.output))
        if (run.output / "adapter_config.json").exists():  # the result was there before the kill
            assert run.results() == expected
            shutil.rmtree(run.output)
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
    draw, (path,) = hostile_random(pattern), (output / f"checkpoint-{STEPS}").glob(pattern)
    content, found = path.read_bytes(), []
    ends = [*range(min(len(content), 100)), *range(max(len(content) - 500, 0), len(content))]  # where headers are
    for _ in range(150 * HOSTILE_TIMES):
        damaged = bytearray(content)
        for position in (*draw.choices(ends, k=draw.randint(0, 3)), draw.randrange(len(content))):
            damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found.append(checkpoint_problem(path.parent))
    if pattern != RUN_FILE:  # a changed number there makes another file the wrong one
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


def edit(path: Path, **changes):
    """Changes values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_adapter(checkpoint: Path, change: Callable[[dict], object]) -> str:
    """Changes the tensors of a checkpoint's adapter; returns the name of the first one."""
    tensors = load_file(checkpoint / ADAPTER_FILE)
    name = min(tensors)
    change(tensors)
    save_file(tensors, checkpoint / ADAPTER_FILE)
    return name


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tensors: tensors.pop(min(tensors)), "not at all instead of 4x64"),
        (lambda tensors: tensors.update({min(tensors): torch.zeros(3, 64)}), "3x64 instead of 4x64"),
        (lambda tensors: tensors.update(renamed=tensors.pop(min(tensors))), "not at all instead of 4x64"),
    ],
)
def test_missing_renamed_or_other_tensor_of_the_adapter_is_named(output, change, found):
    newest = output / f"checkpoint-{STEPS}"
    name = change_adapter(newest, change)
    assert checkpoint_problem(newest) == f"{ADAPTER_FILE} has {name} {found}"
    assert find_checkpoint("last", str(output)) == str(output / f"checkpoint-{SAVE_STEPS}")


def test_additional_tensor_of_the_adapter_is_named(output):
    change_adapter(output / f"checkpoint-{STEPS}", lambda tensors: tensors.update(more=torch.zeros(2)))
    assert checkpoint_problem(output / f"checkpoint-{STEPS}") == f"{ADAPTER_FILE} has more 2 instead of not at all"


def test_missing_random_state_of_a_process_is_named(output):
    newest = output / f"checkpoint-{STEPS}"
    edit(newest / RUN_FILE, processes=2)
    (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")
    assert checkpoint_problem(newest) == "rng_state_1.pth is missing, of 2 processes"
    shutil.copy(newest / "rng_state_0.pth", newest / "rng_state_1.pth")
    assert checkpoint_problem(newest) is None


@pytest.mark.parametrize("content", ["{}", '{"processes": 1}', '{"processes": "1", "adapter": {}}', '{"adapter": {}}'])
def test_invalid_description_of_the_run_is_reported(output, content):
    (output / f"checkpoint-{STEPS}" / RUN_FILE).write_text(content)
    assert "run.json is damaged" in checkpoint_problem(output / f"checkpoint-{STEPS}")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_file_or_link_with_the_name_of_a_checkpoint_is_not_touched(output, tmp_path, kind):
    other = shutil.move(output / f"checkpoint-{STEPS}", tmp_path / "other")
    present = output / f"checkpoint-{STEPS}"
    present.write_text("mine") if kind == "file" else present.symlink_to(other, target_is_directory=True)
    assert find_checkpoint("last", str(output)) == str(output / f"checkpoint-{SAVE_STEPS}")
    with pytest.raises(ValueError, match=f"checkpoint-{STEPS} is a file or a link, where the run may write"):
        check_output_dir(str(output), str(output / f"checkpoint-{SAVE_STEPS}"))
    shutil.copytree(output / f"checkpoint-{SAVE_STEPS}", output / "checkpoint-12")
    assert [path.name for path in checkpoints(output)] == ["checkpoint-12", f"checkpoint-{SAVE_STEPS}"]  # by number
    delete_old_checkpoints(output / "checkpoint-12", 2, None)  # it is not counted either
    assert {path.name for path in output.iterdir()} == {f"checkpoint-{SAVE_STEPS}", present.name, "checkpoint-12"}
    assert kind == "file" or checkpoint_problem(Path(other)) is None


def test_folders_with_other_names_are_no_checkpoints(output):
    for name in ("checkpoint-99.old", "checkpoint-best", STAGING):
        shutil.copytree(output / f"checkpoint-{STEPS}", output / name)
    shutil.copytree(output / f"checkpoint-{STEPS}", output / STAGING / "checkpoint-100")
    assert find_checkpoint("last", str(output)) == str(output / f"checkpoint-{STEPS}")


def test_resuming_with_another_adapter_is_refused(output):
    checkpoint = str(output / f"checkpoint-{STEPS}")
    saved = LoraConfig.from_pretrained(checkpoint)
    given = LoraSettings(saved.r, float(saved.lora_alpha), 0.5, sorted(saved.target_modules))
    check_same_adapter(checkpoint, given)
    for flag, old, change in [
        ("--lora_rank", saved.r, {"rank": 16}),
        ("--lora_alpha", saved.lora_alpha, {"alpha": 16}),
        ("--lora_target_modules", "query_key_value", {"target_modules": ["query_key_value", "dense"]}),
    ]:
        new = " ".join(sorted(value)) if isinstance(value := next(iter(change.values())), list) else value
        with pytest.raises(ValueError, match=re.escape(f"an adapter of {flag} {old} (not {new}), and")):
            check_same_adapter(checkpoint, given._replace(**change))


@pytest.mark.parametrize("config", [{}, {"target_modules": None}, {"r": "4", "target_modules": "all-linear"}])
def test_checkpoint_with_an_invalid_adapter_config_is_refused(output, config):
    checkpoint = output / f"checkpoint-{STEPS}"
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"--lora_rank .* --lora_target_modules"):
        check_same_adapter(str(checkpoint), LoraSettings())


# A resumed run is the run of its checkpoint.


@pytest.fixture
def problems_of(output, tiny_checkpoint, train_file, dev_file, tmp_path) -> Callable[..., list[str]]:
    """A function (values of the JSON, flags) -> the problems of resuming from the first checkpoint of `trained`."""
    checkpoint = output / f"checkpoint-{SAVE_STEPS}"
    shutil.rmtree(output / f"checkpoint-{STEPS}")

    def find(values: dict, **flags) -> list[str]:
        values = {"lr_scheduler_type": "constant"} | values
        given = {
            "train_args_json": str(write_json(tmp_path / "args.json", output, **values)),
            "model_name_or_path": str(tiny_checkpoint),
            "train_data_path": [str(train_file)],
            "eval_data_path": str(dev_file),
            "resume_from_checkpoint": str(checkpoint),
        }
        return run_preflight(FinetuneArguments(**given | flags)).problems

    return find


@pytest.mark.parametrize(
    ("values", "before", "now"),
    [
        ({"learning_rate": 1e-4}, "learning_rate 0.01", "0.0001"),
        ({"lr_scheduler_type": "cosine"}, 'lr_scheduler_type "constant"', '"cosine"'),
        ({"optim": "sgd"}, 'optim "adamw_torch"', '"sgd"'),
        ({"weight_decay": 0.1}, "weight_decay 0.0", "0.1"),
        ({"max_grad_norm": 0.5}, "max_grad_norm 1.0", "0.5"),
        ({"seed": 1}, "seed 42", "1"),
        ({"per_device_train_batch_size": 8}, "gradient_accumulation_steps 8", "16"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end false", "true"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_with_other_settings_is_refused(problems_of, values, before, now):
    (problem,) = problems_of(values)
    assert f"{before} (not {now})" in problem and "a run goes on as it began" in problem
    assert f"start another run from this adapter with --init_adapter {problem.split()[0]}" in problem


def test_resuming_with_other_flags_or_data_is_refused(problems_of, train_file, tmp_path):
    other = shutil.copy(train_file, tmp_path / "other.jsonl")
    assert problems_of({}, train_data_path=[str(other)]) == []  # the same rows under another name
    lines = train_file.read_text(encoding="utf-8").splitlines()
    Path(other).write_text("\n".join(lines[:40]), encoding="utf-8")
    (problem,) = problems_of({}, train_data_path=[str(other)], lora_dropout=0.5, prompt_text="问", max_input_length=99)
    assert re.search(r'--train_data_path "48 samples, sha256 \w{12}" \(not "40 samples, sha256 \w{12}"\)', problem)
    assert "--lora_dropout 0.05 (not 0.5)" in problem and '--prompt_text "" (not "问")' in problem
    assert "--max_input_length 512 (not 99)" in problem
    (problem,) = problems_of({}, max_output_length=99)
    assert re.search(r"--max_output_length \d+ \(not 99\)", problem)


def test_resuming_with_another_number_of_processes_is_refused(problems_of, output):
    checkpoint = output / f"checkpoint-{SAVE_STEPS}"
    edit(checkpoint / RUN_FILE, processes=2)
    for number in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{number}.pth")
    (problem,) = problems_of({})
    assert "is of a run with processes 2 (not 1), and" in problem


def test_description_of_a_run_has_its_processes_arithmetic_and_weights(train_file, tmp_path, monkeypatch):
    setup = read_training_args(str(write_json(tmp_path / "args.json", tmp_path / "out")), compute_dtype="fp8")
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    runs = [
        describe_run(FinetuneArguments(train_data_path=[data], eval_data_path=None), setup, 48, {})
        for data in (str(train_file), f"{train_file}:0.5")
    ]
    assert runs[0]["processes"] == 2 and runs[0]["settings"]["--compute_dtype"] == "fp8"
    different = [name for name, value in runs[0]["settings"].items() if runs[1]["settings"][name] != value]
    assert different == ["--train_data_path"]


def test_resuming_with_the_adapter_of_another_model_is_refused(problems_of, output):
    checkpoint = output / f"checkpoint-{SAVE_STEPS}"
    name = change_adapter(checkpoint, lambda tensors: tensors.update({min(tensors): torch.zeros(4, 96)}))
    shapes = json.loads((checkpoint / RUN_FILE).read_text())["adapter"]
    edit(checkpoint / RUN_FILE, adapter=shapes | {name: "4x96"})
    (problem,) = problems_of({})
    assert "is of a run with a model of other layers or widths, and" in problem
    (problem,) = problems_of({"seed": 1})
    assert "is of a run with seed 42 (not 1), and" in problem  # this may be why


@pytest.mark.parametrize(
    "values",
    [
        {"logging_steps": 2, "save_steps": 2, "save_total_limit": 3, "eval_steps": 1, "per_device_eval_batch_size": 2},
        {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8},
        {"max_steps": 20},  # with a constant learning rate
        {"evaluation_strategy": "no"},
    ],
)
def test_settings_without_effect_on_what_is_learned_may_change(problems_of, values):
    assert problems_of(values) == []


@pytest.mark.parametrize(
    ("schedule", "length", "matters"),
    [
        ({"lr_scheduler_type": "linear"}, "num_train_epochs", True),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, "num_train_epochs", False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.3}, "num_train_epochs", True),
        ({"lr_scheduler_type": "linear", "max_steps": 9}, "max_steps", True),
        ({"lr_scheduler_type": "linear", "max_steps": 9}, "num_train_epochs", False),
    ],
)
def test_length_of_a_run_matters_if_the_schedule_depends_on_it(train_file, tmp_path, schedule, length, matters):
    args = FinetuneArguments(train_data_path=[str(train_file)], eval_data_path=None)
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"output_dir": "out", "report_to": "none"} | schedule))
    settings = describe_run(args, read_training_args(str(path)), 48, {})["settings"]
    assert (length in settings) is matters and settings["--train_on"] == "all"


def test_evaluations_matter_if_they_choose_the_best_checkpoint(train_file, dev_file, tmp_path):
    args = FinetuneArguments(train_data_path=[str(train_file)], eval_data_path=str(dev_file))
    path = tmp_path / "args.json"
    for metric in ("loss", None):
        values = {"output_dir": "out", "report_to": "none", "eval_strategy": "steps", "metric_for_best_model": metric}
        path.write_text(json.dumps(values))
        settings = describe_run(args, read_training_args(str(path)), 48, {})["settings"]
        assert ("eval_steps" in settings, "--eval_data_path" in settings) == (metric is not None,) * 2


def test_description_of_a_run_holds_no_token_and_no_path(trained):
    text = (trained / f"checkpoint-{STEPS}" / RUN_FILE).read_text()
    assert "hub_token" not in text and str(trained.parent) not in text


def test_finished_run_says_so(trained, tiny_checkpoint, train_file, dev_file, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    for steps, expected in (
        (STEPS, f"the run in {trained} is finished: all {STEPS} steps are trained"),
        (STEPS - 1, f"has {STEPS} steps, and the run ends after {STEPS - 1}"),
    ):
        args_json = write_json(tmp_path / "args.json", trained, lr_scheduler_type="constant", max_steps=steps)
        flags = flags_of(args_json, tiny_checkpoint, train_file, dev_file)
        assert expected in error_of(train_qlora, *flags, "--resume_from_checkpoint", "last")
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


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


def test_last_checkpoint_may_have_another_path(output, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(output / f"checkpoint-{STEPS}")
    monkeypatch.chdir(tmp_path)
    for path in (f"out/checkpoint-{STEPS}", "link"):
        check_output_dir(str(output), path)


@pytest.mark.parametrize("damaged", [False, True])
def test_run_that_was_stopped_near_its_end_can_be_resumed(
    trained, tiny_checkpoint, train_file, dev_file, tmp_path, damaged
):
    output = shutil.copytree(trained, tmp_path / "out")
    if damaged:  # the checkpoint that is skipped is replaced
        truncate(output / f"checkpoint-{STEPS}" / "optimizer.pt")
    else:  # all steps are trained, but the result was not written
        (output / "adapter_config.json").unlink()
    args_json = write_json(tmp_path / "args.json", output, lr_scheduler_type="constant")
    flags = flags_of(args_json, tiny_checkpoint, train_file, dev_file)
    run_main(train_qlora, *flags, "--resume_from_checkpoint", "last")
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (trained / name).read_bytes()
    assert history(output, "loss") == history(trained, "loss")
    assert checkpoint_problem(output / f"checkpoint-{STEPS}") is None
    assert len(history(output, "train_loss")) == damaged  # no summary of a run without a step


def test_best_checkpoint_is_kept_and_loaded_after_the_folder_was_renamed(
    tiny_checkpoint, train_file, dev_file, tmp_path, monkeypatch
):
    training_step = QLoRATrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == SAVE_STEPS:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    values = {"load_best_model_at_end": True, "save_total_limit": 1, "save_steps": 2, "eval_steps": 2}
    paths = (tiny_checkpoint, train_file, dev_file)
    with monkeypatch.context() as patch:
        patch.setattr(QLoRATrainer, "training_step", interrupted)
        with pytest.raises(SystemExit, match="130"):
            run_main(train_qlora, *flags_of(write_json(tmp_path / "args.json", tmp_path / "first", **values), *paths))
    output = (tmp_path / "first").rename(tmp_path / "renamed")
    best = shutil.copytree(output / "checkpoint-4", output / "checkpoint-2")
    change_adapter(best, lambda tensors: tensors.update({name: tensor + 1 for name, tensor in tensors.items()}))
    found = {"best_model_checkpoint": str(tmp_path / "first" / "checkpoint-2"), "best_global_step": 2}
    edit(output / "checkpoint-4" / "trainer_state.json", best_metric=0.0, **found)
    flags = flags_of(write_json(tmp_path / "args.json", output, **values), *paths)
    flags += ["--resume_from_checkpoint", str(output / "checkpoint-4")]
    hidden = best.rename(output / "hidden")
    assert f"{best}, the best checkpoint so far" in error_of(train_qlora, *flags)
    hidden.rename(best)
    run_main(train_qlora, *flags)
    assert [path.name for path in checkpoints(output)] == [f"checkpoint-{STEPS}", "checkpoint-2"]
    result, expected = load_file(output / ADAPTER_FILE), load_file(best / ADAPTER_FILE)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert json.loads((output / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


def test_damaged_best_checkpoint_is_named(output):
    newest, best = checkpoints(output)
    edit(newest / "trainer_state.json", best_model_checkpoint=f"elsewhere/{best.name}")
    check_best_checkpoint(str(newest))
    (best / ADAPTER_FILE).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"{best}, the best checkpoint so far, is missing or damaged"):
        check_best_checkpoint(str(newest))


def test_best_checkpoint_that_is_gone_is_none(output):
    newest, best = checkpoints(output)
    edit(newest / "trainer_state.json", best_model_checkpoint=f"elsewhere/{best.name}")
    for expected in (str(best), None):
        state = TrainerState()
        FindBestCheckpoint(str(newest)).on_train_begin(None, state, None)
        assert state.best_model_checkpoint == expected
        shutil.rmtree(best, ignore_errors=True)


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


LARGEST = [7_000, *hostile_random("disk").choices(range(9_000), k=HOSTILE_TIMES - 1)]  # the adapter has 9 kB


@pytest.fixture
def message_of_full_disk(tiny_checkpoint, train_file, tmp_path, monkeypatch) -> Callable[[str, str, str], str]:
    """Trains, and lets a method of the Trainer fail when it writes a file of a folder, as on a full disk.

    Returns:
        A function (method, folder in the staging folder, file or size of the largest possible file) -> error message.
    """

    def run(method: str, folder: str, file: str | int) -> str:
        write, target = getattr(Trainer, method), tmp_path / "out" / STAGING / folder

        def write_on_full_disk(self, *args):
            if target.name not in (f"checkpoint-{self.state.global_step}", Path(str(args[0])).name):
                return write(self, *args)
            if isinstance(file, int):
                with largest_file(file):
                    return write(self, *args)
            target.mkdir(parents=True)
            (target / file).symlink_to("/dev/full")
            return write(self, *args)

        monkeypatch.setattr(Trainer, method, write_on_full_disk)
        args_json = write_json(tmp_path / "args.json", tmp_path / "out")
        return error_of(train_qlora, *flags_of(args_json, tiny_checkpoint, train_file, "none"))

    return run


@pytest.mark.parametrize(
    "file", [*LARGEST, "training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
)
def test_full_disk_while_a_checkpoint_is_written(message_of_full_disk, tmp_path, file):
    output = tmp_path / "out"
    message = message_of_full_disk("_save_checkpoint", f"checkpoint-{STEPS}", file)
    assert re.search(rf"saving in {output} failed: (its disk is full|a file there).*\. Make room\. ", message)
    assert f"checkpoint-{SAVE_STEPS} is whole: go on from it with --resume_from_checkpoint last" in message
    assert [path.name for path in output.iterdir()] == [f"checkpoint-{SAVE_STEPS}"]
    assert checkpoint_problem(output / f"checkpoint-{SAVE_STEPS}") is None


@pytest.mark.parametrize("file", [*LARGEST, "ice_text.model"])
def test_full_disk_while_the_result_is_written(message_of_full_disk, tmp_path, file):
    message = message_of_full_disk("_save", "", file)
    assert f"checkpoint-{STEPS} is whole" in message
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"checkpoint-{s}" for s in (SAVE_STEPS, STEPS)}


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the quota of its disk is reached. Make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "its disk is full. Make room"),
        (PermissionError(errno.EACCES, "denied", "out"), "[Errno 13] denied: 'out'"),
        (SafetensorError("I/O error: Input/output error (os error 5)"), "I/O error: Input/output error (os error 5)"),
    ],
)
def test_message_asks_for_room_only_if_it_is_missing(tmp_path, error, problem):
    with pytest.raises(TrainingStopped) as raised, staging_dir(str(tmp_path), owner=True):
        raise error
    assert str(raised.value) == f"saving in {tmp_path} failed: {problem}. There is no checkpoint yet."


@pytest.mark.parametrize("file", [PICTURE, CARD])
def test_full_disk_after_the_adapter_is_written(tiny_checkpoint, train_file, tmp_path, monkeypatch, file):
    output = tmp_path / "out"
    flags = flags_of(write_json(tmp_path / "args.json", output), tiny_checkpoint, train_file, "none")
    write_model_card = model_card.write_model_card

    def write_on_full_disk(folder: Path, *args):
        if file == CARD:
            (folder / file).symlink_to("/dev/full")
        return write_model_card(folder, *args)

    with monkeypatch.context() as patch:
        patch.setattr(model_card, "write_model_card", write_on_full_disk)
        if file == PICTURE:
            patch.setattr(Figure, "savefig", lambda self, path: Path("/dev/full").write_bytes(b"a picture"))
        message = error_of(train_qlora, *flags)
    assert f"saving in {output} failed: its disk is full. Make room. {output}/checkpoint-{STEPS} is whole" in message
    assert (output / ADAPTER_FILE).is_file() and not (output / PICTURE).exists()
    run_main(train_qlora, *flags, "--resume_from_checkpoint", "last")
    assert (output / PICTURE).is_file() and "Training data" in (output / CARD).read_text(encoding="utf-8")


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
