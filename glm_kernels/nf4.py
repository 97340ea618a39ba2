"""Triton kernel: dequantizes NF4 weights with double quantization, in one pass over memory; bitsandbytes takes three.

Formula, for weight i of the flattened matrix; 64 weights share a scale, 256 scales share a second scale:
    block     = i // 64
    scale     = scale_table[scale_codes[block]] * scales_of_scales[block // 256] + offset
    weight[i] = nf4[code of weight i] * scale
Byte j of `packed` holds the 4-bit codes of weight 2j (upper bits) and weight 2j + 1 (lower bits).

Shapes: `blocks` blocks of 64 weights in the matrix, BLOCKS of them a program. In uint8: packed [blocks, 32] and
scale_codes [blocks]. In fp32: scales_of_scales [blocks / 256, rounded up], scale_table [256], nf4 [16], offset [].
Reference: `bitsandbytes.functional.dequantize_4bit`; the test asks for equal bits.
Source: "QLoRA: Efficient Finetuning of Quantized LLMs", section 3; the layout of `bitsandbytes.functional.QuantState`.
"""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

BLOCKS = 32  # blocks of 64 weights that a program dequantizes


@triton.jit
def dequantize_blocks(packed, nf4, scale_codes, scale_table, scales_of_scales, offset, block, in_range):
    """The weights [N, 64] of the blocks `block` [N], fp32; `in_range` [N] says which of them there are."""
    scale_code = tl.load(scale_codes + block, mask=in_range, other=0).to(tl.int32)  # [N]
    scale = tl.load(scale_table + scale_code)  # [N]
    scale = scale * tl.load(scales_of_scales + block // 256, mask=in_range, other=0.0)  # [N]
    scale = (scale + tl.load(offset))[:, None]  # [N, 1], offset: scalar
    pair_pointers = packed + block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(pair_pointers, mask=in_range[:, None], other=0).to(tl.int32)  # [N, 32]
    first, second = tl.load(nf4 + (pair >> 4)) * scale, tl.load(nf4 + (pair & 15)) * scale  # [N, 32] each
    return tl.interleave(first, second)  # [N, 64]


@triton.jit
def dequantize_kernel(
    packed, weight, nf4, scale_codes, scale_table, scales_of_scales, offset, blocks, BLOCKS: tl.constexpr
):
    """Weights of BLOCKS blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    in_range = block < blocks
    weights = dequantize_blocks(
        packed, nf4, scale_codes, scale_table, scales_of_scales, offset, block, in_range
    )  # [BLOCKS, 64]
    weight_offsets = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(weight + weight_offsets, weights.to(weight.dtype.element_ty), mask=in_range[:, None])  # [BLOCKS, 64]


def dequantize(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The weight matrix, equal to the bit to that of `bitsandbytes.functional.dequantize_4bit`.

    Args:
        packed: uint8, two weights a byte, contiguous, as in `Linear4bit.weight`.
        state: of NF4 with double quantization, 64 weights a scale and 256 scales a second scale.
    Returns:
        [out_features, in_features] in `state.dtype`; in_features is a multiple of 64.
    """
    weight = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    blocks = weight.numel() // 64
    # In QuantState, absmax holds the 8-bit codes of the scales, and state2 what they are dequantized with.
    scales = (state.absmax, state.state2.code, state.state2.absmax, state.offset)
    grid = (triton.cdiv(blocks, BLOCKS),)
    # bitsandbytes rounds each scale's product before it adds the offset; a fused multiply-add would not.
    constants = {"BLOCKS": BLOCKS, "enable_fp_fusion": False}
    dequantize_kernel[grid](packed, weight, state.code, *scales, blocks, **constants)
    return weight
