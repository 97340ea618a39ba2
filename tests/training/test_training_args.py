"""qlora/training/training_args.py: the JSON of TrainingArguments is translated and checked."""

import dataclasses
import importlib.util
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import TrainingArguments

from qlora.arguments import FinetuneArguments
from qlora.command_line import parse_command_line
from qlora.training.training_args import NOT_FOR_THIS_TRAINER, read_training_args

# The content of the shipped JSON. It must not change, since users know it.
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


@pytest.fixture
def write_json(tmp_path: Path):
    """A function that writes values as a JSON file and returns its path."""

    def write(**values) -> str:
        path = tmp_path / "args.json"
        path.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "report_to": "none"} | values))
        return str(path)

    return write


def test_shipped_json_is_unchanged():
    assert json.loads((ROOT / "chatGLM_6B_QLoRA.json").read_text(encoding="utf-8")) == SHIPPED


def test_arguments_of_the_shipped_json():
    args = read_training_args(str(ROOT / "chatGLM_6B_QLoRA.json")).training_args
    assert isinstance(args, TrainingArguments)
    expected = {name: SHIPPED[name] for name in SHIPPED if name not in ("warmup_ratio", "evaluation_strategy")}
    expected |= {"warmup_steps": 0.1, "eval_strategy": "steps"}
    assert {name: getattr(args, name) for name in expected} == expected
    # 3,582 steps: an epoch of ADGEN's 114,599 rows, 32 in a step.
    assert args.get_warmup_steps(3582) == 359


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.json")), ids=lambda path: path.name)
def test_other_shipped_json_files_are_read(path):
    values = json.loads(path.read_text(encoding="utf-8"))
    args = read_training_args(str(path), evaluate=False).training_args
    assert args.output_dir == values["output_dir"] and args.max_steps == values["max_steps"]
    assert args.eval_strategy == "no"


def test_translation_is_logged_in_one_line(write_json, caplog):
    with caplog.at_level(logging.INFO, logger="qlora"):
        read_training_args(write_json(warmup_ratio=0.1, evaluation_strategy="no", group_by_length=False))
    (record,) = [r for r in caplog.records if "present names" in r.getMessage()]
    for note in ("warmup_ratio -> warmup_steps", "evaluation_strategy -> eval_strategy", "group_by_length"):
        assert note in record.getMessage()


def test_present_names_are_not_logged(write_json, caplog):
    with caplog.at_level(logging.INFO, logger="qlora"):
        args = read_training_args(write_json(warmup_steps=5, eval_strategy="no")).training_args
    assert args.warmup_steps == 5 and "present names" not in caplog.text


@pytest.mark.parametrize(
    "values",
    [
        {"group_by_length": True},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "batch_rebalance"},
    ],
)
def test_samplers_whose_order_a_resumed_run_would_not_repeat_are_refused(write_json, values):
    with pytest.raises(ValueError, match=r"args\.json: train_sampling_strategy is .*: random or sequential\."):
        read_training_args(write_json(**values))
    args = read_training_args(write_json(group_by_length=False)).training_args
    assert args.train_sampling_strategy == "random"


@pytest.mark.parametrize(
    ("key", "suggestion"), [("learning_rte", "learning_rate"), ("per_device_batch_size", "per_device"), ("xyzzy", "")]
)
def test_unknown_key_is_refused_with_the_nearest(write_json, key, suggestion):
    with pytest.raises(ValueError, match=rf"args\.json.*{key}.*{suggestion}"):
        read_training_args(write_json(**{key: 1}))


def test_all_unknown_keys_are_named(write_json):
    with pytest.raises(ValueError, match=r"learning_rte.*sedd"):
        read_training_args(write_json(learning_rte=1, sedd=2))


def test_old_and_new_name_together_are_refused(write_json):
    with pytest.raises(ValueError, match=r"evaluation_strategy and eval_strategy.*keep one"):
        read_training_args(write_json(evaluation_strategy="no", eval_strategy="steps"))


