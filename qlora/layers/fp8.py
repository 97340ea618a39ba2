"""Frozen 4-bit linear layers whose matrix products take 8-bit operands while the model is trained.

    x @ W.T        and, for the gradient of x,        G @ W

Each operand is quantized to e4m3 with a scale for each of its rows (glm_kernels/fp8.py): the activation x and the
gradient G where they are used, W and W.T from the NF4 weight there, or once by `cache_dequantized`. An evaluation
computes in the compute dtype, as inference does: it is the loss of the model that the adapter is used with.

Shapes: T tokens (all leading dimensions together), C_in and C_out features.
"""

import torch
from bitsandbytes.nn import Linear4bit
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from qlora.layers.linear import NF4Linear
from qlora.layers.nf4 import kernel_supports

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST = 1e-30  # that the largest value of a row counts as: a row of zeros has a scale, too


def row_scales(matrix: torch.Tensor) -> torch.Tensor:
    """[N, 1], fp32: what the largest value of each row [N, M] is divided by to be the largest of e4m3."""
    return matrix.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST) / LARGEST


def quantized_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous matrix [N, M] in e4m3, and the scales of its rows [N, 1], fp32."""
    if matrix.is_cuda:
        from glm_kernels.fp8 import quantize_rows

        return quantize_rows(matrix)
    scales = row_scales(matrix)
    return (matrix.float() * (1 / scales)).to(E4M3), scales


def scaled_product(
    x: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight.T + bias

    Args:
        x: [..., M], bf16.
        weight: [N, M], e4m3.
        weight_scales: [N, 1], fp32.
        bias: [N], bf16.
    Returns:
        [..., N], bf16.
    """
    quantized, scales = quantized_rows(x.flatten(0, -2).contiguous())  # [T, M], [T, 1]
    by_row = ScalingType.RowWise
    product = F.scaled_mm(
        quantized,
        weight.T,
        scales,
        by_row,
        weight_scales.T,
        by_row,
        bias=bias,
        output_dtype=x.dtype,
        use_fast_accum=True,
    )
    return product.view(*x.shape[:-1], -1)


class FP8Linear(NF4Linear):
    """An `NF4Linear` whose products take e4m3 operands in training."""

    def __init__(self, layer: Linear4bit):
        super().__init__(layer)
        weight = super().dequantized_weight()
        self.scales, self.transposed_scales = row_scales(weight), row_scales(weight.T)  # [C_out, 1], [C_in, 1]
        self.cached: tuple[torch.Tensor, torch.Tensor] | None = None

    def cache_dequantized(self):
        """Makes both e4m3 matrices once: together 2 bytes a weight instead of half a byte."""
        self.cached = self.quantized_weight(False), self.quantized_weight(True)

    def quantized_weight(self, transposed: bool) -> torch.Tensor:
        """W [C_out, C_in], or W.T, in e4m3."""
        if self.cached is not None:
            return self.cached[transposed]
        packed, state = self.weight.data, self.weight.quant_state
        scales = self.transposed_scales if transposed else self.scales
        if kernel_supports(packed, state):
            from glm_kernels.fp8 import quantize_weight

            return quantize_weight(packed, state, scales, transposed)
        weight = self.dequantized_weight()
        return ((weight.T if transposed else weight).float() * (1 / scales)).to(E4M3).contiguous()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W.T + bias; [..., C_in] -> [..., C_out]."""
        if not self.training:
            return super().multiply(x)
        return scaled_product(x, self.quantized_weight(transposed=False), self.scales, self.bias)

    def multiply_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """G @ W; [..., C_out] -> [..., C_in]."""
        if not self.training:
            return super().multiply_gradient(grad)
        return scaled_product(grad, self.quantized_weight(transposed=True), self.transposed_scales)
