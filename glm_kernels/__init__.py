"""Triton kernels. This file needs no Triton: it says where the kernels run, and the tile sizes that callers share."""

import torch

TILE = 64  # tokens that a program of the attention kernels works on


def kernels_supported(projected: torch.Tensor) -> bool:
    """The Triton kernels are for 16-bit numbers on Ampere GPUs and newer."""
    is_half = projected.dtype in (torch.bfloat16, torch.float16)
    return projected.is_cuda and is_half and torch.cuda.get_device_capability(projected.device) >= (8, 0)
