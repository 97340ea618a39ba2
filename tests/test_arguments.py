"""qlora/arguments.py: the command line of the project this one follows, and the JSON of TrainingArguments."""

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import TrainingArguments

from qlora.arguments import (
    FinetuneArguments,
    InferenceArguments,
    choose_compute_dtype,
    parse_command_line,
    read_training_arguments,
)

# The command line of shuxueslpi/chatGLM-6B-QLoRA's train_qlora.py, with values other than the defaults.
UPSTREAM_FLAGS = {
    "train_args_json": "my.json",
    "model_name_or_path": "models/chatglm-6b",
    "train_data_path": "my_train.jsonl",
    "eval_data_path": "my_dev.jsonl",
    "seed": 7,
    "max_input_length": 100,
    "max_output_length": 200,
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "lora_dropout": 0.1,
    "resume_from_checkpoint": "saved_files/checkpoint-500",
    "prompt_text": "写广告：",
    "compute_dtype": "bf16",
}
# The JSON that users of the project know; it is shipped as it is.
SHIPPED = {
    "output_dir": "saved_files/chatGLM_6B_QLoRA_t32",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1,
    "logging_steps": 100,
    "save_strategy": "steps",
    "save_steps": 500,
    "evaluation_strategy": "steps",
    "eval_steps": 500,
    "optim": "adamw_torch",
    "fp16": False,
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,
    "seed": 42,
}


def parse(*flags: object, kind: type = FinetuneArguments):
    return parse_command_line(kind, [str(flag) for flag in flags])


@pytest.fixture
def write_json(tmp_path: Path):
    """Writes values as a JSON file and gives its path."""

    def write(**values) -> str:
        path = tmp_path / "args.json"
        path.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "report_to": "none"} | values))
        return str(path)

    return write


# The command line.


def test_every_flag_of_the_upstream_command_line():
    args = parse(*(part for name, value in UPSTREAM_FLAGS.items() for part in (f"--{name}", value)))
    assert {name: getattr(args, name) for name in UPSTREAM_FLAGS} == UPSTREAM_FLAGS


def test_target_modules_are_a_list():
    assert parse().lora_target_modules == ["query_key_value"]
    args = parse("--lora_target_modules", "query_key_value", "dense", "--lora_rank", 2)
    assert args.lora_target_modules == ["query_key_value", "dense"] and args.lora_rank == 2


def test_defaults_are_those_of_the_upstream():
    args = parse()
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout) == (4, 32, 0.05)
    assert args.train_args_json == "chatGLM_6B_QLoRA.json" and args.model_name_or_path == "THUDM/chatglm-6b"
    assert args.seed is None and args.resume_from_checkpoint is None and args.prompt_text == ""


@pytest.mark.parametrize("value", ["none", ""])
def test_no_evaluation(value):
    assert parse("--eval_data_path", value).eval_data_path is None


@pytest.mark.parametrize(
    ("flag", "suggestion"),
    [
        ("--lora_rnak", "--lora_rank"),
        ("--learning_rte", None),
        ("--max_input_lenght", "--max_input_length"),
        ("--xyz", None),
    ],
)
def test_unknown_flag_is_refused_with_the_nearest(flag, suggestion):
    with pytest.raises(ValueError, match=f"unknown argument {flag}") as raised:
        parse(flag, 8)
    if suggestion:
        assert f"did you mean {suggestion}?" in str(raised.value)


@pytest.mark.parametrize("flag", ["--lora_r", "--train_data", "--max_input", "--model"])
def test_flags_are_not_abbreviated(flag):
    with pytest.raises(ValueError, match=f"unknown argument {flag}"):
        parse(flag, 8)


def test_misspelled_flag_with_equals_sign():
    with pytest.raises(ValueError, match="did you mean --lora_rank"):
        parse("--lora_rnk=8")


