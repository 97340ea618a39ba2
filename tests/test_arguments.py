"""qlora/arguments.py: flags of the upstream project and of earlier releases, errors, and the compute dtype."""

import dataclasses
import math

import pytest
import torch
from conftest import ROOT
from transformers import TrainingArguments

from chatglm.chat import OFFICIAL_SAMPLING
from qlora.arguments import FinetuneArguments, InferenceArguments, LoraSettings, training_argument_names
from qlora.command_line import fields_of, parse_command_line
from qlora.training.training_args import set_precision

# All flags of train_qlora.py of shuxueslpi/chatGLM-6B-QLoRA, the upstream project, with values that are not defaults.
UPSTREAM_FLAGS = {
    "train_args_json": "my.json",
    "model_name_or_path": "models/chatglm-6b",
    "train_data_path": ["my_train.jsonl"],
    "eval_data_path": "my_dev.jsonl",
    "max_input_length": 100,
    "max_output_length": 200,
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "lora_dropout": 0.1,
    "resume_from_checkpoint": "saved_files/checkpoint-500",
    "prompt_text": "写广告：",
    "compute_dtype": "bf16",
}


def parse(*flags: object, kind: type = FinetuneArguments):
    return parse_command_line(kind, [str(flag) for flag in flags])


# The command line.


def test_every_flag_of_the_upstream_command_line():
    args = parse(
        *(
            part
            for name, value in UPSTREAM_FLAGS.items()
            for part in (f"--{name}", *(value if isinstance(value, list) else [value]))
        )
    )
    assert {name: getattr(args, name) for name in UPSTREAM_FLAGS} == UPSTREAM_FLAGS
    assert parse("--seed", 7).training_args == {"seed": ["7"]}


@pytest.mark.parametrize(
    ("given", "files"),
    [
        (["a.jsonl"], [("a.jsonl", 1)]),
        (["a.jsonl", "b.jsonl:0.5"], [("a.jsonl", 1), ("b.jsonl", 0.5)]),
        (["a.jsonl:2", "a:b.jsonl"], [("a.jsonl", 2), ("a:b.jsonl", 1)]),
        (["x:1:3", ":2"], [("x:1", 3), (":2", 1)]),
    ],
)
def test_files_have_weights(given, files):
    assert parse("--train_data_path", *given).train_files() == files


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weight_out_of_range(weight):
    with pytest.raises(ValueError, match=f"--train_data_path b:{weight}: the weight must be a positive number"):
        parse("--train_data_path", "a", f"b:{weight}")


@pytest.mark.parametrize(
    ("flags", "check", "dry_run"),
    [
        ([], None, None),
        (["--check"], 1, None),
        (["--dry_run"], None, 1),
        (["--dry-run=5"], None, 5),
        (["--check", 0], 0, None),
    ],
)
def test_number_of_samples_of_check_and_dry_run(flags, check, dry_run):
    args = parse(*flags)
    assert (args.check, args.dry_run) == (check, dry_run)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--check", "--dry_run"], "give one of them"),
        (["--check", -1], "--check is -1; it must not be negative"),
        (["--dry_run", -1], "--dry_run is -1; it must not be negative"),
    ],
)
def test_check_and_dry_run_out_of_range(flags, reason):
    with pytest.raises(ValueError, match=reason):
        parse(*flags)


def test_nearest_flag_is_named():
    with pytest.raises(ValueError, match=r"unknown argument --dryrun \(did you mean --dry_run\?\)\.$"):
        parse("--dryrun")


@pytest.mark.parametrize("size", ["8", "8G", "eight GiB"])
def test_invalid_memory_budget_is_refused(size):
    with pytest.raises(ValueError, match=f"--memory_budget {size}: expected a number with a unit") as raised:
        parse("--memory_budget", size, "--lora_rank", 0)
    assert "--lora_rank is 0" in str(raised.value) and ".." not in str(raised.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("memory_budget", "8GiB"),
        ("max_tokens", 5),
        ("recompute_mlp", 0),
        ("recompute_attention", 1),
        ("dequantized_layers", 2),
        ("kept_mlp", 0),
        ("offload", "false"),
    ],
)
def test_plain_with_a_flag_of_the_memory_plan_is_refused(flag, value):
    with pytest.raises(ValueError, match=f"--plain plans nothing, and does not heed --{flag}"):
        parse("--plain", f"--{flag}", value)


def test_target_modules_are_a_list():
    assert parse().lora_settings().target_modules == ["query_key_value"]
    args = parse("--lora_target_modules", "query_key_value", "dense", "--lora_rank", 2)
    assert args.lora_settings() == LoraSettings(2, 32, 0.05, ["dense", "query_key_value"])