def test_old_and_new_name_of_grouping_together_are_refused(write_json):
    with pytest.raises(ValueError, match=r"group_by_length and train_sampling_strategy.*keep one"):
        read_training_args(write_json(group_by_length=True, train_sampling_strategy="random"))


@pytest.mark.parametrize(
    "values",
    [
        {"neftune_noise_alpha": 5.0},
        {"torch_empty_cache_steps": 10},
        {"batch_eval_metrics": True},
        {"eval_accumulation_steps": 4},
        {"average_tokens_across_devices": False},
        {"torch_compile_backend": "inductor"},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"deepspeed": "zero2.json"},
        {"fsdp": "full_shard"},
        {"include_for_metrics": ["loss"]},
        {"label_smoothing_factor": 0.1},
        {"enable_jit_checkpoint": True},
        {"ignore_data_skip": True},
        {"label_names": ["labels"]},
        {"length_column_name": "size"},
        {"dataloader_in_order": False},
        {"eval_do_concat_batches": False},
        {"save_on_each_node": True},
        {"use_cache": True},
    ],
    ids=lambda values: next(iter(values)),
)
def test_settings_that_would_be_ignored_are_refused(write_json, values):
    with pytest.raises(ValueError, match=rf"this training does not use {next(iter(values))}; remove it\."):
        read_training_args(write_json(**values))


def test_settings_that_are_off_are_accepted(write_json):
    off = {"neftune_noise_alpha": None, "batch_eval_metrics": False, "fsdp": "", "include_for_metrics": []}
    off |= {"average_tokens_across_devices": True, "include_num_input_tokens_seen": "no", "label_smoothing_factor": 0}
    read_training_args(write_json(**off))


@pytest.mark.parametrize("name", NOT_FOR_THIS_TRAINER)
def test_refused_settings_exist_in_transformers(name):
    newer = {"activation_checkpointing_kwargs"}
    assert name in {field.name for field in dataclasses.fields(TrainingArguments)} | newer


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("per_device_train_batch_size", "4", 'is "4"; expected a whole number'),
        ("per_device_train_batch_size", 4.0, "is 4.0; expected a whole number"),
        ("gradient_accumulation_steps", True, "is true; expected a whole number"),
        ("learning_rate", "1e-3", 'is "1e-3"; expected a number'),
        ("learning_rate", None, "is null; expected a number"),
        ("dataloader_drop_last", "yes", 'is "yes"; expected true or false'),
        ("save_total_limit", "2", 'is "2"; expected a whole number or null'),
        ("output_dir", 3, "is 3; expected a text or null"),
        ("per_device_train_batch_size", 0, "is 0; it must be positive"),
        ("num_train_epochs", -1, "is -1; it must be positive"),
        ("seed", -1, "is -1; it must be at least 0 and below 2**32"),
        ("optim", "schedule_free_adamw", "is schedule_free_adamw, which needs a training step of its own"),
        ("metric_for_best_model", "rouge", "is rouge; only eval_loss is computed"),
        ("save_steps", 0, "is 0; it must be positive"),
        ("eval_steps", -5, "is -5; it must be positive"),
        ("hub_strategy", "checkpoint", "is checkpoint; only the adapter is uploaded, at the end: end"),
        ("hub_strategy", "every_save", "is every_save; only the adapter is uploaded, at the end: end"),
        ("greater_is_better", True, "is true; the best eval_loss is the lowest one"),
        ("do_train", False, "is false; --check makes every check without training"),
        ("do_predict", True, "is true; inference_qlora.py answers prompts"),
        ("do_eval", True, "cannot be had with eval_strategy no"),
        ("load_best_model_at_end", True, "cannot be had with eval_strategy no"),
        ("metric_for_best_model", "loss", "cannot be had with eval_strategy no"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "cannot be had with eval_strategy no"),
    ],
)
def test_value_of_another_type_or_range_is_refused(write_json, key, value, expected):
    with pytest.raises(ValueError, match=rf"args\.json: {key} {re.escape(expected)}"):
        read_training_args(write_json(**{key: value}))


def test_integer_is_accepted_as_a_number(write_json):
    args = read_training_args(write_json(learning_rate=1, num_train_epochs=2, save_total_limit=None)).training_args
    assert (args.learning_rate, args.num_train_epochs) == (1, 2)


