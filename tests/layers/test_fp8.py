"""qlora/layers/fp8.py on a CPU, where PyTorch rounds and multiplies as a GPU does, compared with products in fp32."""

import bitsandbytes
import pytest
import torch
from conftest import add_random_lora
from torch.nn import functional as F

from glm_kernels.fp8_reference import LARGEST, quantize_rows
from qlora.layers.fp8 import FP8Linear
from qlora.layers.linear import NF4Linear
from qlora.layers.replacement import dropout_seed, replace_layers
from qlora.loading import load_quantized_model

# Rounding to 3 bits of mantissa is off by at most 1/16, and by 0.026 of the norm for normally distributed numbers: two
# such operands by 0.037.
PRODUCT_ERROR = (0.03, 0.045)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.fixture
def linear4bit() -> bitsandbytes.nn.Linear4bit:
    """A layer of 192 x 128 weights in NF4, whose rows and columns differ in size."""
    torch.manual_seed(0)
    sizes = {"compress_statistics": True, "quant_type": "nf4", "compute_dtype": torch.bfloat16}
    layer = bitsandbytes.nn.Linear4bit(128, 192, **sizes)
    with torch.no_grad():
        layer.weight.mul_(torch.exp(torch.randn(192, 1))).mul_(torch.exp(torch.randn(128)))
    layer = layer.to(torch.bfloat16).to("cpu")
    return layer


@pytest.fixture
def layer(linear4bit) -> FP8Linear:
    return FP8Linear(linear4bit)


def output_and_gradient(layer: NF4Linear, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(grad)
    return output.detach(), x.grad


def test_products_are_those_of_fp32_within_the_rounding(layer):
    x, grad = torch.randn(2, 40, 128).bfloat16(), torch.randn(2, 40, 192).bfloat16()
    output, x_grad = output_and_gradient(layer, x, grad)
    weight = layer.dequantized_weight().float()
    assert PRODUCT_ERROR[0] < relative_error(output - layer.bias, x.float() @ weight.T) < PRODUCT_ERROR[1]
    assert PRODUCT_ERROR[0] < relative_error(x_grad, grad.float() @ weight) < PRODUCT_ERROR[1]
    assert output.dtype == x_grad.dtype == torch.bfloat16
    for found, expected in ((output - layer.bias, x.float() @ weight.T), (x_grad, grad.float() @ weight)):
        ratio = (found * expected).sum() / expected.square().sum()
        assert ratio.item() == pytest.approx(1, abs=0.003)  # no product is too large or too small on average


def test_every_row_has_its_own_scale(layer):
    x, grad = torch.randn(50, 128).bfloat16(), torch.randn(50, 192).bfloat16()
    factors = 2.0 ** torch.arange(-25, 25)[:, None]  # exact in bf16
    layer.bias = None
    once = output_and_gradient(layer, x, grad)
    scaled = output_and_gradient(layer, (x * factors).bfloat16(), (grad * factors).bfloat16())
    for found, expected in zip(scaled, once, strict=True):
        assert torch.equal(found, (expected * factors).bfloat16())


@pytest.mark.parametrize("transposed", [False, True])
def test_every_row_of_the_weight_has_its_own_scale(layer, transposed):
    weight = layer.quantized_weight(transposed).float()
    assert weight.shape == ((128, 192) if transposed else (192, 128))
    assert torch.equal(weight.abs().amax(1), torch.full((len(weight),), LARGEST))
    exact = layer.dequantized_weight().float()
    scales = layer.transposed_scales if transposed else layer.scales
    assert relative_error(weight * scales, exact.T if transposed else exact) < 0.03


def test_zeros_and_values_that_are_not_finite():
    x = torch.ones(4, 64)
    x[0] = 0  # as the gradients of a row that is filled up
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    quantized, scales = quantize_rows(x)
    restored = quantized.float() * scales
    assert not restored[0].any() and torch.equal(restored[3], x[3])
    assert not restored[1].isfinite().all() and not restored[2].isfinite().all()


def test_cached_matrices_are_those_made_anew(layer):
    x, grad = torch.randn(3, 128).bfloat16(), torch.randn(3, 192).bfloat16()
    expected = output_and_gradient(layer, x, grad)
    layer.cache_dequantized(True)
    layer.weight.data.zero_()  # is not read any more
    for found, value in zip(output_and_gradient(layer, x, grad), expected, strict=True):
        assert torch.equal(found, value)
    assert sum(matrix.nbytes for matrix in layer.cached_operands) == 2 * 192 * 128
    layer.cache_dequantized(False)
    assert not torch.equal(output_and_gradient(layer, x, grad)[1], expected[1])  # it is read again


def test_evaluation_is_that_of_the_compute_dtype(layer, linear4bit):
    x, grad = torch.randn(40, 128).bfloat16(), torch.randn(40, 192).bfloat16()
    expected = output_and_gradient(NF4Linear(linear4bit), x, grad)
    for found, value in zip(output_and_gradient(layer.eval(), x, grad), expected, strict=True):
        assert torch.equal(found, value)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.dequantized_weight(), layer.bias))


def loss_and_gradients(folder, batch: dict, dtype: torch.dtype, fp8: bool, recompute: bool = False):
    model = add_random_lora(load_quantized_model(str(folder), dtype), ["query_key_value", "dense"], dropout=0.1)
    replace_layers(model.train(), for_training=True, fp8=fp8)
    dropout_seed(model).fill_(1)
    for block in model.get_base_model().blocks:
        block.recompute_attention = block.recompute_mlp = recompute
    loss = model(**batch).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.eval()
    with torch.no_grad():
        return loss.item(), gradients, model(**batch).loss.item()


def test_gradients_of_a_model(golden_folder, cases):
    batch = {name: torch.tensor(cases["train_batch"][name]) for name in ("input_ids", "labels")}
    exact, half, found, again = (
        loss_and_gradients(golden_folder, batch, *how)
        for how in (
            (torch.float32, False),
            (torch.bfloat16, False),
            (torch.bfloat16, True),
            (torch.bfloat16, True, True),
        )
    )
    assert found[0] == pytest.approx(exact[0], abs=0.03) and found[0] != half[0]
    # The weights are random, and the residuals bf16: it is off by 0.28 itself. fp8 is by 0.40.
    assert relative_error(half[1], exact[1]) < 0.3 and relative_error(found[1], exact[1]) < 0.45
    assert torch.equal(again[1], found[1])  # recomputed
    assert found[2] == half[2]  # the evaluation
