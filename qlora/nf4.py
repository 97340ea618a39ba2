"""Dequantising NF4 weights with doubly quantised scales in one pass over memory.

bitsandbytes needs three kernels for it (scales, offset, weights). The result here is the same to the bit.

A block of 64 weights shares a scale; 256 scales share a second scale:
    weight = NF4[nibble] * (code[scale_code] * scale_of_scales + offset)
Source: "QLoRA: Efficient Finetuning of Quantized LLMs", section 3; the layout of bitsandbytes' `QuantState`.
"""

import functools

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState

BLOCK = 64  # weights that share a scale
SCALES = 256  # scales that share a second scale


def dequantize(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The weight matrix in its 16- or 32-bit type.

    Args:
        packed: uint8, two weights a byte, as in `Linear4bit.weight`.
        state: its quantisation state, with double quantisation.
    Returns:
        [out_features, in_features] in `state.dtype`.
    """
    rows, columns = state.shape
    if not packed.is_cuda or columns % BLOCK or state.blocksize != BLOCK:
        return bitsandbytes.functional.dequantize_4bit(packed, state)
    weight = torch.empty(rows, columns, dtype=state.dtype, device=packed.device)
    blocks = weight.numel() // BLOCK
    kernel, blocks_per_program = triton_kernel()
    kernel[((blocks + blocks_per_program - 1) // blocks_per_program,)](
        *(packed, weight, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset, blocks),
        BLOCKS_PER_PROGRAM=blocks_per_program,
        num_warps=4,
    )
    return weight


@functools.cache
def triton_kernel():
    """Compiles nothing yet; imported late because a machine without a GPU may have no Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def dequantize_kernel(
        packed,
        weight,
        nf4,
        scale_codes,
        scale_table,
        scales_of_scales,
        offset,
        blocks,
        BLOCKS_PER_PROGRAM: tl.constexpr,
    ):
        block = tl.program_id(0).to(tl.int64) * BLOCKS_PER_PROGRAM + tl.arange(0, BLOCKS_PER_PROGRAM)
        there = block < blocks
        scale_code = tl.load(scale_codes + block, mask=there, other=0).to(tl.int32)
        scale = tl.load(scale_table + scale_code) * tl.load(scales_of_scales + block // 256, mask=there, other=0.0)
        scale = (scale + tl.load(offset))[:, None]
        bytes_at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
        pair = tl.load(packed + bytes_at, mask=there[:, None], other=0).to(tl.int32)
        first, second = tl.load(nf4 + (pair >> 4)) * scale, tl.load(nf4 + (pair & 15)) * scale
        weights_at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(weight + weights_at, tl.interleave(first, second).to(weight.dtype.element_ty), mask=there[:, None])

    return dequantize_kernel, 32