def test_all_problems_with_keys_are_reported_at_once(write_json):
    with pytest.raises(ValueError) as raised:
        read_training_args(write_json(sedd=2, torch_compile=True, logging_steps="x", optim="lomo"))
    assert all(key in str(raised.value) for key in ("sedd", "torch_compile", "logging_steps", "lomo"))


def test_missing_reporter_is_named(write_json):
    missing = next(name for name in ("comet_ml", "dvclive", "neptune") if importlib.util.find_spec(name) is None)
    with pytest.raises(ValueError, match=f"report_to names {missing}, which is not installed"):
        read_training_args(write_json(report_to=[missing]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"seed": 1, "seed": 2}', "'seed' stands twice in one object; keep one of them"),
        ('{"learning_rate": NaN}', "NaN is no JSON number"),
        ('{"lr_scheduler_kwargs": {"a": 1, "a": 2}}', "'a' stands twice in one object"),
        ("[" * 100_000, "args.json"),
    ],
)
def test_ambiguous_json_is_refused(tmp_path, content, reason):
    path = tmp_path / "args.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_training_args(str(path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--train_args_json.*nowhere\.json"):
        read_training_args(str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b'{"seed": 42,}', "not valid JSON"),
        (b"{'seed': 42}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "must hold one JSON object, found a list"),
        (b"42", "must hold one JSON object, found a number"),
        (b"null", "must hold one JSON object, found null"),
    ],
)
def test_broken_json_is_refused(tmp_path, content, reason):
    path = tmp_path / "args.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"args\.json.*{reason}"):
        read_training_args(str(path))


def test_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "args.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"output_dir": str(tmp_path), "seed": 3}).encode())
    assert read_training_args(str(path)).training_args.seed == 3


@pytest.mark.parametrize(
    "values", [{"eval_strategy": "sometimes"}, {"lr_scheduler_type": "linaer"}, {"optim": "adam_torch"}]
)
def test_value_that_transformers_refuses_names_the_file(write_json, values):
    with pytest.raises(ValueError, match=r"args\.json"):
        read_training_args(write_json(**values))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"eval_on_start": True, "load_best_model_at_end": True}, "load_best_model_at_end, eval_on_start"),
        ({"save_strategy": "best"}, "save_strategy best"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type"),
    ],
)
def test_settings_that_need_evaluations_are_refused_without_them(write_json, values, named):
    with pytest.raises(ValueError, match=rf"args\.json: {named} cannot be had with --eval_data_path none"):
        read_training_args(write_json(eval_strategy="steps", **values), evaluate=False)


def test_do_eval_says_what_eval_strategy_says(write_json):
    with pytest.raises(ValueError, match="do_eval is false, and eval_strategy is not no"):
        read_training_args(write_json(do_eval=False, eval_strategy="steps"))
    read_training_args(write_json(do_eval=True, do_train=True, do_predict=False, eval_strategy="steps"))
    read_training_args(write_json(do_eval=True, eval_strategy="steps"), evaluate=False)


@pytest.mark.parametrize("values", [{"save_strategy": "best"}, {"load_best_model_at_end": True}])
def test_best_checkpoint_is_the_one_with_the_lowest_loss(write_json, values):
    args = read_training_args(write_json(eval_strategy="steps", eval_steps=500, **values)).training_args
    assert args.metric_for_best_model == "loss" and not args.greater_is_better


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", {"warmup_ratio": 0.1}),
        ("reduce_lr_on_plateau", {"warmup_steps": 5}),
        ("constant_with_warmup", {"lr_scheduler_kwargs": {"num_cycles": 2}}),
    ],
)
def test_settings_that_the_schedule_does_not_have_are_refused(write_json, schedule, values):
    with pytest.raises(ValueError, match=rf"lr_scheduler_type is {schedule}, which has no \w+; remove them"):
        read_training_args(write_json(lr_scheduler_type=schedule, eval_strategy="steps", **values))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"dataloader_num_workers": -1}, "num_workers"),
        ({"dataloader_prefetch_factor": 2}, "prefetch_factor"),
        ({"dataloader_persistent_workers": True}, "persistent_workers"),
    ],
)
def test_settings_that_the_data_loader_refuses(write_json, values, reason):
    with pytest.raises(ValueError, match=rf"args\.json: .*{reason}"):
        read_training_args(write_json(**values))
    read_training_args(write_json(dataloader_num_workers=2, dataloader_persistent_workers=True))


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token"])
def test_token_is_not_read_from_the_json_and_so_not_saved_with_the_adapter(write_json, name):
    with pytest.raises(ValueError, match="hub_token would be saved with the adapter; run `hf auth login`"):
        read_training_args(write_json(push_to_hub=True, **{name: "hf_abc"}))


