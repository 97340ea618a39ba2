"""Triton kernel: dequantising NF4 weights in one pass over memory, where bitsandbytes takes three kernels."""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState

from glm_kernels.launch import launch

BLOCKS = 32  # of 64 weights that a program dequantises


@triton.jit
def dequantize_kernel(
    packed, weight, nf4, scale_codes, scale_table, scales_of_scales, offset, blocks, BLOCKS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    scale_code = tl.load(scale_codes + block, mask=there, other=0).to(tl.int32)
    scale = tl.load(scale_table + scale_code) * tl.load(scales_of_scales + block // 256, mask=there, other=0.0)
    scale = (scale + tl.load(offset))[:, None]
    pair = tl.load(packed + block[:, None] * 32 + tl.arange(0, 32)[None, :], mask=there[:, None], other=0).to(tl.int32)
    first, second = tl.load(nf4 + (pair >> 4)) * scale, tl.load(nf4 + (pair & 15)) * scale
    weights_at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(weight + weights_at, tl.interleave(first, second).to(weight.dtype.element_ty), mask=there[:, None])


def dequantize(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """uint8 pairs -> [out_features, in_features] in `state.dtype`."""
    weight = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    blocks = weight.numel() // 64
    scales = (state.absmax, state.state2.code, state.state2.absmax, state.offset)
    grid = (triton.cdiv(blocks, BLOCKS),)
    launch(dequantize_kernel, grid, packed, weight, state.code, *scales, blocks, BLOCKS=BLOCKS)
    return weight