def test_all_values_out_of_range_are_reported_at_once():
    flags = {"max_input_length": 2, "max_output_length": 1, "lora_rank": 0, "lora_alpha": 0, "lora_dropout": 1.0}
    with pytest.raises(ValueError) as raised:
        parse(*(part for name, value in flags.items() for part in (f"--{name}", value)))
    for name, value in flags.items():
        assert f"--{name} is {value}" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("lora_dropout", -0.1), ("lora_alpha", -1), ("lora_alpha", "nan"), ("lora_dropout", "nan")]
)
def test_value_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"--{name} is {value}"):
        parse(f"--{name}", value)


def test_tokens_at_once_out_of_range():
    with pytest.raises(ValueError, match="--max_tokens is 0"):
        parse("--max_tokens", 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("batch_size", 0),
        ("max_prompts", 0),
        ("temperature", 0.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_inference_value_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"--{name} is {value}"):
        parse(f"--{name}", value, kind=InferenceArguments)


@pytest.mark.parametrize(("name", "value"), [("compute_dtype", "fp8"), ("lora_rank", "four"), ("seed", "1.5")])
def test_value_of_another_kind(name, value, capsys):
    with pytest.raises(SystemExit):
        parse(f"--{name}", value)
    assert value in capsys.readouterr().err


def test_prompts_may_be_given_many_times():
    assert parse("--prompt", "甲", "--prompt", "乙", "丙", kind=InferenceArguments).prompt == ["甲", "乙", "丙"]
    assert parse(kind=InferenceArguments).prompt == []


@pytest.mark.parametrize("kind", [FinetuneArguments, InferenceArguments])
def test_every_flag_is_explained(kind, capsys):
    with pytest.raises(SystemExit):
        parse("--help", kind=kind)
    text = " ".join(capsys.readouterr().out.split())
    for field in kind.__dataclass_fields__.values():
        assert field.name in text and len(field.metadata["help"]) > 10


# The JSON.


def test_shipped_json_is_the_one_users_know():
    assert json.loads((ROOT / "chatGLM_6B_QLoRA.json").read_text(encoding="utf-8")) == SHIPPED


def test_shipped_json_gives_the_meant_arguments():
    args = read_training_arguments(str(ROOT / "chatGLM_6B_QLoRA.json")).training_args
    assert isinstance(args, TrainingArguments)
    meant = {name: SHIPPED[name] for name in SHIPPED if name not in ("warmup_ratio", "evaluation_strategy")}
    meant |= {"warmup_steps": 0.1, "eval_strategy": "steps"}
    assert {name: getattr(args, name) for name in meant} == meant
    # 3,582 steps: an epoch of ADGEN's 114,599 rows at 32 a step.
    assert args.get_warmup_steps(3582) == 359


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.json")), ids=lambda path: path.name)
def test_other_shipped_json_files_are_read(path):
    values = json.loads(path.read_text(encoding="utf-8"))
    args = read_training_arguments(str(path), evaluate=False).training_args
    assert args.output_dir == values["output_dir"] and args.max_steps == values["max_steps"]
    assert args.eval_strategy == "no"


def test_translation_is_logged_in_one_line(write_json, caplog):
    with caplog.at_level(logging.INFO, logger="qlora"):
        read_training_arguments(write_json(warmup_ratio=0.1, evaluation_strategy="no", group_by_length=True))
    (record,) = [r for r in caplog.records if "present names" in r.getMessage()]
    for note in ("warmup_ratio -> warmup_steps", "evaluation_strategy -> eval_strategy", "group_by_length"):
        assert note in record.getMessage()


def test_present_names_are_read_silently(write_json, caplog):
    with caplog.at_level(logging.INFO, logger="qlora"):
        args = read_training_arguments(write_json(warmup_steps=5, eval_strategy="no")).training_args
    assert args.warmup_steps == 5 and "present names" not in caplog.text


@pytest.mark.parametrize(("by_length", "strategy"), [(True, "group_by_length"), (False, "random")])
def test_group_by_length(write_json, by_length, strategy):
    args = read_training_arguments(write_json(group_by_length=by_length)).training_args
    assert args.train_sampling_strategy == strategy


@pytest.mark.parametrize(
    ("key", "suggestion"), [("learning_rte", "learning_rate"), ("per_device_batch_size", "per_device"), ("xyzzy", "")]
)
def test_unknown_key_is_refused_with_the_nearest(write_json, key, suggestion):
    with pytest.raises(ValueError, match=rf"args\.json.*{key}.*{suggestion}"):
        read_training_arguments(write_json(**{key: 1}))


def test_all_unknown_keys_are_named(write_json):
    with pytest.raises(ValueError, match=r"learning_rte.*sedd"):
        read_training_arguments(write_json(learning_rte=1, sedd=2))


def test_old_and_new_name_together_are_refused(write_json):
    with pytest.raises(ValueError, match=r"evaluation_strategy and eval_strategy.*keep one"):
        read_training_arguments(write_json(evaluation_strategy="no", eval_strategy="steps"))


def test_old_and_new_name_of_grouping_together_are_refused(write_json):
    with pytest.raises(ValueError, match=r"group_by_length and train_sampling_strategy.*keep one"):
        read_training_arguments(write_json(group_by_length=True, train_sampling_strategy="random"))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--train_args_json.*nowhere\.json"):
        read_training_arguments(str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b'{"seed": 42,}', "not valid JSON"),
        (b"{'seed': 42}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "must hold one JSON object, found a list"),
        (b"42", "must hold one JSON object, found a int"),
        (b"null", "must hold one JSON object, found a NoneType"),
    ],
)
def test_broken_json_is_refused(tmp_path, content, reason):
    path = tmp_path / "args.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"args\.json.*{reason}"):
        read_training_arguments(str(path))


