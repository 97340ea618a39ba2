"""Reads transformers' TrainingArguments from the JSON and the command line: translates renamed keys, checks values."""

import contextlib
import dataclasses
import json
import logging
import re
import typing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from qlora.arguments import RENAMED_KEYS, FinetuneArguments, in_repository
from qlora.command_line import BOOLEANS, flag_names, nearest
from qlora.data.strict_json import kind_of, parse_json
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
    "dataloader_in_order",
    "deepspeed",
    "enable_jit_checkpoint",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "fp16_full_eval",
    "fsdp",
    "fsdp_config",
    "gradient_checkpointing_kwargs",
    "hub_always_push",
    "ignore_data_skip",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "label_names",
    "label_smoothing_factor",
    "length_column_name",
    "liger_kernel_config",
    "local_rank",
    "neftune_noise_alpha",
    "parallelism_config",
    "restore_callback_states_from_checkpoint",
    "save_on_each_node",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "use_cache",
    "use_liger_kernel",
)
OPTIMIZERS_WITH_STEPS_OF_THEIR_OWN = ("lomo", "adalomo", "schedule_free")  # prefixes of their names
SCHEDULES_WITHOUT_WARMUP = ("constant", "greedy", "reduce_lr_on_plateau")
SCHEDULES_WITHOUT_KWARGS = ("constant", "constant_with_warmup")
SCHEDULES_BY_EVALUATION = ("greedy", "reduce_lr_on_plateau")
DATA_LOADER_KEYS = ("num_workers", "persistent_workers", "prefetch_factor", "multiprocessing_context")
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
PRECISION_KEYS = ("bf16", "fp16")


class TrainingSetup(NamedTuple):
    """The settings of a run that follow from the JSON, the command line and the hardware.

    Attributes:
        training_args: as the Trainer takes them.
        compute_dtype: of the arithmetic.
        recompute: the JSON's `gradient_checkpointing` or `activation_checkpointing`; None if it has neither.
        fp8: whether the products with the frozen weights take 8-bit operands in training.
    """

    training_args: TrainingArguments
    compute_dtype: torch.dtype
    recompute: bool | None
    fp8: bool = False

    @property
    def arithmetic(self) -> str:
        """The type of the arithmetic, to be shown."""
        return "fp8" if self.fp8 else str(self.compute_dtype).removeprefix("torch.")


def read_training_args(
    path: str, flags: dict[str, list[str]] | None = None, compute_dtype: str | None = None, evaluate: bool = True
) -> TrainingSetup:
    """Reads TrainingArguments from the JSON and from flags; keys that transformers renamed are translated.

    With fp16 arithmetic on a GPU the Trainer's loss scaling is enabled, since small gradients would underflow.

    Args:
        path: of the JSON file.
        flags: settings of the command line and their words, which take the place of the JSON's.
        compute_dtype: fp32, fp16, bf16 or fp8; None for that of the JSON (`fp16`, `bf16`), or else the best for the
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
    if isinstance(values.get("output_dir"), str):
        values["output_dir"] = in_repository(values["output_dir"])
    given = translate_renamed_keys(
        {name: flag_value(name, words) for name, words in (flags or {}).items()}, "the command line"
    )
    others = [f"{key} {value}" for key, value in given.items() if key not in values or values[key] != value]
    if others:
        logger.info("Other settings than in %s: %s", path, ", ".join(others))
    values = override(values, given)
    problems = key_problems(values) + evaluation_problems(values, evaluate) + epoch_problems(values, given)
    if problems:
        raise ValueError(with_sources(problems, path, values, given))
    dtype = set_precision(values, compute_dtype)
    if not evaluate:
        values["eval_strategy"] = "no"
    if values.get("save_strategy") == "best":
        values.setdefault("metric_for_best_model", "loss")
    values.setdefault("hub_strategy", "end")
    values.setdefault("use_cpu", not torch.cuda.is_available())  # several processes on a CPU need gloo
    values.setdefault("ddp_find_unused_parameters", False)
    values.setdefault("ddp_broadcast_buffers", False)  # buffers never change
    values.setdefault("dataloader_pin_memory", False)  # the trainer pins micro-batches itself
    values.setdefault("logging_nan_inf_filter", False)  # it synchronizes with the GPU in every step
    recompute = [values.pop(key) for key in RECOMPUTE_KEYS if key in values]
    try:
        training_args = TrainingArguments(**values)
        check_data_loader(training_args)
    except (TypeError, ValueError) as error:
        raise ValueError(with_sources([str(error).removesuffix(".")], path, values, given)) from error
    missing = sorted(set(training_args.report_to) - set(get_available_reporting_integrations()))
    if missing:
        names = f"report_to names {', '.join(missing)}, which is not installed"
        install = f"run `pip install {' '.join(missing)}`"
        raise ValueError(with_sources([f"{names}: {install}"], path, values, given))
    return TrainingSetup(training_args, dtype, recompute[0] if recompute else None, compute_dtype == "fp8")


def flag_value(name: str, words: list[str]) -> object:
    """The words of a flag as the value that a JSON would hold: a text where the setting may be one."""
    hints = typing.get_type_hints(TrainingArguments) | {"group_by_length": bool}
    kinds = accepted_types(hints[name if name in hints else RENAMED_KEYS[name]])
    if not words:
        return True
    if len(words) > 1 or (str not in kinds and any(typing.get_origin(kind) is list for kind in kinds)):
        return words
    word = words[0]
    if str in kinds:
        return word
    if bool in kinds and word.lower() in BOOLEANS:
        return BOOLEANS[word.lower()]
    with contextlib.suppress(ValueError):
        return parse_json(re.sub(r"^(-?)\.", r"\g<1>0.", word))  # .5 is 0.5
    return word


def accepted_types(hint: Any) -> tuple:
    """The types of a field: those of `int | None`, or the one that it is."""
    return (hint,) if typing.get_origin(hint) is list else typing.get_args(hint) or (hint,)


def override(values: dict, given: dict) -> dict:
    """The JSON's values with those of the command line in their place; a key that says the same otherwise goes."""
    replaced = set(PRECISION_KEYS) if any(given.get(key) for key in PRECISION_KEYS) else set()
    replaced |= set(RECOMPUTE_KEYS) if given.keys() & set(RECOMPUTE_KEYS) else set()
    return {key: value for key, value in values.items() if key not in replaced} | given


