"""LoRA adapters: a new one, or one of a folder, whose configuration and weights are checked before they are used."""

import hashlib
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import PreTrainedModel

from qlora.arguments import LoraSettings
from qlora.checkpoint import HOW_TO_GET, is_finite
from qlora.errors import first_line

# Fields of a LoRA configuration that may have any value; the others must be off or have their default.
PLAIN_LORA = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
)


def add_lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float, target_modules: list[str]) -> PeftModel:
    """Adds a new LoRA adapter to the model; its weights are fp32 and trained, all others are frozen.

    Args:
        model: without an adapter.
        rank: of the matrices A and B.
        alpha: their product is scaled by alpha / rank.
        dropout: probability by which an input of A is dropped.
        target_modules: names of the linear layers that get an adapter, such as `query_key_value`.
    Raises:
        ValueError: a target module that the model does not have.
    """
    linear = sorted(model.config.linear_shapes)
    unknown = [name for name in target_modules if name not in linear]
    if unknown:
        raise ValueError(f"--lora_target_modules: the model has no {', '.join(unknown)}; it has {', '.join(linear)}.")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules
    )
    return get_peft_model(model, config)


def add_adapter(model: PreTrainedModel, lora: LoraSettings, init_adapter: str | None) -> PeftModel:
    """The model with the adapter to train, in fp32: a new one, or that of a folder with its values.

    Args:
        model: the base model, without an adapter.
        lora: settings of the adapter.
        init_adapter: the folder, of an adapter with these settings; only the dropout may differ.
    Raises:
        FileNotFoundError, ValueError: see `add_lora` and `load_adapter`.
    """
    if init_adapter:
        return load_adapter(model, init_adapter, train_with_dropout=lora.dropout)
    return add_lora(model, *lora)


def adapter_config(path: str) -> LoraConfig:
    """The configuration of a trained adapter.

    Args:
        path: of the adapter's folder.
    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: the file is not a configuration, or that of an adapter which is more than scaling * B @ A.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no adapter in {path} (no adapter_config.json). Train one with `bash train.sh`, or say where "
            "it is with --adapter_path."
        )
    try:
        config = PeftConfig.from_pretrained(path)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        found = f"{file} is not the configuration of an adapter ({first_line(error)})"
        raise ValueError(f"{found}: copy it there again, or train the adapter anew.") from error
    check_plain_lora(path, config)
    problem = config_problem(config)
    if problem:
        raise ValueError(f"{file}: {problem}.")
    return config


def check_plain_lora(path: str, config: PeftConfig):
    """ValueError for an adapter that changes the model by anything else than scaling * B @ A."""
    if not isinstance(config, LoraConfig):
        raise ValueError(f"the adapter in {path} is of type {config.peft_type}; this project uses LoRA only.")
    values, defaults = config.to_dict(), LoraConfig().to_dict()
    others = {name: v for name, v in values.items() if name not in PLAIN_LORA and v and v != defaults[name]}
    if others.get("init_lora_weights") == "gaussian":  # an initialization that leaves the base weights unchanged
        del others["init_lora_weights"]
    if others:
        found = ", ".join(f"{name}={value}" for name, value in others.items())
        raise ValueError(f"the adapter in {path} is more than plain LoRA ({found}): use it with peft instead.")


def config_problem(config: LoraConfig) -> str | None:
    """A value of the wrong type or out of range, as a sentence; None if there is none."""
    ranks = {"r": config.r, **(config.rank_pattern or {})}
    alphas = {"lora_alpha": config.lora_alpha, **(config.alpha_pattern or {})}
    wrong = [f"{name} is {v!r}, expected a whole number above 0" for name, v in ranks.items() if not is_rank(v)]
    wrong += [f"{name} is {v!r}, expected a number" for name, v in alphas.items() if not is_number(v)]
    if not isinstance(config.target_modules, str | list | set):
        wrong.append(f"target_modules is {config.target_modules!r}, expected names of layers")
    return wrong[0] if wrong else None


def is_rank(value: Any) -> bool:
    """Whether a value is a positive int."""
    return type(value) is int and value > 0


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float."""
    return type(value) in (int, float) and math.isfinite(value)


