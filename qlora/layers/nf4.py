"""NF4 weights with doubly quantized scales, dequantized by a Triton kernel where it can run.

A block of 64 weights shares a scale; 256 scales share a second scale:
    weight = NF4[4-bit code] * (code[8-bit scale code] * second scale + offset)
Source: "QLoRA: Efficient Finetuning of Quantized LLMs", section 3; the layout of bitsandbytes' `QuantState`.
"""

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState

BLOCK = 64  # weights that share a scale


def kernel_supports(packed: torch.Tensor, state: QuantState) -> bool:
    """Whether the kernel can read this layout: on a GPU, scales doubly quantized, rows of whole blocks."""
    return packed.is_cuda and state.nested and state.blocksize == BLOCK and state.shape[1] % BLOCK == 0


def dequantize(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The weight matrix, bit-equal to that of bitsandbytes.

    Args:
        packed: uint8, two weights a byte, as in `Linear4bit.weight`.
        state: its quantization state.
    Returns:
        [out_features, in_features] in `state.dtype`.
    """
    packed = packed.data  # a plain tensor: every attribute of a Params4bit is looked up in Python
    if not kernel_supports(packed, state):
        return bitsandbytes.functional.dequantize_4bit(packed, state)
    from glm_kernels import nf4

    return nf4.dequantize(packed, state)