def with_sources(problems: list[str], path: str, values: dict, given: dict) -> str:
    """Problems in one message, each behind where its settings stand: in the JSON, on the command line, or in both.

    Args:
        problems: without a full stop.
        path: of the JSON.
        values: all settings.
        given: those of the command line, which are named as flags.
    """
    by_source: dict[str, list[str]] = {}
    for problem in problems:
        named = values.keys() & set(re.findall(r"\w+", problem)) or values.keys()  # transformers may name none
        sources = [path] * bool(named - given.keys()) + ["the command line"] * bool(named & given.keys())
        text = re.sub(r"(?<!-)\b\w+\b", lambda word: f"--{word[0]}" if word[0] in given else word[0], problem)
        by_source.setdefault(" and ".join(sources), []).append(text)
    return "; ".join(f"{source}: {'; '.join(texts)}" for source, texts in by_source.items()) + "."


def epoch_problems(values: dict, given: dict) -> list[str]:
    """A problem if a number of epochs was asked for and `max_steps`, which is stronger, is set, too."""
    if "num_train_epochs" in given and type(values.get("max_steps")) is int and values["max_steps"] > 0:
        return [f"num_train_epochs has no effect while max_steps is {values['max_steps']}; add --max_steps -1"]
    return []


def set_precision(values: dict, name: str | None) -> torch.dtype:
    """Chooses the compute dtype and sets `fp16` and `bf16` for the Trainer.

    Args:
        values: the JSON's. `fp16` is set to whether the Trainer must scale the loss, and `bf16` to False: the model is
            in its compute dtype, so that autocast is not needed.
        name: fp32, fp16, bf16 or fp8; None for that of the JSON, or else the best for the hardware.
    """
    if name is None:
        name = next((key for key in PRECISION_KEYS if values.get(key)), None)
    dtype = choose_compute_dtype(name)
    values["bf16"] = False
    values["fp16"] = dtype == torch.float16 and torch.cuda.is_available()
    return dtype