def base_model_path(path: str) -> str:
    """The folder of the base model that an adapter's configuration names.

    A relative path is looked up in the current folder, then in the adapter's folder and in those above it, since
    training wrote it relative to the folder in which it was started.

    Args:
        path: of the adapter's folder.
    Raises:
        FileNotFoundError, ValueError: see `adapter_config`; the folder is in none of these places, or none is named.
    """
    name = adapter_config(path).base_model_name_or_path
    if not (isinstance(name, str) and name):
        raise ValueError(f"{path}/adapter_config.json names no base model: give it with --model_name_or_path.")
    adapter = Path(path).resolve()
    if Path(name).is_dir():
        return name
    found = next((folder / name for folder in (adapter, *adapter.parents) if (folder / name).is_dir()), None)
    if found is None:
        places = "" if Path(name).is_absolute() else f" in {Path.cwd()}, nor in {adapter} or a folder above it"
        raise FileNotFoundError(
            f"the adapter in {path} was trained on {name}; there is no folder of this name{places}. Say where the "
            f"base model is with --model_name_or_path. {HOW_TO_GET}"
        )
    return str(found)


def adapter_weights(path: str) -> dict[str, torch.Tensor]:
    """The weights of an adapter on the CPU; they are read from its folder and never looked up elsewhere.

    Args:
        path: of the adapter's folder, with `adapter_model.safetensors` or, of old versions of peft, `.bin`.
    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged, hold anything else than tensors, or have a value that is not finite.
    """
    files, advice = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), "copy them there again, or train the adapter anew"
    if not any((Path(path) / name).is_file() for name in files):
        raise FileNotFoundError(f"the adapter in {path} has no weights ({' or '.join(files)}): {advice}.")
    try:
        weights = load_peft_weights(path, device="cpu")
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"the adapter's weights in {path} are damaged ({first_line(error)}): {advice}.") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"the adapter's weights in {path} are damaged (no dictionary of tensors): {advice}.")
    for name, tensor in weights.items():
        if not is_finite(tensor):
            raise ValueError(f"the adapter in {path} cannot be used: {name} is not finite (NaN or infinity).")
    return weights


def read_adapter(path: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of an adapter; errors as for `adapter_config` and `adapter_weights`."""
    return adapter_config(path), adapter_weights(path)


def adapter_settings(path: str) -> LoraSettings:
    """Rank, alpha, dropout and target layers of the adapter in a folder; errors as for `adapter_config`."""
    config = adapter_config(path)
    modules = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    return LoraSettings(config.r, config.lora_alpha, config.lora_dropout, sorted(modules))


def load_adapters(model: PreTrainedModel, paths: list[str]) -> PreTrainedModel | PeftModel:
    """Adds trained adapters to the model, in this order; errors as for `load_adapter`."""
    for number, path in enumerate(paths):
        model = load_adapter(model, path, name=f"adapter_{number}")
    return model


def load_adapter(
    model: PreTrainedModel | PeftModel, path: str, train_with_dropout: float | None = None, name: str = "default"
) -> PeftModel:
    """Adds a trained adapter to the model, in fp32.

    Args:
        model: the base model, or one with other adapters, of which the first stays the active one; on the meta device
            its shapes are checked, and the adapter has no values either.
        path: of the adapter's folder.
        train_with_dropout: dropout of a training that goes on from the adapter's values; None to freeze them. Of the
            first adapter only.
        name: by which peft knows the adapter.
    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is damaged, not finite or more than plain LoRA, does not fit the model's shapes, or is merged
            into the model already.
    """
    config, weights = read_adapter(path)
    outside = [key for key in weights if ".layers." not in key]
    if outside:
        raise ValueError(
            f"the adapter in {path} has a part in {outside[0]}; this project uses adapters of the linear layers in "
            "the blocks only."
        )
    merged = getattr(model.config, "merged_adapter", None)
    if merged and digest_of(weights) == merged:
        raise ValueError(
            f"the adapter in {path} is already merged into {model.name_or_path}; with it once more, it would count "
            "twice. Give the model it was trained on with --model_name_or_path."
        )
    if train_with_dropout is not None:
        config.lora_dropout, config.base_model_name_or_path = train_with_dropout, model.name_or_path
    is_meta = model.device.type == "meta"
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(path, name, low_cpu_mem_usage=is_meta)
            tuned = model
        else:
            is_trainable = train_with_dropout is not None
            tuned = PeftModel.from_pretrained(
                model, path, name, config=config, is_trainable=is_trainable, low_cpu_mem_usage=is_meta
            )
        state = get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False)
        fits = shapes(state) == shapes(weights)
    except (RuntimeError, ValueError, TypeError):
        fits = False
    if not fits:
        first, tensor = next(iter(weights.items()), ("nothing", torch.empty(0)))
        raise ValueError(
            f"the adapter in {path} does not fit the base model {model.name_or_path}: it has {len(weights)} tensors, "
            f"the first is {first} {list(tensor.shape)}. Give the base model it was trained on with "
            "--model_name_or_path."
        )
    return tuned


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    """A hash of an adapter's weights; the configuration of a merged model has that of its adapter."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def shapes(state_dict: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
