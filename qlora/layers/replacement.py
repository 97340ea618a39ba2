"""Puts the layers of this package into a model that bitsandbytes quantized and peft gave an adapter."""

import itertools

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from chatglm.modeling_chatglm import ChatGLMAttention, ChatGLMBlock, ResidualNorm
from glm_kernels import kernels_supported
from qlora.layers.decoding_attention import DecodingAttention
from qlora.layers.linear import InferenceLoRANF4Linear, LoRANF4Linear, NF4Linear
from qlora.layers.residual import FusedResidualNorm


def replace_layers(model: PeftModel | PreTrainedModel, for_training: bool):
    """Replaces linear layers, norms and, for inference, attention, in place.

    Parameters are taken over, not copied, and keep their names: a state dict and an adapter stay the same.

    Args:
        model: with one LoRA adapter, or for inference with any number (see `InferenceLoRANF4Linear`); its linear
            layers are bitsandbytes' `Linear4bit`.
        for_training: whether gradients are needed. If not, the adapter's weights are read now and must not change.
    """
    adapters = list(model.peft_config) if isinstance(model, PeftModel) else []
    for name, module in list(model.named_modules()):
        replacement = replacement_of(module, for_training, adapters)
        if replacement is not None:
            model.set_submodule(name, replacement.train(module.training))
    if for_training:
        share_dropout_seed(model)


def replacement_of(module: nn.Module, for_training: bool, adapters: list[str]) -> nn.Module | None:
    """The layer of this package for a module; None where the module stays as it is."""
    if isinstance(module, LoraLayer):
        return LoRANF4Linear(module) if for_training else InferenceLoRANF4Linear(module, adapters)
    if isinstance(module, Linear4bit):
        return NF4Linear(module)
    if isinstance(module, ResidualNorm) and kernels_supported(module.weight):
        return FusedResidualNorm(module)
    if isinstance(module, ChatGLMAttention) and not for_training and kernels_supported(module.query_key_value.bias):
        return DecodingAttention(module)
    return None


def share_dropout_seed(model: nn.Module):
    """Gives all LoRA layers one seed for their dropout masks, which then is all that is random in a forward pass."""
    seed, numbers = torch.zeros(1, dtype=torch.int32, device=next(model.parameters()).device), itertools.count()
    for module in model.modules():
        if isinstance(module, LoRANF4Linear):
            module.dropout_seed, module.number = seed, next(numbers)
        if isinstance(module, ChatGLMBlock):
            module.preserve_rng_state = False


def dropout_seed(model: nn.Module) -> torch.Tensor | None:
    """The seed [1] of the dropout masks, to be drawn before each forward pass; None with the layers of peft."""
    return next((module.dropout_seed for module in model.modules() if isinstance(module, LoRANF4Linear)), None)