# The fields that the Trainer, its callbacks, its data loaders or this project use. Those that only a reporter or the
# upload reads, and `prediction_loss_only`, `remove_unused_columns` and `do_*`, whose effect is that of any run here.
USED = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    gradient_checkpointing logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    log_level log_level_replica disable_tqdm eval_strategy eval_steps eval_delay per_device_eval_batch_size
    eval_on_start save_only_model save_strategy save_steps save_total_limit load_best_model_at_end
    metric_for_best_model greater_is_better full_determinism seed data_seed use_cpu dataloader_drop_last
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context train_sampling_strategy ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_revision
    prediction_loss_only remove_unused_columns do_train do_eval do_predict
""".split()


def test_every_field_of_training_arguments_is_used_or_refused():
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    flags = {field.name for field in dataclasses.fields(FinetuneArguments)}  # which are refused in the JSON
    assert fields - {*USED, *NOT_FOR_THIS_TRAINER, *flags} == set()  # find out what a new one does, and add it
    assert not set(USED) & set(NOT_FOR_THIS_TRAINER)


def test_cpu_is_used_where_there_is_no_cuda(write_json):
    assert read_training_args(write_json()).training_args.use_cpu  # otherwise the Trainer would take Apple's GPU


def test_use_cpu_is_refused_if_there_is_a_gpu(write_json, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="hide it with CUDA_VISIBLE_DEVICES= instead"):
        read_training_args(write_json(use_cpu=True), compute_dtype="fp32")


def test_seed_of_the_command_line_overrides_the_json(write_json):
    assert read_training_args(write_json(seed=1)).training_args.seed == 1
    assert read_training_args(write_json(seed=1), {"seed": ["0"]}).training_args.seed == 0


# Settings of the command line.


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--learning_rate 1e-4", "learning_rate", 1e-4),
        ("--warmup_ratio .25", "warmup_steps", 0.25),
        ("--num_train_epochs 2", "num_train_epochs", 2),
        ("--save_total_limit null", "save_total_limit", None),
        ("--eval_strategy no", "eval_strategy", "no"),
        ("--save_only_model", "save_only_model", True),
        ("--disable_tqdm False", "disable_tqdm", False),
        ("--group_by_length false", "train_sampling_strategy", "random"),
        ("--lr_scheduler_type cosine", "lr_scheduler_type", "cosine"),
        ('--lr_scheduler_kwargs {"num_cycles":2}', "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("--run_name 5", "run_name", "5"),
        ("--report_to tensorboard", "report_to", ["tensorboard"]),
    ],
)
def test_flag_takes_the_place_of_the_json(write_json, caplog, flag, key, value):
    caplog.set_level(logging.INFO)
    others = {"learning_rate": 1, "warmup_ratio": 0.1, "num_train_epochs": 1, "group_by_length": False}
    path = write_json(**others, save_total_limit=2, eval_strategy="steps", disable_tqdm=True)
    args = read_training_args(path, parse_command_line(FinetuneArguments, flag.split()).training_args).training_args
    assert getattr(args, key) == value
    is_other = flag != "--group_by_length false"
    assert (f"Other settings than in {path}: {key} " in caplog.text) == is_other


def test_flag_that_says_the_same_as_the_json_is_no_other_setting(write_json, caplog):
    caplog.set_level(logging.INFO)
    read_training_args(write_json(learning_rate=1e-4, seed=1), {"learning_rate": ["0.0001"], "seed": ["2"]})
    assert ": seed 2" in caplog.text and "learning_rate" not in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learning_rate abc", '--learning_rate is "abc"; expected a number'),
        ("--learning_rate nan", '--learning_rate is "nan"; expected a number'),
        ("--max_steps 1.5 --bf16 maybe", "--max_steps is 1.5; expected a whole number"),
        ("--logging_steps 0", "--logging_steps is 0; it must be positive"),
        ("--learning_rate 1 2", '--learning_rate is ["1", "2"]; expected a number'),
        ("--neftune_noise_alpha 5", "this training does not use --neftune_noise_alpha; remove it"),
        ("--num_train_epochs 2", "--num_train_epochs has no effect while max_steps is 8; add --max_steps -1"),
    ],
)
def test_wrong_flag_is_reported_like_the_json(write_json, flags, message):
    path = write_json(max_steps=8)
    with pytest.raises(ValueError) as raised:
        read_training_args(path, parse_command_line(FinetuneArguments, flags.split()).training_args)
    source = f"{path} and the command line" if "max_steps is 8" in message else "the command line"
    assert str(raised.value).startswith(f"{source}: ") and message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_mistakes_are_reported_where_they_stand(write_json):
    path = write_json(seed="x", logging_steps=0)
    expected = f'the command line: --learning_rate is "abc"; expected a number; {path}: seed is "x"; expected a whole'
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_training_args(path, {"learning_rate": ["abc"]})
    missing = r"^the command line: --report_to names wandb, .*: run `pip install wandb`\.$"
    with pytest.raises(ValueError, match=missing):
        read_training_args(write_json(), {"report_to": ["wandb"]})
    with pytest.raises(ValueError, match=rf"^{path} and the command line: x is not a valid IntervalStrategy.*[^.]\.$"):
        read_training_args(write_json(), {"logging_strategy": ["x"]})  # transformers does not name the setting


def test_output_dir_of_the_json_counts_from_the_repository_and_that_of_a_flag_from_the_current_folder(
    write_json, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    path = write_json(output_dir="saved_files/x")
    assert read_training_args(path).training_args.output_dir == str(ROOT / "saved_files" / "x")
    assert read_training_args(path, {"output_dir": ["x"]}).training_args.output_dir == "x"


def test_flag_replaces_the_keys_that_say_the_same_otherwise(write_json):
    path = write_json(bf16=True, gradient_checkpointing=True)
    setup = read_training_args(path, {"fp16": [], "activation_checkpointing": ["false"]})
    assert setup.compute_dtype == torch.float16 and setup.recompute is False


def test_8_bit_products_have_bf16_around_them(write_json):
    eight, half = (read_training_args(write_json(fp16=True), compute_dtype=name) for name in ("fp8", "bf16"))
    assert (eight.compute_dtype, eight.fp8, eight.arithmetic) == (torch.bfloat16, True, "fp8")
    assert (half.compute_dtype, half.fp8, half.arithmetic) == (torch.bfloat16, False, "bfloat16")
    assert not eight.training_args.fp16


@pytest.mark.parametrize("name", ["lora_rank", "train_data_path", "dry_run", "resume_from_checkpoint"])
def test_flag_in_the_json_is_told_where_it_belongs(write_json, name):
    with pytest.raises(ValueError, match=rf": {name} is a flag: --{name}\.$"):
        read_training_args(write_json(**{name: "x"}))


def test_without_evaluation_nothing_is_evaluated(write_json):
    path = write_json(evaluation_strategy="steps", eval_steps=5)
    assert read_training_args(path).training_args.eval_strategy == "steps"
    assert read_training_args(path, evaluate=False).training_args.eval_strategy == "no"


@pytest.mark.parametrize(
    ("values", "expected"), [({}, None), *(({"gradient_checkpointing": v}, v) for v in (True, False))]
)
def test_recompute_is_that_of_the_json(write_json, values, expected):
    assert read_training_args(write_json(**values)).recompute is expected
