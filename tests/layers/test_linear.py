"""qlora/layers/linear.py, compared with the layers of peft and bitsandbytes, and with autograd."""

import copy
import importlib
from pathlib import Path
from types import ModuleType

import bitsandbytes
import pytest
import torch
from conftest import add_random_lora
from peft import PeftModel

from chatglm import fast_layers
from glm_kernels import lora_reference
from glm_kernels.lora_reference import Dropout
from qlora.layers import linear, nf4
from qlora.layers.linear import LoRALinearFunction, NF4Linear
from qlora.layers.replacement import dropout_seed, replace_layers
from qlora.loading import load_quantized_model

TARGETS = ["query_key_value", "dense_4h_to_h"]


def make_model(folder: Path, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> PeftModel:
    """A 4-bit model with a random LoRA adapter, in the layers of peft."""
    return add_random_lora(load_quantized_model(str(folder), dtype), TARGETS, dropout=dropout)


@pytest.fixture
def batch(cases) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(cases["train_batch"][name]) for name in ("input_ids", "labels")}


def loss_and_gradients(model: PeftModel, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_training_forward_equals_that_of_peft(golden_folder, batch, monkeypatch, training, kernels):
    # With the kernels of the norms, too, in Triton's interpreter.
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(fast_layers, "kernels_supported", lambda tensor: True)
    plain, ours = make_model(golden_folder), make_model(golden_folder)
    replace_layers(ours, for_training=True)
    expected, found = (loss_and_gradients(model.train(training), batch) for model in (plain, ours))
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-4)


def test_disabled_adapter_gives_the_base_model(golden_folder, batch):
    model = make_model(golden_folder).eval()
    replace_layers(model, for_training=True)
    with torch.no_grad():
        tuned = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        expected = load_quantized_model(str(golden_folder), torch.float32).eval()(**batch).logits
    torch.testing.assert_close(base, expected, atol=1e-4, rtol=0)
    assert (tuned - base).abs().max() > 1e-2


def test_half_precision_gives_gradients_in_fp32(golden_folder, batch):
    model = make_model(golden_folder, torch.bfloat16).train()
    replace_layers(model, for_training=True)
    loss, gradients = loss_and_gradients(model, batch)
    exact, _ = loss_and_gradients(make_model(golden_folder).train(), batch)
    assert loss.item() == pytest.approx(exact.item(), abs=0.1)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("tokens", "least_features", "has_compiler", "expected_product"),
    [
        (1, 64, True, "nf4_linear"),
        (nf4.MOST_TOKENS, 64, True, "nf4_linear"),
        (nf4.MOST_TOKENS + 1, 64, True, "linear"),
        (1, 65, True, "matmul_4bit"),
        (2, 65, True, "linear"),
        (1, 64, False, "matmul_4bit"),
    ],
)
def test_few_tokens_are_multiplied_with_the_packed_weight(
    golden_folder, monkeypatch, tokens, least_features, has_compiler, expected_product
):
    model = make_model(golden_folder, torch.float16).get_base_model()
    layer = NF4Linear(model.transformer.layers[0].attention.query_key_value.base_layer)  # of 64 input features
    products = []

    def in_place_of_kernel(x, packed, state, bias):
        assert x.is_contiguous()
        return linear.F.linear(x, bitsandbytes.functional.dequantize_4bit(packed, state), bias)

    monkeypatch.setattr(nf4, "kernels_supported", lambda tensor: True)
    monkeypatch.setattr(nf4, "kernel_supports", lambda packed, state: True)
    monkeypatch.setattr(nf4, "can_compile", lambda: has_compiler)
    monkeypatch.setattr(nf4, "LEAST_FEATURES", least_features)
    monkeypatch.setattr(linear, "dequantize", bitsandbytes.functional.dequantize_4bit)
    monkeypatch.setattr(nf4, "nf4_linear", in_place_of_kernel)
    for module, name in ((nf4, "nf4_linear"), (linear.F, "linear"), (nf4.bitsandbytes, "matmul_4bit")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=function, n=name, **kw: products.append(n) or f(*args, **kw))
    hidden_states = torch.randn(tokens, 2, 64, dtype=torch.float16)[:, 1:]
    with torch.no_grad():
        found = layer(hidden_states)
    assert products[0] == expected_product  # bitsandbytes may use another one itself
    layer.weight.quant_state.dtype = torch.float32
    expected = hidden_states.float() @ layer.dequantized_weight().T + layer.bias.float()
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-3)


