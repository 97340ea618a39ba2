"""Reads the JSON of transformers' TrainingArguments: translates renamed keys, checks keys and values."""

import dataclasses
import json
import logging
import typing
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from qlora.command_line import nearest
from qlora.data.strict_json import parse_json
from qlora.loading import choose_compute_dtype

logger = logging.getLogger(__name__)

# `QLoRATrainer` has its own loss, training step and evaluation. It would ignore these settings, or their effect would
# depend on how a step is split into micro-batches. The JSON may contain them if they are off.
NOT_FOR_THIS_TRAINER = (
    "accelerator_config",
    "activation_checkpointing_kwargs",
    "auto_find_batch_size",
    "average_tokens_across_devices",
    "batch_eval_metrics",
    "bf16_full_eval",
    "deepspeed",
    "eval_accumulation_steps",
    "eval_use_gather_object",
    "fp16_full_eval",
    "fsdp",
    "fsdp_config",
    "gradient_checkpointing_kwargs",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "label_smoothing_factor",
    "liger_kernel_config",
    "neftune_noise_alpha",
    "parallelism_config",
    "resume_from_checkpoint",  # a flag of the command line here
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "use_liger_kernel",
)
OPTIMIZERS_WITH_STEPS_OF_THEIR_OWN = ("lomo", "adalomo", "schedule_free")  # prefixes of their names
JSON_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
POSITIVE_KEYS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "eval_steps",
)
RECOMPUTE_KEYS = ("gradient_checkpointing", "activation_checkpointing")  # the older and the newer name

# Keys of older transformers and their present names.
RENAMED_KEYS = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a fraction of all steps
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}


class TrainingSetup(NamedTuple):
    """The settings of a run that follow from the JSON and the hardware.

    Attributes:
        training_args: as the Trainer takes them.
        compute_dtype: of the arithmetic.
        recompute: the JSON's `gradient_checkpointing` or `activation_checkpointing`; None if it has neither.
    """

    training_args: TrainingArguments
    compute_dtype: torch.dtype
    recompute: bool | None


