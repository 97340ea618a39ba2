"""The functions of glm_kernels/fp8.py, with the same result, in PyTorch: for CPUs and other layouts of NF4 weights."""

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST = 1e-30  # that the largest value of a row counts as: a row of zeros has a scale, too


def row_scales(matrix: torch.Tensor) -> torch.Tensor:
    """[N, 1], fp32: what divides the rows of a matrix [N, M] so that each reaches the largest number of e4m3."""
    return matrix.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST) / LARGEST


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `glm_kernels.fp8.quantize_rows`."""
    scales = row_scales(x)
    return (x.float() * (1 / scales)).to(E4M3), scales


def quantize_weight(packed: torch.Tensor, state: QuantState, scales: torch.Tensor, transposed: bool) -> torch.Tensor:
    """See `glm_kernels.fp8.quantize_weight`; any `state` will do."""
    weight = bitsandbytes.functional.dequantize_4bit(packed, state).float()
    return ((weight.T if transposed else weight) * (1 / scales)).to(E4M3).contiguous()