def test_dropout_is_the_same_when_activations_are_recomputed(golden_folder, batch):
    model = make_model(golden_folder, dropout=0.5).train()
    replace_layers(model, for_training=True)
    results = []
    for recompute in (False, True):
        for block in model.get_base_model().transformer.layers:
            block.recompute_attention = block.recompute_mlp = recompute
        dropout_seed(model).fill_(1)
        results.append(copy.deepcopy(loss_and_gradients(model, batch)))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)
    dropout_seed(model).fill_(2)
    other, _ = loss_and_gradients(model, batch)
    assert (other - results[0][0]).abs() > 1e-4


def test_dropout_keeps_the_expected_output(golden_folder, batch):
    model = make_model(golden_folder, dropout=0.3)
    replace_layers(model, for_training=True)
    layer = model.get_base_model().transformer.layers[0].attention.query_key_value
    hidden_states = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = layer.eval()(hidden_states)
        layer.train()
        outputs = []
        for seed in range(4000):
            dropout_seed(model).fill_(seed)
            outputs.append(layer(hidden_states))
        mean = torch.stack(outputs).mean(0)
    scale = (expected - layer.base_layer(hidden_states)).abs().mean()
    assert (mean - expected).abs().mean() < 0.05 * scale


def test_layers_run_under_autocast(golden_folder):
    # Training does not use autocast, but other callers of the model can.
    model = make_model(golden_folder, torch.bfloat16).train()
    replace_layers(model, for_training=True)
    layer = model.get_base_model().transformer.layers[0].attention.query_key_value
    hidden_states = torch.randn(2, 5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(hidden_states).float().sum().backward()
    assert hidden_states.grad.abs().max() > 0


# Gradients of `scaling * dropout(x) @ A.T @ B.T`, with the same dropout mask in the forward and backward pass.


def dropout_mask(operations: ModuleType, shape: tuple[int, int], dropout: Dropout) -> torch.Tensor:
    """The factors of dropout for a matrix, 0 or 1 / (1 - dropout)."""
    mask = torch.zeros(shape)
    operations.lora_up_add(mask, torch.ones(shape[0], 1), torch.ones(1, shape[1]), 1.0, dropout)
    return mask


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_gradients_with_dropout_are_those_of_autograd(golden_folder, monkeypatch, kernels):
    operations = lora_reference
    if kernels:
        pytest.importorskip("triton")
        operations = importlib.import_module("glm_kernels.lora")
    monkeypatch.setattr(linear, "lora_operations", lambda tensor: operations)
    base = make_model(golden_folder).get_base_model().transformer.layers[0].attention.query_key_value.base_layer
    layer, (T, rank) = NF4Linear(base), (50, 4)
    dropout = Dropout(0.3, torch.tensor([12345], dtype=torch.int32), layer=2)
    torch.manual_seed(0)
    x, A, B = torch.randn(T, layer.in_features), torch.randn(rank, layer.in_features), torch.randn(192, rank)
    direction = torch.randn(T, layer.out_features)
    inputs = [tensor.requires_grad_() for tensor in (x, A, B)]

    mask = dropout_mask(operations, (T, layer.in_features), dropout)
    expected = x @ layer.dequantized_weight().T + layer.bias + 2.0 * (x * mask) @ A.T @ B.T
    found = LoRALinearFunction.apply(x, A, B, layer, 2.0, dropout)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    expected_grads = torch.autograd.grad((expected * direction).sum(), inputs)
    for gradient, other in zip(torch.autograd.grad((found * direction).sum(), inputs), expected_grads, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-3, rtol=1e-4)
