"""Triton kernels on NF4 weights: dequantising in one pass over memory, and products with single rows.

bitsandbytes dequantises in three kernels (scales, offset, weights).
"""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

BLOCKS = 32  # of 64 weights that a program dequantises
FEATURES, BLOCKS_AT_ONCE = 4, 16  # outputs of a program that multiplies, and blocks of a row it takes at a time


@triton.jit
def load_scale(block, there, scale_codes, scale_table, scales_of_scales, offset):
    """The scales of blocks of 64 weights."""
    code = tl.load(scale_codes + block, mask=there, other=0).to(tl.int32)
    return tl.load(scale_table + code) * tl.load(scales_of_scales + block // 256, mask=there, other=0.0) + tl.load(
        offset
    )


@triton.jit
def dequantize_kernel(
    packed, weight, nf4, scale_codes, scale_table, scales_of_scales, offset, blocks, BLOCKS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    scale = load_scale(block, there, scale_codes, scale_table, scales_of_scales, offset)[:, None]
    pair = tl.load(packed + block[:, None] * 32 + tl.arange(0, 32)[None, :], mask=there[:, None], other=0).to(tl.int32)
    first, second = tl.load(nf4 + (pair >> 4)) * scale, tl.load(nf4 + (pair & 15)) * scale
    weights_at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(weight + weights_at, tl.interleave(first, second).to(weight.dtype.element_ty), mask=there[:, None])


@triton.jit
def matvec_kernel(
    rows, packed, bias, output, nf4, scale_codes, scale_table, scales_of_scales, offset, features, columns,
    HAS_BIAS: tl.constexpr, FEATURES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A few outputs of one row: its product with rows of the weight matrix, summed in fp32."""
    feature, row = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES), tl.program_id(1)
    real = feature < features
    accumulated = tl.zeros([FEATURES], tl.float32)
    for first_block in range(0, columns // 64, BLOCKS):
        block = first_block + tl.arange(0, BLOCKS)
        there = real[:, None] & (block < columns // 64)[None, :]
        block_at = feature[:, None] * (columns // 64) + block[None, :]
        scale = load_scale(block_at, there, scale_codes, scale_table, scales_of_scales, offset)
        byte = tl.arange(0, 32)
        pair = tl.load(packed + block_at[:, :, None] * 32 + byte[None, None, :], mask=there[:, :, None], other=0)
        pair = pair.to(tl.int32)
        at = row * columns + block[:, None] * 64 + byte[None, :] * 2
        mask = (block < columns // 64)[:, None] & (byte >= 0)[None, :]
        first, second = tl.load(rows + at, mask=mask, other=0.0), tl.load(rows + at + 1, mask=mask, other=0.0)
        products = tl.load(nf4 + (pair >> 4)) * first[None, :, :].to(tl.float32)
        products += tl.load(nf4 + (pair & 15)) * second[None, :, :].to(tl.float32)
        accumulated += tl.sum(tl.where(there, tl.sum(products, 2) * scale, 0.0), 1)
    if HAS_BIAS:
        accumulated += tl.load(bias + feature, mask=real, other=0.0).to(tl.float32)
    tl.store(output + row * features + feature, accumulated.to(output.dtype.element_ty), mask=real)


def scale_tensors(state: QuantState) -> tuple[torch.Tensor, ...]:
    """NF4's 16 values and what makes the scales."""
    return state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset


def dequantize(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """uint8 pairs -> [out_features, in_features] in `state.dtype`."""
    weight = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    blocks = weight.numel() // 64
    dequantize_kernel[(triton.cdiv(blocks, BLOCKS),)](packed, weight, *scale_tensors(state), blocks, BLOCKS=BLOCKS)
    return weight


def matvec(
    hidden_states: torch.Tensor, packed: torch.Tensor, state: QuantState, bias: torch.Tensor | None
) -> torch.Tensor:
    """[..., in_features] -> [..., out_features]; reads the weights once for every row."""
    features, columns = state.shape
    output = hidden_states.new_empty(*hidden_states.shape[:-1], features)
    matvec_kernel[(triton.cdiv(features, FEATURES), hidden_states.numel() // columns)](
        hidden_states.contiguous(),
        packed,
        bias,
        output,
        *scale_tensors(state),
        features,
        columns,
        HAS_BIAS=bias is not None,
        FEATURES=FEATURES,
        BLOCKS=BLOCKS_AT_ONCE,
    )
    return output
