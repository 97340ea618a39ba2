"""The product of a few tokens with an NF4 weight, by the CUDA kernel in nf4_linear.cu.

Reference: `torch.nn.functional.linear` with the weight of `glm_kernels.nf4.dequantize`.
"""

import functools
import math
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState

from glm_kernels.cuda_kernel import CudaKernel

SOURCE = Path(__file__).with_suffix(".cu")
THREADS = 256  # of a program, as in the source
# Tokens of a tile -> its rows, the blocks of a row that a warp takes at a time, and the programs that a multiprocessor
# has registers for; from measurements.
TILES = {8: (16, 4, 2), 16: (16, 2, 2), 32: (32, 2, 1), 64: (32, 1, 1)}
MOST_TOKENS = max(TILES)
LEAST_FEATURES = 64 * max(blocks for _, blocks, _ in TILES.values())  # of the input: a warp has that many blocks


def kernel_of(tokens: int, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The name of the kernel for a tile of `tokens` tokens, and the macros to compile it with."""
    arguments = ", ".join(map(str, (tokens, *TILES[tokens])))
    return f"nf4_linear<{arguments}>", {"TYPE": '"bf16"' if dtype == torch.bfloat16 else '"f16"'}


@functools.cache
def compiled(tokens: int, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    """The kernel for a tile of `tokens` tokens, compiled for the device."""
    with torch.cuda.device(device):
        return CudaKernel(SOURCE, *kernel_of(tokens, dtype), THREADS)


def nf4_linear(x: torch.Tensor, packed: torch.Tensor, state: QuantState, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias

    Args:
        x: [T, C_in], contiguous, bf16 or fp16, with at most MOST_TOKENS tokens; C_in is a multiple of 64, and at least
            LEAST_FEATURES.
        packed: uint8, the weight [C_out, C_in], as for `glm_kernels.nf4.dequantize`.
        state: of the weight.
        bias: [C_out], in the dtype of `x`; or None.
    Returns:
        [T, C_out], in the dtype of `x`.
    """
    (rows, columns), tokens = state.shape, len(x)
    output = x.new_empty(tokens, rows)
    tile = min(size for size in TILES if size >= tokens)
    kernel = compiled(tile, x.dtype, x.device)
    programs = min(math.ceil(rows / TILES[tile][0]), kernel.most_programs)
    scales = (state.absmax, state.state2.code, state.state2.absmax, state.offset)
    kernel(
        programs, x, packed, state.code, *scales, x if bias is None else bias, output,
        tokens, rows, columns // 64, int(bias is not None),
    )  # fmt: skip
    return output
