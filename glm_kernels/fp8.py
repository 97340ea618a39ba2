"""Triton kernels: 8-bit operands of matrix products, from activations, gradients and NF4 weights.

Formula, for each row x [N] of a matrix; e4m3 has 4 bits of exponent, 3 of mantissa, and numbers up to LARGEST:
    scale = max(|x|) / LARGEST          quantized = e4m3(x / scale), to the nearest, ties to even
The product of two such matrices, summed in fp32, is scaled afterwards, an element by the scales of its row and column:
    x @ W.T = (quantized x @ (quantized W).T) * scale of x [T, 1] * scale of W [1, C_out]
Scales cannot vary along the summed dimension, so a gradient's product with W takes another matrix: the rows of W.T.

Shapes: T tokens, N features of an activation or a gradient, BLOCK = N rounded up to a power of 2. W is
[C_out, C_in], its NF4 blocks as in `glm_kernels.nf4`; a program converts one block of 64 columns in ROWS rows.
Reference: `glm_kernels.fp8_reference`.
Source: "FP8 Formats for Deep Learning", sections 3 and 4.
"""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

from glm_kernels.fp8_reference import LARGEST, SMALLEST
from glm_kernels.nf4 import dequantize_blocks

ROWS = 128  # of W that a program converts


@triton.jit
def quantize_rows_kernel(
    x, quantized, scales, features, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of x."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    in_range = feature < features
    value = tl.load(x + row * features + feature, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    largest = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST)  # scalar
    scale = tl.div_rn(largest, LARGEST)  # as PyTorch divides; `/` may be off by two units in the last place
    tl.store(scales + row, scale)
    rounded = (value * tl.div_rn(1.0, scale)).to(tl.float8e4nv)  # [BLOCK]
    tl.store(quantized + row * features + feature, rounded, mask=in_range)


@triton.jit
def quantize_weight_kernel(
    packed, e4m3_weight, nf4, scale_codes, scale_table, scales_of_scales, offset, row_scales, outputs, blocks_per_row,
    row_stride, column_stride, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """e4m3_weight = e4m3(W / scale of its row, or its column), for ROWS rows and 64 columns of W; any strides."""
    column_block = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = column_block * 64 + tl.arange(0, 64)
    in_range = row < outputs
    block = row.to(tl.int64) * blocks_per_row + column_block  # [ROWS]
    values = dequantize_blocks(
        packed, nf4, scale_codes, scale_table, scales_of_scales, offset, block, in_range
    )  # [ROWS, 64]
    if TRANSPOSED:
        values *= tl.div_rn(1.0, tl.load(row_scales + column))[None, :]  # [1, 64]
    else:
        values *= tl.div_rn(1.0, tl.load(row_scales + row, mask=in_range, other=1.0))[:, None]  # [ROWS, 1]
    offsets = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    tl.store(e4m3_weight + offsets, values.to(tl.float8e4nv), mask=in_range[:, None])  # [ROWS, 64]


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in e4m3, and the scales of its rows.

    Args:
        x: [T, N], contiguous.
    Returns:
        [T, N], float8_e4m3fn, and [T, 1], fp32.
    """
    tokens, features = x.shape
    quantized = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(tokens, 1, dtype=torch.float32)
    block = triton.next_power_of_2(features)
    warps = min(max(block // 1024, 4), 32)
    if tokens:
        quantize_rows_kernel[(tokens,)](x, quantized, scales, features, LARGEST, SMALLEST, block, num_warps=warps)
    return quantized, scales


def quantize_weight(packed: torch.Tensor, state: QuantState, scales: torch.Tensor, transposed: bool) -> torch.Tensor:
    """An NF4 weight matrix W in e4m3, or its transpose, divided by the scales of the rows.

    Args:
        packed, state: of W, see `glm_kernels.nf4.dequantize`.
        scales: fp32, [C_out, 1], or [C_in, 1] for the transpose.
        transposed: whether the result is W.T.
    Returns:
        [C_out, C_in] or [C_in, C_out], float8_e4m3fn.
    """
    outputs, inputs = state.shape
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    weight = torch.empty(shape, dtype=torch.float8_e4m3fn, device=packed.device)
    strides = (1, outputs) if transposed else (inputs, 1)
    nested = (state.absmax, state.state2.code, state.state2.absmax, state.offset)
    grid = (inputs // 64, triton.cdiv(outputs, ROWS))
    # As for `glm_kernels.nf4.dequantize`: with a fused multiply-add scales would differ from those of bitsandbytes.
    constants = {"TRANSPOSED": transposed, "ROWS": ROWS, "enable_fp_fusion": False}
    quantize_weight_kernel[grid](
        packed, weight, state.code, *nested, scales, outputs, inputs // 64, *strides, **constants
    )
    return weight