def test_defaults_are_those_of_the_upstream():
    args = parse()
    assert args.lora_settings() == (4, 32, 0.05, ["query_key_value"])
    assert args.train_args_json == "chatGLM_6B_QLoRA.json" and args.model_name_or_path == "THUDM/chatglm-6b"
    assert args.training_args == {} and args.resume_from_checkpoint is None and args.prompt_text == ""


def test_defaults_count_from_the_repository_and_given_paths_from_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = parse("--eval_data_path", "my.jsonl")
    assert args.train_args_json == str(ROOT / "chatGLM_6B_QLoRA.json")
    assert args.model_name_or_path == str(ROOT / "THUDM" / "chatglm-6b")
    assert args.train_data_path == [str(ROOT / "data" / "train.jsonl")] and args.eval_data_path == "my.jsonl"
    monkeypatch.chdir(ROOT)
    assert parse().train_data_path == ["data/train.jsonl"]
    monkeypatch.chdir(ROOT.parent)
    assert parse().train_data_path == [f"{ROOT.name}/data/train.jsonl"]


@pytest.mark.parametrize("value", ["none", ""])
def test_no_evaluation(value):
    assert parse("--eval_data_path", value).eval_data_path is None


@pytest.mark.parametrize(
    ("flag", "suggestion"),
    [
        ("--lora_rnak", "--lora_rank"),
        ("--learning_rte", "--learning_rate"),
        ("--max_input_lenght", "--max_input_length"),
        ("--ouput", "--output_dir"),
        ("--model", "--model_name_or_path"),
        ("--batch-size", "--per_device_train_batch_size"),
        ("--lr", None),
        ("--xyz", None),
    ],
)
def test_unknown_flag_is_refused_with_the_nearest(flag, suggestion):
    with pytest.raises(ValueError, match=f"unknown argument {flag}") as raised:
        parse(flag, 8)
    if suggestion:
        assert f"did you mean {suggestion}?" in str(raised.value)
    else:
        assert "did you mean" not in str(raised.value)


@pytest.mark.parametrize("flag", ["--lora_r", "--train_data", "--max_input", "--model"])
def test_flags_are_not_abbreviated(flag):
    with pytest.raises(ValueError, match=f"unknown argument {flag}"):
        parse(flag, 8)


def test_names_of_training_arguments_are_those_of_transformers():
    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= set(training_argument_names())


def test_training_arguments_are_flags():
    words = (
        "--lora_rank",
        8,
        "--learning-rate",
        "1e-4",
        "--bf16",
        "--save_steps=50",
        "--report_to",
        "wandb",
        "swanlab",
    )
    args = parse(*words, "--check", "--max_grad_norm", -1)
    expected = {"learning_rate": ["1e-4"], "bf16": [], "save_steps": ["50"], "report_to": ["wandb", "swanlab"]}
    assert args.training_args == expected | {"max_grad_norm": ["-1"]} and (args.lora_rank, args.check) == (8, 1)


def test_training_arguments_are_no_flags_of_inference():
    with pytest.raises(ValueError, match=r"unknown argument --learning_rate\.$"):
        parse("--learning_rate", 1, kind=InferenceArguments)


def test_word_without_a_flag_is_refused():
    with pytest.raises(ValueError, match=r"unknown argument x\.$"):
        parse("x", "--learning_rate", 1)
    with pytest.raises(ValueError, match=r"unknown argument 9\.$"):
        parse("--learning_rate", 1, "--lora_rank", 8, 9)


