"""Puts the layers of this package into a model that bitsandbytes quantized and peft gave an adapter."""

from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from chatglm.modeling_chatglm import ChatGLMAttention, ResidualNorm
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
