"""Fast arithmetic on NF4 weights with doubly quantised scales; `glm_kernels.nf4` has what runs on a GPU.

A block of 64 weights shares a scale; 256 scales share a second scale:
    weight = NF4[nibble] * (code[scale_code] * scale_of_scales + offset)
Source: "QLoRA: Efficient Finetuning of Quantized LLMs", section 3; the layout of bitsandbytes' `QuantState`.
"""

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch.nn import functional as F

BLOCK = 64  # weights that share a scale


def kernels_know(packed: torch.Tensor, state: QuantState) -> bool:
    """On a GPU, in the usual layout: scales doubly quantised, a row of whole blocks."""
    return packed.is_cuda and state.nested and state.blocksize == BLOCK and state.shape[1] % BLOCK == 0


def dequantize(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The weight matrix in its 16- or 32-bit type, the same to the bit as bitsandbytes makes it.

    Args:
        packed: uint8, two weights a byte, as in `Linear4bit.weight`.
        state: its quantisation state.
    Returns:
        [out_features, in_features] in `state.dtype`.
    """
    packed = packed.data  # as a plain tensor: what is asked of a Params4bit goes through Python
    if not kernels_know(packed, state):
        return bitsandbytes.functional.dequantize_4bit(packed, state)
    from glm_kernels import nf4

    return nf4.dequantize(packed, state)


def dequantized_weight(layer: Linear4bit) -> torch.Tensor:
    """[out_features, in_features] in the compute type: made on the spot, unless `cache_dequantized` made it before."""
    kept = getattr(layer, "cached_weight", None)
    return dequantize(layer.weight, layer.weight.quant_state) if kept is None else kept


def cache_dequantized(layer: Linear4bit):
    """Dequantises a layer once and for all: 2 bytes a weight instead of half a byte, and no work later."""
    layer.cached_weight = dequantize(layer.weight, layer.weight.quant_state)


def linear(layer: Linear4bit, hidden_states: torch.Tensor) -> torch.Tensor:
    """The layer's output, without gradients: for a single row straight from the packed weights."""
    if hidden_states.numel() == layer.in_features:
        return bitsandbytes.matmul_4bit(
            hidden_states, layer.weight.t(), bias=layer.bias, quant_state=layer.weight.quant_state
        )
    return F.linear(hidden_states, dequantized_weight(layer), layer.bias)