def test_help_says_that_training_arguments_are_flags(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--learning_rate 1e-4" in capsys.readouterr().out


def test_misspelled_flag_with_equals_sign():
    with pytest.raises(ValueError, match="did you mean --lora_rank"):
        parse("--lora_rnk=8")


def test_hyphens_and_underscores_are_alike():
    args = parse("--lora-rank", 8, "--dry-run", 2, "--train-data-path=a-b.jsonl")
    assert (args.lora_rank, args.dry_run, args.train_data_path) == (8, 2, ["a-b.jsonl"])


def test_flags_of_the_earlier_release_are_read():
    args = parse("--kept_mlp", 20, "--kept_attention=28", "--dense_layers", 3)
    expected = {"recompute_mlp": 8, "recompute_attention": 0, "dequantized_layers": 3}
    assert args.fixed_plan(None, num_layers=28) == expected
    assert parse("--recompute_mlp", 8, "--recompute_attention", 0).fixed_plan(None, 28).items() <= expected.items()
    with pytest.raises(ValueError, match="--kept_mlp is of an earlier release and fixes what --recompute_mlp does"):
        parse("--kept_mlp", 20, "--recompute_mlp", 8)


def test_flags_override_the_activation_checkpointing_of_the_json():
    assert parse("--recompute_mlp", 8).fixed_plan(True, 28) == {"recompute_mlp": 8, "recompute_attention": 28}
    assert parse().fixed_plan(False, 28) == {"recompute_mlp": 0, "recompute_attention": 0}


def test_misspelt_flag_is_reported_before_a_missing_one():
    @dataclasses.dataclass
    class Required:
        """A dataclass with one required flag."""

        output_dir: str = dataclasses.field(metadata={"help": "Folder."})

    with pytest.raises(ValueError, match=r"unknown argument --ouput_dir \(did you mean --output_dir\?\)\.$"):
        parse("--ouput_dir", "x", kind=Required)


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


def test_max_tokens_out_of_range():
    with pytest.raises(ValueError, match="--max_tokens is 0"):
        parse("--max_tokens", 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("batch_size", 0),
        ("max_prompts", 0),
        ("temperature", 0.0),
        ("temperature", 1e-30),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_inference_value_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"--{name} is {value}"):
        parse(f"--{name}", value, kind=InferenceArguments)


@pytest.mark.parametrize(("name", "value"), [("compute_dtype", "fp4"), ("lora_rank", "four"), ("max_tokens", "1.5")])
def test_value_of_another_type_is_reported_in_one_line(name, value):
    with pytest.raises(ValueError, match=rf"^argument --{name}: [^\n]*'{value}'[^\n]*\.$"):
        parse(f"--{name}", value)


def test_8_bit_products_are_for_training_without_plain():
    assert parse("--compute_dtype", "fp8").compute_dtype == "fp8"
    with pytest.raises(ValueError, match="--plain has no --compute_dtype fp8; choose fp32, fp16 or bf16"):
        parse("--compute_dtype", "fp8", "--plain")
    with pytest.raises(ValueError, match="'fp8'"):
        parse("--compute_dtype", "fp8", kind=InferenceArguments)


def test_sampling_is_the_official_one_by_default():
    args = parse("--do_sample", kind=InferenceArguments).with_sampling(OFFICIAL_SAMPLING)
    assert args.sampling() == OFFICIAL_SAMPLING
    given = parse("--temperature", 0.3, kind=InferenceArguments).with_sampling(OFFICIAL_SAMPLING)
    assert (given.temperature, given.top_p) == (0.3, OFFICIAL_SAMPLING["top_p"])


def test_adapter_none_is_no_adapter():
    assert parse("--adapter_path", "none", kind=InferenceArguments).adapter_path == []
    with pytest.raises(ValueError, match=r"--web compares a model with and without an adapter; .*--chat"):
        parse("--adapter_path", "none", "--web", kind=InferenceArguments)


@pytest.mark.parametrize("flag", ["--chat", "--web", "--serve"])
def test_output_is_refused_where_nothing_is_kept(flag):
    with pytest.raises(ValueError, match="--output keeps the answers to prompts"):
        parse("--output", "answers.jsonl", flag, kind=InferenceArguments)


def test_only_the_api_has_several_adapters():
    assert parse("--serve", "--adapter_path", "a", "b", kind=InferenceArguments).adapter_path == ["a", "b"]
    with pytest.raises(ValueError, match="--adapter_path has 2 folders; only --serve takes several"):
        parse("--adapter_path", "a", "b", kind=InferenceArguments)
    with pytest.raises(ValueError, match="give one of them"):
        parse("--serve", "--web", kind=InferenceArguments)


def test_prompts_may_be_given_many_times():
    assert parse("--prompt", "甲", "--prompt", "乙", "丙", kind=InferenceArguments).prompt == ["甲", "乙", "丙"]
    assert parse(kind=InferenceArguments).prompt == []


@pytest.mark.parametrize("kind", [FinetuneArguments, InferenceArguments])
def test_every_flag_has_a_help_text(kind, capsys):
    with pytest.raises(SystemExit):
        parse("--help_all", kind=kind)
    text = " ".join(capsys.readouterr().out.split())
    for field in fields_of(kind):
        assert (f"--{field.name} " in text) is not field.metadata.get("hidden", False)
        assert len(field.metadata["help"]) > 10


# The compute dtype.


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        (None, {}, torch.float32),  # no GPU
        (None, {"fp16": False}, torch.float32),
        (None, {"bf16": True}, torch.bfloat16),
        (None, {"fp16": True}, torch.float16),
        ("fp32", {}, torch.float32),
        ("bf16", {"fp16": False}, torch.bfloat16),
        ("fp16", {}, torch.float16),
        ("fp8", {}, torch.bfloat16),
    ],
)
def test_compute_dtype_on_a_cpu(monkeypatch, name, values, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set_precision(dict(values), name) == expected


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_compute_dtype_on_a_gpu(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    values = {}
    assert set_precision(values, None) == expected
    # fp16 needs loss scaling: small gradients would underflow.
    assert values.get("fp16", False) is (expected == torch.float16)