def samples_per_step(args: TrainingArguments) -> int:
    """Samples of one optimizer step in each process: the product of two values of the JSON."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


def key_problems(values: dict) -> list[str]:
    """A problem for each wrong key or value that can be found before `TrainingArguments` is constructed."""
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    ours = flag_names(FinetuneArguments)
    flags = [key for key in values if f"--{key}" in ours and is_in_use(values[key], defaults.get(key, values))]
    unknown = [f"{key}{nearest(key, list(defaults))}" for key in values if key not in defaults and key not in flags]
    problems = [f"{key} is a flag: --{key}" for key in flags]
    if unknown:
        problems.append(f"not a TrainingArguments key of this transformers version: {', '.join(unknown)}")
    unused = [key for key in NOT_FOR_THIS_TRAINER if key in values and is_in_use(values[key], defaults.get(key))]
    problems += [f"this training does not use {key}; remove it" for key in unused]
    problems += wrong_types(values) or [
        f"{key} is {values[key]}; it must be positive"
        for key in POSITIVE_KEYS
        if values.get(key) is not None and values[key] <= 0
    ]
    if isinstance(values.get("seed"), int) and not 0 <= values["seed"] < 2**32:
        problems.append(f"seed is {values['seed']}; it must be at least 0 and below 2**32")
    if str(values.get("optim")).startswith(OPTIMIZERS_WITH_STEPS_OF_THEIR_OWN):
        problems.append(f"optim is {values['optim']}, which needs a training step of its own; choose another one")
    if values.get("metric_for_best_model") not in (None, "loss", "eval_loss"):
        problems.append(f"metric_for_best_model is {values['metric_for_best_model']}; only eval_loss is computed")
    if values.get("greater_is_better"):
        problems.append("greater_is_better is true; the best eval_loss is the lowest one")
    if values.get("hub_strategy") not in (None, "end"):
        problems.append(f"hub_strategy is {values['hub_strategy']}; only the adapter is uploaded, at the end: end")
    if values.get("hub_token"):
        problems.append("hub_token would be saved with the adapter; run `hf auth login`, or set HF_TOKEN instead")
    if values.get("train_sampling_strategy") not in (None, "random", "sequential"):
        problems.append(
            f"train_sampling_strategy is {values['train_sampling_strategy']}; samples are not padded here, so that it "
            "saves nothing: random or sequential"
        )
    schedule = values.get("lr_scheduler_type")
    if schedule in SCHEDULES_WITHOUT_WARMUP and values.get("warmup_steps"):
        problems.append(f"lr_scheduler_type is {schedule}, which has no warmup_steps; remove them")
    if schedule in SCHEDULES_WITHOUT_KWARGS and values.get("lr_scheduler_kwargs"):
        problems.append(f"lr_scheduler_type is {schedule}, which has no lr_scheduler_kwargs; remove them")
    if values.get("do_train") is False:
        problems.append("do_train is false; --check makes every check without training")
    if values.get("do_predict"):
        problems.append("do_predict is true; inference_qlora.py answers prompts")
    if values.get("use_cpu") and torch.cuda.is_available():
        problems.append("use_cpu is true and there is a GPU; hide it with CUDA_VISIBLE_DEVICES= instead")
    return problems


def evaluation_problems(values: dict, evaluate: bool) -> list[str]:
    """A problem if there are settings that need evaluations, for a run without them, or the reverse.

    Args:
        values: the JSON's.
        evaluate: whether there are data rows to evaluate on.
    """
    strategy = values.get("eval_strategy", "no")
    evaluates = evaluate and strategy != "no"
    if evaluates:
        return ["do_eval is false, and eval_strategy is not no"] if values.get("do_eval") is False else []
    asked = [key for key in ("load_best_model_at_end", "metric_for_best_model") if values.get(key)]
    asked += ["eval_on_start"] * bool(values.get("eval_on_start") and not evaluate)
    asked += ["do_eval"] * bool(values.get("do_eval") and evaluate)
    asked += ["save_strategy best"] * (values.get("save_strategy") == "best")
    asked += ["lr_scheduler_type"] * (values.get("lr_scheduler_type") in SCHEDULES_BY_EVALUATION)
    reason = "eval_strategy no" if evaluate else "--eval_data_path none"
    return [f"{', '.join(asked)} cannot be had with {reason}"] if asked else []


def check_data_loader(args: TrainingArguments):
    """ValueError for settings that PyTorch's DataLoader refuses; its message names them."""
    given: dict[str, Any] = {key: getattr(args, f"dataloader_{key}", None) for key in DATA_LOADER_KEYS}
    DataLoader(TensorDataset(torch.zeros(1)), **given)


def is_in_use(value: object, default: object) -> bool:
    """Whether a setting has an effect: it is on, or it is off and its default is on."""
    return value != default and (default is True or value not in (None, False, 0, "", "no", [], {}))


def wrong_types(values: dict) -> list[str]:
    """A problem for each value of another type than TrainingArguments declares, where that is a JSON type."""
    problems = []
    for key, hint in typing.get_type_hints(TrainingArguments).items():
        kinds = accepted_types(hint)
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
        raise ValueError(f"{path} must hold one JSON object, found {kind_of(values)}.")
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
