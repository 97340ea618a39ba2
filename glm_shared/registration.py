"""Makes models known to the Auto classes, although the official files of all call them by the same names.

`model_type` in config.json is "chatglm" and `tokenizer_class` in tokenizer_config.json is "ChatGLMTokenizer", whatever
the architecture. The classes here that have these names stand for all: each gives an object of the class that fits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizer,
)

MODEL_TYPE = "chatglm"
TOKENIZER_CONFIG = "tokenizer_config.json"


class UnknownModel(ValueError):
    """Files that do not say which model they belong to."""


class Architecture(NamedTuple):
    """What belongs to an architecture.

    Attributes:
        config_class: a `ModelDescription`.
        model_class: with a `CausalLMMixin`.
        tokenizer_class: of the model.
        fast_layer: (module, for_training) -> a layer that takes over the parameters of this module of the model and is
            computed by GPU kernels, in training with gradients; None where the module stays as it is.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    tokenizer_class: type[PreTrainedTokenizer]
    fast_layer: Callable[[nn.Module, bool], nn.Module | None]

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the tokenizer's files."""
        return (*self.tokenizer_class.vocab_files_names.values(), TOKENIZER_CONFIG)


ARCHITECTURES: list[Architecture] = []  # that were registered, in this order


class AnyConfig(PreTrainedConfig):
    """Reads a config.json with the configuration class that describes it."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As `PreTrainedConfig.from_dict`, of another class."""
        fitting = (a.config_class for a in ARCHITECTURES if a.config_class.describes(config_dict))
        return next(fitting, ARCHITECTURES[0].config_class).from_dict(config_dict, **kwargs)


class ChatGLMTokenizer:
    """Reads a tokenizer with the class whose vocabulary file is there."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *inputs, **kwargs) -> PreTrainedTokenizer:
        """As `PreTrainedTokenizer.from_pretrained`, of another class."""
        path = str(pretrained_model_name_or_path)
        if Path(path).is_dir():
            architecture = architecture_of_tokenizer(path)
        else:
            architecture = architecture_of(AutoConfig.from_pretrained(path, **hub_options(kwargs)))
        return architecture.tokenizer_class.from_pretrained(path, *inputs, **kwargs)


def hub_options(kwargs: dict) -> dict:
    """Those of the arguments of `from_pretrained` that say where files come from."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    return {name: kwargs[name] for name in names if name in kwargs}


def register(architecture: Architecture):
    """Makes an architecture known to the Auto classes."""
    ARCHITECTURES.append(architecture)
    config_class, model_class, tokenizer_class, _ = architecture
    AutoConfig.register(MODEL_TYPE, AnyConfig, exist_ok=True)
    # The official auto_map gives the model with its head for AutoModel too.
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    AutoTokenizer.register(AnyConfig, slow_tokenizer_class=tokenizer_class, exist_ok=True)  # by the class's own name
    AutoTokenizer.register(config_class, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a configuration."""
    return next(a for a in ARCHITECTURES if isinstance(config, a.config_class))


def architecture_of_tokenizer(folder: str | Path) -> Architecture:
    """The architecture whose vocabulary file is in a folder; the first one if none is."""
    found = (a for a in ARCHITECTURES if (Path(folder) / a.tokenizer_files[0]).is_file())
    return next(found, ARCHITECTURES[0])
