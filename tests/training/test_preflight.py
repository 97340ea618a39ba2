"""qlora/training/preflight.py and its report: what they predict of a run, and that they report all problems."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, copy_tokenizer, write_rows

import train_qlora
from chatglm import ChatGLMConfig
from qlora import loading
from qlora.adapter import add_lora
from qlora.arguments import FinetuneArguments, LoraSettings
from qlora.data.dataset import SampleEncoder, load_samples
from qlora.export.four_bit_copy import write_quantized
from qlora.loading import load_quantized_model
from qlora.training import memory_plan, preflight
from qlora.training.disk_space import LOG_BYTES, STATE_BYTES, RunCounts
from qlora.training.memory_plan import GIB
from qlora.training.preflight import Preflight, check_memory, run_preflight
from qlora.training.preflight_report import describe, histogram, show_sample
from qlora.training.training_args import read_training_args


@pytest.fixture
def values(tmp_path: Path) -> dict:
    """TrainingArguments of a short run."""
    return {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "optim": "adamw_torch",
        "report_to": "none",
    }


@pytest.fixture
def flags(values: dict, tiny_checkpoint: Path, sample_rows: list[dict], tmp_path: Path) -> dict[str, object]:
    """Flags of a run without problems: 48 rows to train on, 11 to evaluate on."""
    (tmp_path / "args.json").write_text(json.dumps(values))
    return {
        "train_args_json": str(tmp_path / "args.json"),
        "model_name_or_path": str(tiny_checkpoint),
        "train_data_path": [str(write_rows(tmp_path / "train.jsonl", sample_rows[:48]))],
        "eval_data_path": str(write_rows(tmp_path / "dev.jsonl", sample_rows[48:59])),
    }


def edit_json(flags: dict, values: dict, **changes):
    Path(flags["train_args_json"]).write_text(json.dumps(values | changes))


def run_main(flags: dict, *more: str):
    """Runs train_qlora.py with these flags in this process."""
    words = [str(word) for name, v in flags.items() for word in (f"--{name}", *(v if isinstance(v, list) else [v]))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_qlora.py", *words, *more])
        train_qlora.main()


# A run without problems.


def test_run_without_problems(flags, tiny_checkpoint, tiny_config):
    found = run_preflight(FinetuneArguments(**flags))
    assert found.problems == []
    found.raise_problems()
    assert found.config.multiplied_weights == tiny_config.multiplied_weights
    assert (len(found.train_samples), len(found.eval_samples)) == (48, 11)
    # 5 steps evaluate or save, and log before: 4, 5, 8, 10 and 12; then the 3 evaluations and the summary.
    assert found.counts == RunCounts(steps=12, evaluations=3, saves=3, logs=9)
    model = add_lora(load_quantized_model(str(tiny_checkpoint), torch.float32), 4, 32, 0.05, ["query_key_value"])
    assert found.trainable == model.get_nb_trainable_parameters()[0]
    assert 0 < found.disk.needed < found.disk.free


def test_predictions_hold_for_the_run(flags, values):
    predicted_run = run_preflight(FinetuneArguments(**flags))
    run_main(flags)
    output = Path(values["output_dir"])
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["step"] == predicted_run.counts.steps
    assert sum("eval_loss" in entry for entry in log) == predicted_run.counts.evaluations
    checkpoints = list(output.glob("checkpoint-*"))
    assert len(checkpoints) == predicted_run.counts.saves
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    assert len(log) == predicted_run.counts.logs
    state = (predicted_run.counts.saves + 1) * (STATE_BYTES + LOG_BYTES * len(log))
    assert predicted_run.disk.needed - state < written < predicted_run.disk.needed


def test_nothing_is_checked_or_planned_twice(flags, values, monkeypatch):
    calls = []
    for module, name in (
        (preflight, "check_checkpoint"),
        (loading, "check_checkpoint"),
        (preflight, "check_device"),
        (loading, "check_device"),
        (preflight, "plan_without_gpu"),
    ):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=function, n=name: (calls.append(n), f(*args))[1])
    edit_json(flags, values, max_steps=1, save_strategy="no", eval_strategy="no")
    run_main(flags)
    assert sorted(calls) == ["check_checkpoint", "check_device", "plan_without_gpu"]


def test_folder_of_4_bit_weights_has_no_problems(flags, tiny_checkpoint, tokenizer, tmp_path):
    write_quantized(load_quantized_model(str(tiny_checkpoint), torch.float32), tokenizer, str(tmp_path / "nf4"))
    found, other = (
        run_preflight(FinetuneArguments(**flags | {"model_name_or_path": str(folder)}))
        for folder in (tmp_path / "nf4", tiny_checkpoint)
    )
    assert found.problems == [] and found.trainable == other.trainable


def test_check_prints_a_report_and_writes_no_file(flags, values, capsys):
    run_main(flags, "--check")
    printed = capsys.readouterr().out
    assert printed.endswith("OK\n")
    for fact in (f"torch {torch.__version__}", "48 samples", "11 samples", "12, evaluations 3, checkpoints 3", "GPU "):
        assert fact in printed, fact
    assert not Path(values["output_dir"]).exists()


@pytest.mark.parametrize(
    ("more", "count"), [(["--check"], 1), (["--dry_run"], 1), (["--dry_run", "3"], 3), (["--check", "0"], 0)]
)
def test_number_of_samples_shown(flags, capsys, more, count):
    run_main(flags, *more)
    assert len(re.findall(r"^  answer ", capsys.readouterr().out, re.M)) == count


def test_dry_run_needs_only_tokenizer_and_rows(flags, values, tokenizer, tmp_path, monkeypatch, capsys):
    run_main(flags, "--check", "2")
    about_data = capsys.readouterr().out.partition("training ")[2]
    copy_tokenizer(tokenizer, tmp_path)
    Path(flags.pop("train_args_json")).write_text("{")
    for name in ("read_training_args", "check_checkpoint", "check_gpu", "check_output"):
        monkeypatch.delattr(preflight, name)
    run_main(flags | {"model_name_or_path": tmp_path, "train_args_json": tmp_path / "nowhere"}, "--dry_run", "2")
    assert capsys.readouterr().out == "training " + about_data


def test_dry_run_reports_problems_of_tokenizer_and_rows(flags, tmp_path, capsys):
    Path(flags["train_data_path"][0]).write_text("{}\n{}\n")
    with pytest.raises(SystemExit) as raised:
        run_main(flags | {"model_name_or_path": tmp_path / "nowhere"}, "--dry_run")
    folder, rows, *listed = raised.value.code.splitlines()[1:]
    assert folder.startswith("- there is no folder") and rows.endswith("train.jsonl has 2 rows that cannot be used:")
    assert [line[:13] for line in listed] == ["  - line 1: f", "  - line 2: f"]
    assert "OK" not in capsys.readouterr().out


# All problems are reported at once, by --check and by a run.


def add_problems(flags: dict, values: dict, folder: Path) -> list[str]:
    """Adds several problems to a run; returns the parts of the message that report them."""
    edit_json(flags, values, learning_rte=1, torch_compile=True, output_dir=flags["eval_data_path"])
    write_rows(Path(flags["train_data_path"][0]), [{"instruction": "a", "output": "b"}, {"instruction": "a"}])
    flags["train_data_path"].append(str(folder / "nowhere.jsonl"))
    flags["model_name_or_path"] = str(folder / "chatglm-6b")
    return [
        "not a TrainingArguments key of this transformers version: learning_rte (did you mean learning_rate?)",
        "this training does not use torch_compile; remove it",
        "train.jsonl, line 2: field 'output' is missing",
        "there is no data file",
        "there is no folder",
    ]


def test_nothing_is_tokenized_where_a_file_is_missing(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "load_samples", lambda *_: pytest.fail("tokenized"))
    flags["eval_data_path"] = str(tmp_path / "nowhere.jsonl")
    found = run_preflight(FinetuneArguments(**flags))
    assert found.problems == [f"there is no data file {flags['eval_data_path']}."]


@pytest.mark.parametrize("more", [["--check"], []], ids=["check", "run"])
def test_all_problems_are_reported_at_once(flags, values, tmp_path, more, capsys):
    expected = add_problems(flags, values, tmp_path)
    with pytest.raises(SystemExit) as raised:
        run_main(flags, *more)
    message = raised.value.code
    assert message.startswith("error: 4 things are wrong:\n- ")  # those of the JSON count as one
    assert all(part in message for part in expected), message
    assert not any(line.rstrip().endswith(("?.", "..")) for line in message.splitlines())
    assert "OK" not in capsys.readouterr().out


def problem_of(flags: dict, **more) -> str:
    """The problem of a run that has exactly one."""
    (problem,) = run_preflight(FinetuneArguments(**flags, **more)).problems
    return problem


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_output_dir_that_cannot_be_written_to(flags, values, tmp_path, place):
    (tmp_path / "file").touch()
    edit_json(flags, values, output_dir=str(tmp_path / "file" / ("below" if place == "below a file" else "")))
    assert "file cannot be written to (Not a directory)" in problem_of(flags)


def test_full_disk(flags, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert re.search(r"output_dir .* needs 5\.. MB, and the disk .* 0\.0 MB free.*save_total_limit", problem_of(flags))


def test_unknown_target_module(flags):
    assert "the model has no key_value; it has dense," in problem_of(flags, lora_target_modules=["key_value"])


def test_no_checkpoint_to_resume_from(flags):
    problem = problem_of(flags, resume_from_checkpoint="last")
    assert "--resume_from_checkpoint last: there is no whole checkpoint" in problem


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"optim": "galore_adamw"}, "galore"),
        ({"optim": "adamw_torch_4bit"}, "torchao"),
        ({"adam_beta2": 1.5}, "beta"),
        ({"learning_rate": -1.0}, "learning rate: -1.0"),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}}, "division by zero"),
        ({"optim_args": "momentum=0.9"}, "it does not use optim_args momentum=0.9; remove it"),
        ({"optim": "sgd", "optim_args": "momentum=0.9, mass=1"}, "it does not use optim_args mass=1; remove it"),
        ({"optim": "sgd", "adam_beta2": 0.9}, "it does not use adam_beta2; remove it"),
        ({"optim": "sgd", "adam_epsilon": 1e-6}, "it does not use adam_epsilon; remove it"),
        ({"optim_target_modules": ["attn"]}, "it does not use optim_target_modules; remove it"),
    ],
)
def test_optimizer_and_schedule_that_cannot_be_made(flags, values, changes, reason):
    edit_json(flags, values, **changes)
    problem = problem_of(flags)
    assert re.search(rf"args\.json: optim \w+ with lr_scheduler_type \w+ cannot be used: .*{reason}", problem), problem
    assert not Path(values["output_dir"]).exists()


def test_memory_budget_without_a_gpu(flags):
    assert problem_of(flags, memory_budget="8GiB") == "--memory_budget plans the memory of a GPU; there is none."


def test_broken_tokenizer(flags, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "ice_text.model").write_bytes(b"nothing")
    assert "ice_text.model is damaged or incomplete" in problem_of(flags | {"model_name_or_path": str(folder)})


def test_tokenizer_is_not_blamed_for_a_broken_configuration(flags, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": "4"}))
    assert "config.json: Field 'num_layers' expected int" in problem_of(flags | {"model_name_or_path": str(folder)})


@pytest.mark.parametrize("has_folder", [False, True])
def test_problem_of_the_folder_hides_none_of_the_rows_and_asks_for_no_gpu(flags, tmp_path, has_folder):
    Path(flags["eval_data_path"]).write_text("{}\n")
    model = tmp_path if has_folder else tmp_path / "nowhere"
    of_folder, *rest = run_preflight(FinetuneArguments(**flags | {"model_name_or_path": str(model)})).problems
    assert "config.json is missing" in of_folder if has_folder else "there is no folder" in of_folder
    if has_folder:
        assert "ice_text.model is missing" in rest.pop(0)
    assert len(rest) == 1 and "dev.jsonl, line 1: field 'instruction' is missing" in rest[0]


def test_rows_are_tokenized_without_weights(flags, tokenizer, tmp_path):
    copy_tokenizer(tokenizer, tmp_path)
    write_rows(Path(flags["eval_data_path"]), [{"instruction": "\u200b", "output": "b"}])
    problems = run_preflight(FinetuneArguments(**flags | {"model_name_or_path": str(tmp_path)})).problems
    assert len(problems) == 2 and "config.json is missing" in problems[0]
    assert "dev.jsonl, line 1: the question has nothing but characters" in problems[1]


def test_answers_of_conversations_are_counted_as_samples(flags):
    texts = [{"from": role, "value": "裙"} for role in ("human", "gpt", "human", "gpt")]
    write_rows(Path(flags["eval_data_path"]), [{"conversations": texts}] * 3)
    for train_on, count in (("all", 6), ("last", 3)):
        assert len(run_preflight(FinetuneArguments(**flags, train_on=train_on)).eval_samples) == count


def test_large_model_needs_a_gpu(flags, monkeypatch):
    monkeypatch.setattr(loading, "LARGEST_CPU_MODEL", 1000)
    assert "no CUDA GPU was found" in problem_of(flags)


def test_8_bit_products_need_a_gpu(flags):
    assert "--compute_dtype fp8 needs a GPU of compute capability 8.9" in problem_of(flags | {"compute_dtype": "fp8"})


# The memory plan, for the 6B model on a simulated GPU.


@pytest.fixture
def full_size(genuine_tokenizer, genuine_rows, monkeypatch) -> Preflight:
    """A run with the shipped JSON in bf16, the 6B model and genuine ADGEN rows."""
    found = Preflight(FinetuneArguments(), config=ChatGLMConfig())
    found.setup = read_training_args(str(ROOT / "chatGLM_6B_QLoRA.json"), compute_dtype="bf16", evaluate=False)
    found.train_samples = load_samples(str(genuine_rows), SampleEncoder(genuine_tokenizer, "", 512, 1536))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory_plan, "gpu_has_kernels", lambda dtype: True)
    return found


@pytest.mark.parametrize(("budget", "predicted"), [(78.5, 23.3), (16, 14.7), (8, 7.5), (4.6, 4.3)])
def test_predicted_memory_is_that_of_the_run(full_size, monkeypatch, budget, predicted):
    # Source: docs/performance.md, the predictions of runs on a GPU.
    monkeypatch.setattr(preflight, "memory_budget", lambda requested: int(budget * GIB))
    check_memory(full_size, full_size.config, LoraSettings())
    assert full_size.trainable == 1_835_008
    shown = re.search(r"predicted peak memory +([\d.]+) GiB", full_size.plan_table())
    assert float(shown[1]) == pytest.approx(predicted, abs=0.05)


@pytest.mark.parametrize(("name", "fp8"), [("bf16", False), ("fp8", True)])
def test_8_bit_products_are_planned(flags, monkeypatch, name, fp8):
    found, planned_for = run_preflight(FinetuneArguments(**flags)), []
    found.setup = read_training_args(flags["train_args_json"], compute_dtype=name)
    found.args.memory_budget = "4GiB"  # plans, although there is no GPU
    monkeypatch.setattr(preflight, "memory_budget", lambda requested: 4 * GIB)
    monkeypatch.setattr(memory_plan, "gpu_has_kernels", lambda dtype: True)
    plan = preflight.choose_plan
    monkeypatch.setattr(preflight, "choose_plan", lambda sizes, *args: planned_for.append(sizes) or plan(sizes, *args))
    check_memory(found, found.config, LoraSettings())
    (sizes,) = planned_for
    assert (sizes.bytes_per_number, sizes.fp8, sizes.trainable) == (2, fp8, found.trainable)


def test_too_little_memory(full_size, monkeypatch):
    monkeypatch.setattr(preflight, "memory_budget", lambda requested: 3 * GIB)
    check_memory(full_size, full_size.config, LoraSettings())
    assert full_size.plan is None and "3.00 GiB of GPU memory are too little" in full_size.problems[0]


# The report.


def test_sample_shows_what_is_trained_on(flags, tokenizer, tmp_path):
    row = {"instruction": "类型#裙", "output": "白色的裙。\n<eop>好看"}
    sample = load_samples(str(write_rows(tmp_path / "rows.jsonl", [row])), SampleEncoder(tokenizer, "", 512, 512))[0]
    plain = show_sample(sample, tokenizer, color=False)
    parts = dict(re.findall(r"^  (prompt|control|answer|end) +(.*(?:\n {12}.*)*)", plain, re.M))
    assert parts["prompt"] == "类型#裙" and parts["control"] == "[gMASK]<sop>" and parts["end"] == "<eop>"
    assert parts["answer"].replace("\n" + " " * 12, "\n") == row["output"]
    assert "\033" not in plain
    colored = show_sample(sample, tokenizer, color=True)
    assert re.sub(r"\033\[\d+m", "", colored) == plain
    trained = re.findall(r"\033\[32m(.*?)\033\[0m", colored, re.S)
    assert [part.split()[0] for part in trained] == ["白色的裙。", "<eop>"]


@pytest.mark.parametrize(
    ("terminal", "no_color", "colored"), [(True, None, True), (True, "1", False), (False, None, False)]
)
def test_colors_only_on_terminals(flags, monkeypatch, terminal, no_color, colored):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    assert ("\033[" in describe(run_preflight(FinetuneArguments(**flags, check=1)))) is colored


@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [1, 2, 3], list(range(3, 900)), [4, 2048]])
def test_histogram_counts_every_sample_once(lengths):
    lines = histogram(torch.tensor(lengths).numpy()).splitlines()
    found = [re.match(r" *(\d+) to +(\d+) tokens +([\d,]+)", line).groups() for line in lines]
    ranges = [(int(first), int(last), int(count.replace(",", ""))) for first, last, count in found]
    assert all(sum(first <= n <= last for n in lengths) == count for first, last, count in ranges)
    assert sum(count for _, _, count in ranges) == len(lengths) and len(lines) <= 8


def test_samples_of_several_files_name_their_file(flags, sample_rows, tmp_path):
    second = str(write_rows(tmp_path / "second.jsonl", sample_rows[48:60]))
    first = flags["train_data_path"][0]
    found = run_preflight(FinetuneArguments(**flags | {"train_data_path": [first, f"{second}:0.5"]}))
    assert not found.problems
    assert found.train_samples["file"][:] == [first] * 48 + [second] * 6
    found.args.check = 49
    assert f" {first}, " in describe(found) and f" {second}, " in describe(found)


def test_data_without_a_full_step(flags, values):
    edit_json(flags, values, dataloader_drop_last=True, gradient_accumulation_steps=1000)
    assert re.search(r"a step takes \d+ samples, there are 48, .* there is nothing to train", problem_of(flags))


def test_more_layers_than_the_model_has(flags):
    assert problem_of(flags, kept_mlp=99) == "--kept_mlp is 99; the model has 2 layers."


def test_only_the_main_process_reports_problems(flags, tmp_path, monkeypatch):
    found = run_preflight(FinetuneArguments(**flags | {"model_name_or_path": str(tmp_path / "nowhere")}))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as raised:
        found.raise_problems()
    assert raised.value.code == 1