def read_training_args(
    path: str, seed: int | None = None, compute_dtype: str | None = None, evaluate: bool = True
) -> TrainingSetup:
    """Reads the JSON of TrainingArguments; keys that transformers renamed are translated.

    With fp16 arithmetic on a GPU the Trainer's loss scaling is enabled, since small gradients would underflow.

    Args:
        path: of the JSON file.
        seed: overrides the JSON's seed; None for that of the JSON.
        compute_dtype: fp32, fp16 or bf16; None for that of the JSON (`fp16`, `bf16`), or else the best for the
            hardware.
        evaluate: whether there are data rows to evaluate on.
    Returns:
        See `TrainingSetup`.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: invalid JSON, an unknown key (with the nearest known one), a value of another type or out of range,
            a setting that this training does not use, or a value that transformers refuses.
    """
    values = translate_renamed_keys(read_json_object(path), path)
    if seed is not None:
        values["seed"] = seed
    problems = check_keys(values) + ([] if evaluate else check_no_evaluation(values))
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    dtype = set_precision(values, compute_dtype)
    if not evaluate:
        values["eval_strategy"] = "no"
    values.setdefault("use_cpu", not torch.cuda.is_available())  # several processes on a CPU need gloo
    values.setdefault("ddp_find_unused_parameters", False)
    values.setdefault("ddp_broadcast_buffers", False)  # buffers never change
    values.setdefault("dataloader_pin_memory", False)  # the trainer pins micro-batches itself
    values.setdefault("logging_nan_inf_filter", False)  # it synchronizes with the GPU in every step
    values.setdefault("hub_strategy", "end")
    recompute = [values.pop(key) for key in RECOMPUTE_KEYS if key in values]
    try:
        training_args = TrainingArguments(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    missing = sorted(set(training_args.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise ValueError(
            f"{path}: report_to names {', '.join(missing)}, which is not installed: run `pip install "
            f"{' '.join(missing)}`."
        )
    return TrainingSetup(training_args, dtype, recompute[0] if recompute else None)


def set_precision(values: dict, name: str | None) -> torch.dtype:
    """Chooses the compute dtype and sets `fp16` and `bf16` for the Trainer.

    Args:
        values: the JSON's. `fp16` is set to whether the Trainer must scale the loss, and `bf16` to False: the model is
            in its compute dtype, so that autocast is not needed.
        name: fp32, fp16 or bf16; None for that of the JSON, or else the best for the hardware.
    """
    if name is None:
        name = next((key for key in ("bf16", "fp16") if values.get(key)), None)
    dtype = choose_compute_dtype(name)
    values["bf16"] = False
    values["fp16"] = dtype == torch.float16 and torch.cuda.is_available()
    return dtype


def samples_per_step(args: TrainingArguments) -> int:
    """Samples of one optimizer step in each process: the product of two values of the JSON."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


def check_keys(values: dict) -> list[str]:
    """A problem for each wrong key or value that can be found before `TrainingArguments` is constructed."""
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    unknown = [f"{key}{nearest(key, list(defaults))}" for key in values if key not in defaults]
    problems = []
    if unknown:
        problems.append(f"not a TrainingArguments key of this transformers version: {', '.join(unknown)}")
    unused = [key for key in NOT_FOR_THIS_TRAINER if key in values and is_in_use(values[key], defaults.get(key))]
    if unused:
        problems.append(f"this training does not use {', '.join(unused)}; remove it")
    problems += wrong_types(values) or [
        f"{key} is {values[key]}; it must be positive" for key in POSITIVE_KEYS if values.get(key, 1) <= 0
    ]
    if isinstance(values.get("seed"), int) and not 0 <= values["seed"] < 2**32:
        problems.append(f"seed is {values['seed']}; it must be at least 0 and below 2**32")
    if str(values.get("optim")).startswith(OPTIMIZERS_WITH_STEPS_OF_THEIR_OWN):
        problems.append(f"optim is {values['optim']}, which needs a training step of its own; choose another one")
    if values.get("metric_for_best_model") not in (None, "loss", "eval_loss"):
        problems.append(f"metric_for_best_model is {values['metric_for_best_model']}; only eval_loss is computed")
    if values.get("hub_strategy", "end") != "end":
        problems.append(f"hub_strategy is {values['hub_strategy']}; only end can be had: the adapter is uploaded then")
    if values.get("use_cpu") and torch.cuda.is_available():
        problems.append("use_cpu is true and there is a GPU; hide it with CUDA_VISIBLE_DEVICES= instead")
    return problems


def check_no_evaluation(values: dict) -> list[str]:
    """A problem if there are settings that need evaluations, for a run without evaluations."""
    asked = [key for key in ("eval_on_start", "load_best_model_at_end") if values.get(key)]
    asked += ["save_strategy"] * (values.get("save_strategy") == "best")
    return [f"{', '.join(asked)} cannot be had with --eval_data_path none"] if asked else []


def is_in_use(value: object, default: object) -> bool:
    """Whether a setting has an effect: it is on, or it is off and its default is on."""
    return value != default and (default is True or value not in (None, False, 0, "", "no", [], {}))


def wrong_types(values: dict) -> list[str]:
    """A problem for each value of another type than TrainingArguments declares, where that is a JSON type."""
    problems = []
    for key, hint in typing.get_type_hints(TrainingArguments).items():
        kinds = (hint,) if typing.get_origin(hint) is list else typing.get_args(hint) or (hint,)
        if key in values and set(kinds) <= JSON_TYPES.keys():
            accepted = (*kinds, int) if float in kinds else kinds
            if type(values[key]) not in accepted:
                expected = " or ".join(JSON_TYPES[kind] for kind in kinds)
                problems.append(f"{key} is {json.dumps(values[key])}; expected {expected}")
    return problems


def read_json_object(path: str) -> dict:
    """The object in a JSON file; FileNotFoundError without a file, ValueError for any other content."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--train_args_json: there is no file {path}.")
    try:
        values = parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one JSON object, found a {type(values).__name__}.")
    return values


def translate_renamed_keys(values: dict, path: str) -> dict:
    """Gives keys of older transformers their present names, and logs these in one line.

    Args:
        values: the JSON's.
        path: of the JSON, for messages.
    Raises:
        ValueError: a key has both its old and its present name.
    """
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    renamed = {old: new for old, new in RENAMED_KEYS.items() if old in values and old not in known}
    if "group_by_length" in values and "group_by_length" not in known:
        renamed["group_by_length"] = "train_sampling_strategy"
    duplicates = [f"{old} and {new}" for old, new in renamed.items() if new in values]
    if duplicates:
        raise ValueError(f"{path} sets {'; '.join(duplicates)}, which are the same setting: keep one.")
    translated = {renamed.get(key, key): value for key, value in values.items()}
    if "group_by_length" in renamed:
        translated["train_sampling_strategy"] = "group_by_length" if values["group_by_length"] else "random"
    if renamed:
        notes = ", ".join(f"{old} -> {new}" for old, new in renamed.items())
        logger.info("%s: read under their present names: %s", path, notes)
    return translated
