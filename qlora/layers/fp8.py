"""Frozen 4-bit linear layers whose matrix products take 8-bit operands while the model is trained.

    x @ W.T        and, for the gradient of x,        G @ W

Each operand is quantized to e4m3 with a scale for each of its rows (glm_kernels/fp8.py): the activation x and the
gradient G where they are used, W and W.T from the NF4 weight there, or once by `cache_dequantized`. "FP8" in
docs/performance.md says why gradients are e4m3, too, and why sums are accumulated in the fast way. An evaluation
computes in the compute dtype, as inference does: it is the loss of the model that the adapter is used with.

Shapes: T tokens (all leading dimensions together), C_in and C_out features.
"""

from types import ModuleType

import torch
from bitsandbytes.nn import Linear4bit
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from glm_kernels import fp8_reference
from glm_kernels.fp8_reference import row_scales
from qlora.layers.linear import NF4Linear
from qlora.layers.nf4 import kernel_supports


def fp8_operations(use_kernels: bool) -> ModuleType:
    """The module with `quantize_rows` and `quantize_weight`."""
    if use_kernels:
        from glm_kernels import fp8

        return fp8
    return fp8_reference


def scaled_product(
    x: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight.T + bias

    Args:
        x: [T, M] or [B, T, M], bf16.
        weight: [N, M], e4m3.
        weight_scales: [N, 1], fp32.
        bias: [N], bf16.
    Returns:
        [T, N], bf16.
    """
    x, by_row = x.flatten(0, -2).contiguous(), ScalingType.RowWise  # [T, M]
    quantized, scales = fp8_operations(x.is_cuda).quantize_rows(x)  # [T, M], [T, 1]
    return F.scaled_mm(
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


class FP8Linear(NF4Linear):
    """An `NF4Linear` whose products take e4m3 operands in training."""

    def __init__(self, layer: Linear4bit):
        super().__init__(layer)
        weight = super().dequantized_weight()
        self.scales, self.transposed_scales = row_scales(weight), row_scales(weight.T)  # [C_out, 1], [C_in, 1]
        self.cached_operands: tuple[torch.Tensor, torch.Tensor] | None = None

    def cache_dequantized(self, enabled: bool):
        """Makes both e4m3 matrices once, together 2 bytes a weight beside half a byte; or where they are used."""
        self.cached_operands = (self.quantized_weight(False), self.quantized_weight(True)) if enabled else None

    def quantized_weight(self, transposed: bool) -> torch.Tensor:
        """W [C_out, C_in], or W.T, in e4m3."""
        if self.cached_operands is not None:
            return self.cached_operands[transposed]
        packed, state = self.weight.data, self.weight.quant_state
        scales = self.transposed_scales if transposed else self.scales
        return fp8_operations(kernel_supports(packed, state)).quantize_weight(packed, state, scales, transposed)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W.T + bias; [..., C_in] -> [..., C_out]."""
        if not self.training:
            return super().multiply(x)
        product = scaled_product(x, self.quantized_weight(transposed=False), self.scales, self.bias)
        return product.view(*x.shape[:-1], -1)

    def multiply_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """G @ W; [..., C_out] -> [..., C_in]."""
        if not self.training:
            return super().multiply_gradient(grad)
        product = scaled_product(grad, self.quantized_weight(transposed=True), self.transposed_scales)
        return product.view(*grad.shape[:-1], -1)
