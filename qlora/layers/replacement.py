"""Puts the layers of this package into a model that bitsandbytes quantized and peft gave an adapter."""

import itertools

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from glm_shared.modeling import SublayerBlock
from glm_shared.registration import architecture_of
from qlora.layers.fp8 import FP8Linear
from qlora.layers.linear import InferenceLoRANF4Linear, LoRANF4Linear, NF4Linear


def replace_layers(model: PeftModel | PreTrainedModel, for_training: bool, fp8: bool = False):
    """Replaces linear layers, and the modules for which the model has faster ones, in place.

    Parameters are taken over, not copied, and keep their names: a state dict and an adapter stay the same.

    Args:
        model: with one LoRA adapter, or for inference with any number (see `InferenceLoRANF4Linear`); its linear
            layers are bitsandbytes' `Linear4bit`.
        for_training: whether gradients are needed. If not, the adapter's weights are read now and must not change.
        fp8: whether the products with the frozen weights take 8-bit operands in training.
    """
    adapters = list(model.peft_config) if isinstance(model, PeftModel) else []
    fast_layer = architecture_of(model.config).fast_layer
    for name, module in list(model.named_modules()):
        replacement = linear_layer(module, for_training, adapters, fp8) or fast_layer(module, for_training)
        if replacement is not None:
            model.set_submodule(name, replacement.train(module.training))
    if for_training:
        share_dropout_seed(model)


def linear_layer(module: nn.Module, for_training: bool, adapters: list[str], fp8: bool) -> nn.Module | None:
    """The layer of this package for a linear layer; None for another module."""
    if isinstance(module, LoraLayer):
        return LoRANF4Linear(module) if for_training else InferenceLoRANF4Linear(module, adapters)
    if isinstance(module, Linear4bit):
        return FP8Linear(module) if fp8 else NF4Linear(module)
    return None


def share_dropout_seed(model: nn.Module):
    """Gives all LoRA layers one seed for their dropout masks, which then is all that is random in a forward pass."""
    seed, numbers = torch.zeros(1, dtype=torch.int32, device=next(model.parameters()).device), itertools.count()
    for module in model.modules():
        if isinstance(module, LoRANF4Linear):
            module.dropout_seed, module.number = seed, next(numbers)
        if isinstance(module, SublayerBlock):
            module.preserve_rng_state = False


def dropout_seed(model: nn.Module) -> torch.Tensor | None:
    """The seed [1] of the dropout masks, to be drawn before each forward pass; None with the layers of peft."""
    return next((module.dropout_seed for module in model.modules() if isinstance(module, LoRANF4Linear)), None)