def test_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "args.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"output_dir": str(tmp_path), "seed": 3}).encode())
    assert read_training_arguments(str(path)).training_args.seed == 3


@pytest.mark.parametrize(
    "values", [{"eval_strategy": "sometimes"}, {"lr_scheduler_type": "linaer"}, {"optim": "adam_torch"}]
)
def test_value_that_transformers_refuses_names_the_file(write_json, values):
    with pytest.raises(ValueError, match=r"args\.json"):
        read_training_arguments(write_json(**values))


def test_seed_of_the_command_line_takes_the_place_of_the_json(write_json):
    assert read_training_arguments(write_json(seed=1)).training_args.seed == 1
    assert read_training_arguments(write_json(seed=1), seed=0).training_args.seed == 0


def test_without_evaluation_nothing_is_evaluated(write_json):
    path = write_json(evaluation_strategy="steps", eval_steps=5)
    assert read_training_arguments(path).training_args.eval_strategy == "steps"
    assert read_training_arguments(path, evaluate=False).training_args.eval_strategy == "no"


# The type of the arithmetic.


@pytest.mark.parametrize(
    ("asked", "values", "expected"),
    [
        (None, {}, torch.float32),  # no GPU
        (None, {"fp16": False}, torch.float32),
        (None, {"bf16": True}, torch.bfloat16),
        (None, {"fp16": True}, torch.float16),
        ("fp32", {}, torch.float32),
        ("bf16", {"fp16": False}, torch.bfloat16),
        ("fp16", {}, torch.float16),
    ],
)
def test_compute_dtype_on_a_cpu(monkeypatch, asked, values, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_compute_dtype(asked, dict(values)) == expected


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_compute_dtype_on_a_gpu(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    values = {}
    assert choose_compute_dtype(None, values) == expected
    # Without loss scaling small gradients vanish in fp16.
    assert values.get("fp16", False) is (expected == torch.float16)


@pytest.mark.parametrize(
    ("values", "expected"), [({}, None), *(({"gradient_checkpointing": v}, v) for v in (True, False))]
)
def test_recomputation_is_planned_unless_the_json_says(write_json, values, expected):
    assert read_training_arguments(write_json(**values)).recompute is expected
