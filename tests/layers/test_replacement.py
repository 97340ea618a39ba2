"""qlora/layers/replacement.py: the modules are replaced, parameters and their names are not."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import add_random_lora
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from chatglm import fast_layers
from chatglm.fast_layers import DecodingAttention
from chatglm.fused_residual import FusedResidualNorm
from chatglm.modeling_chatglm import ChatGLMAttention, ResidualNorm
from qlora.layers.fp8 import FP8Linear
from qlora.layers.linear import InferenceLoRANF4Linear, LoRANF4Linear, NF4Linear
from qlora.layers.replacement import replace_layers
from qlora.loading import load_quantized_model


@pytest.fixture
def model(tiny_checkpoint, monkeypatch) -> PeftModel:
    """A model in training mode, whose layers are replaced as on a GPU that can run the kernels."""
    monkeypatch.setattr(fast_layers, "kernels_supported", lambda tensor: True)
    return add_random_lora(load_quantized_model(str(tiny_checkpoint), torch.float32), ["query_key_value", "dense"])


@pytest.mark.parametrize("for_training", [True, False])
def test_every_layer_is_replaced(model, for_training):
    replace_layers(model, for_training)
    layers = list(model.get_base_model().transformer.layers)
    modules = [module for layer in layers for module in layer.modules()]
    lora = LoRANF4Linear if for_training else InferenceLoRANF4Linear
    assert {type(module) for module in modules if isinstance(module, LoraLayer)} == {lora}
    assert {type(module) for module in modules if isinstance(module, ResidualNorm)} == {FusedResidualNorm}
    attention = ChatGLMAttention if for_training else DecodingAttention
    assert {type(module) for module in modules if isinstance(module, ChatGLMAttention)} == {attention}
    assert sum(isinstance(module, NF4Linear) for module in modules) == 4 * len(layers)
    assert not any(isinstance(module, Linear4bit) for module in modules)


@pytest.mark.parametrize("for_training", [True, False])
def test_parameters_and_the_adapter_keep_their_names(model, for_training):
    before, adapter = dict(model.named_parameters()), get_peft_model_state_dict(model)
    replace_layers(model, for_training)
    after = dict(model.named_parameters())
    assert list(after) == list(before)  # the order is that of the optimizer's state
    assert all(after[name] is parameter for name, parameter in before.items())
    found = get_peft_model_state_dict(model)
    assert list(found) == list(adapter) and all(torch.equal(found[name], adapter[name]) for name in found)


def test_frozen_layers_of_8_bit_products(model):
    replace_layers(model, for_training=True, fp8=True)
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    assert len(layers) == 8 and {type(layer) for layer in layers} == {FP8Linear}


def test_replaced_modules_have_the_mode_of_the_model(model):
    replace_layers(model.eval(), for_training=True)
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())
