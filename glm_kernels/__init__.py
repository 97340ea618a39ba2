"""Kernels for training and running the models on NVIDIA GPUs, all but one of them in Triton.

This file does not import Triton: code that also runs without a GPU needs TILE and `kernels_supported` from it.

On a GPU older than Ampere, `dequantize` and `cross_entropy_in_place` run, which have no matrix products. For `tl.dot`
Triton uses no tensor cores there, and the gradients of the attention need more shared memory than such a GPU has:
PyTorch's operations take the place of the other kernels.
"""

import torch

# Tokens of one sample that a program of the attention kernels works on. `glm_shared.packed_attention` cuts the samples
# into tiles of this size.
TILE = 64


def kernels_supported(tensor: torch.Tensor) -> bool:
    """Whether the kernels of attention, norm, adapter and rotary positions are used for the tensor's device and dtype.

    Args:
        tensor: any shape; an activation or a weight.
    Returns:
        True for bf16 and fp16 on a GPU of compute capability 8.0 (Ampere) or newer.
    """
    is_half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.is_cuda and is_half and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
