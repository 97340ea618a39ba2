"""NF4 weights with doubly quantized scales, dequantized or multiplied by a kernel where it can run.

A block of 64 weights shares a scale; 256 scales share a second scale:
    weight = NF4[4-bit code] * (code[8-bit scale code] * second scale + offset)
Source: "QLoRA: Efficient Finetuning of Quantized LLMs", section 3; the layout of bitsandbytes' `QuantState`.
"""

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState

from glm_kernels import kernels_supported
from glm_kernels.cuda_kernel import can_compile
from glm_kernels.nf4_linear import LEAST_FEATURES, MOST_TOKENS, nf4_linear

BLOCK = 64  # weights that share a scale


def kernel_supports(packed: torch.Tensor, state: QuantState) -> bool:
    """Whether the kernels can read this layout: on a GPU, NF4, scales doubly quantized, rows of whole blocks."""
    is_nf4 = state.quant_type == "nf4" and state.nested and state.blocksize == BLOCK
    return packed.is_cuda and is_nf4 and state.shape[1] % BLOCK == 0


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


def packed_linear(
    hidden_states: torch.Tensor, packed: torch.Tensor, state: QuantState, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """hidden_states @ weight.T + bias for a few tokens, with the packed weight, without gradients.

    Args:
        hidden_states: [..., in_features].
        packed, state: as for `dequantize`.
        bias: [out_features], or None.
    Returns:
        [..., out_features]; None where dequantizing the weight and multiplying with it is faster.
    """
    _, in_features = state.shape
    tokens = hidden_states.numel() // in_features
    fits = tokens <= MOST_TOKENS and in_features >= LEAST_FEATURES
    if fits and kernels_supported(hidden_states) and kernel_supports(packed, state) and can_compile():
        x = hidden_states.reshape(tokens, in_features).contiguous()
        output = nf4_linear(x, packed.data, state, bias)
        return output.view(*hidden_states.shape[:-1], -1)
    if tokens == 1:
        return bitsandbytes.matmul_4bit(hidden_states, packed.t(), bias=bias, quant_state=state)
    return None
