"""Triton kernels: layer norm, and its gradient joined with that of the residual beside it.

One program a row of C columns; the statistics are fp32.
"""

import torch
import triton
import triton.language as tl

from glm_kernels.launch import launch


@triton.jit
def normalize(row, index, columns, eps, BLOCK: tl.constexpr):
    """A row without mean and deviation, and 1 / deviation; zeros beyond its end."""
    there = index < columns
    value = tl.load(row + index, mask=there, other=0.0).to(tl.float32)
    centred = tl.where(there, value - tl.sum(value, 0) / columns, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / columns + eps)
    return centred * scale, scale


@triton.jit
def norm_kernel(rows, weight, bias, output, eps, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    index = tl.arange(0, BLOCK)
    there = index < columns
    normed, _ = normalize(rows + row, index, columns, eps, BLOCK)
    scale = tl.load(weight + index, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + index, mask=there, other=0.0).to(tl.float32)
    tl.store(output + row + index, (normed * scale + shift).to(output.dtype.element_ty), mask=there)


@triton.jit
def norm_grad_kernel(rows, weight, branch_grad, sum_grad, grad, eps, residual_scale, columns, BLOCK: tl.constexpr):
    """Gradient of x in `residual_scale * norm(x) + branch(norm(x))`."""
    row = tl.program_id(0).to(tl.int64) * columns
    index = tl.arange(0, BLOCK)
    there = index < columns
    normed, inverse_deviation = normalize(rows + row, index, columns, eps, BLOCK)
    by_branch = tl.load(branch_grad + row + index, mask=there, other=0.0).to(tl.float32)
    by_sum = tl.load(sum_grad + row + index, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + index, mask=there, other=0.0).to(tl.float32)
    wanted = (by_branch + residual_scale * by_sum) * scale
    along = tl.sum(wanted * normed, 0) / columns
    result = (wanted - tl.sum(wanted, 0) / columns - normed * along) * inverse_deviation
    tl.store(grad + row + index, result.to(grad.dtype.element_ty), mask=there)


def layer_norm(rows: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """[..., C] -> [..., C] in the type of `rows`."""
    rows, columns = rows.contiguous(), rows.shape[-1]
    output = torch.empty_like(rows)
    block = triton.next_power_of_2(columns)
    grid = (rows.numel() // columns,)
    launch(norm_kernel, grid, rows, norm.weight, norm.bias, output, norm.eps, columns, BLOCK=block, num_warps=8)
    return output


def residual_norm_grad(
    rows: torch.Tensor, norm: torch.nn.LayerNorm, branch_grad: torch.Tensor, sum_grad: torch.Tensor, scale: float
) -> torch.Tensor:
    """Gradient of x in `sum = scale * norm(x) + branch(norm(x))`.

    Args:
        rows: x, [..., C].
        norm: its weight and bias are constant.
        branch_grad: [..., C], gradient of the branch's input.
        sum_grad: [..., C], gradient of the sum.
        scale: of the residual.
    """
    columns = rows.shape[-1]
    grad = torch.empty_like(rows)
    branch_grad, sum_grad = branch_grad.contiguous(), sum_grad.contiguous()
    block = triton.next_power_of_2(columns)
    launch(
        norm_grad_kernel, (rows.numel() // columns,), rows, norm.weight, branch_grad, sum_grad, grad, norm.eps, scale,
        columns, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return grad
