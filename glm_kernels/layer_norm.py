"""Triton kernels: layer norm, and its gradient joined with that of the residual.

Formula, for each vector x [C]; means are over C, statistics in fp32:
    x_hat   = (x - mean(x)) * rstd          rstd = 1 / sqrt(mean((x - mean(x)) ** 2) + eps)
    norm(x) = x_hat * weight + bias
Gradient of x in sum = residual_scale * norm(x) + branch(norm(x)); weight and bias are frozen:
    x_hat_grad = (branch_grad + residual_scale * sum_grad) * weight
    x_grad     = (x_hat_grad - mean(x_hat_grad) - x_hat * mean(x_hat_grad * x_hat)) * rstd

Shapes: C hidden size, BLOCK = C rounded up to a power of 2. One program a vector.
Reference: `torch.nn.functional.layer_norm` and its autograd.
Source: "Layer Normalization", section 3.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def normalize(x, index, hidden_size, eps, BLOCK: tl.constexpr):
    """x_hat [BLOCK] and rstd (scalar) of one vector, fp32; x_hat is zero where index >= C."""
    in_range = index < hidden_size
    value = tl.load(x + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    # Zero beyond C, so that those elements do not count in the variance.
    centred = tl.where(in_range, value - tl.sum(value, 0) / hidden_size, 0.0)  # [BLOCK], sum: scalar
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / hidden_size + eps)  # scalar
    return centred * rstd, rstd


@triton.jit
def norm_kernel(x, weight, bias, output, eps, hidden_size, BLOCK: tl.constexpr):
    """output = norm(x) for one vector."""
    offset = tl.program_id(0).to(tl.int64) * hidden_size  # of the vector
    index = tl.arange(0, BLOCK)
    in_range = index < hidden_size
    x_hat, _ = normalize(x + offset, index, hidden_size, eps, BLOCK)  # [BLOCK]
    w = tl.load(weight + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    b = tl.load(bias + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(output + offset + index, (x_hat * w + b).to(output.dtype.element_ty), mask=in_range)  # [BLOCK]


@triton.jit
def norm_grad_kernel(x, weight, branch_grad, sum_grad, x_grad, eps, residual_scale, hidden_size, BLOCK: tl.constexpr):
    """Gradient of one vector x in sum = residual_scale * norm(x) + branch(norm(x))."""
    offset = tl.program_id(0).to(tl.int64) * hidden_size  # of the vector
    index = tl.arange(0, BLOCK)
    in_range = index < hidden_size
    x_hat, rstd = normalize(x + offset, index, hidden_size, eps, BLOCK)  # [BLOCK], scalar
    from_branch = tl.load(branch_grad + offset + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    from_sum = tl.load(sum_grad + offset + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    w = tl.load(weight + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    x_hat_grad = (from_branch + residual_scale * from_sum) * w  # [BLOCK]
    mean_product = tl.sum(x_hat_grad * x_hat, 0) / hidden_size  # scalar
    result = (x_hat_grad - tl.sum(x_hat_grad, 0) / hidden_size - x_hat * mean_product) * rstd  # [BLOCK], sum: scalar
    tl.store(x_grad + offset + index, result.to(x_grad.dtype.element_ty), mask=in_range)  # [BLOCK]


def layer_norm(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """Layer norm over the last dimension.

    Args:
        x: [..., C].
        norm: its weight and bias are [C].
    Returns:
        [..., C], in the dtype of `x`.
    """
    x, hidden_size = x.contiguous(), x.shape[-1]
    output = torch.empty_like(x)
    block = triton.next_power_of_2(hidden_size)
    grid = (x.numel() // hidden_size,)
    norm_kernel[grid](x, norm.weight, norm.bias, output, norm.eps, hidden_size, BLOCK=block, num_warps=8)
    return output


def residual_norm_grad(
    x: torch.Tensor,
    norm: torch.nn.LayerNorm,
    branch_grad: torch.Tensor,
    sum_grad: torch.Tensor,
    residual_scale: float,
) -> torch.Tensor:
    """Gradient of x in sum = residual_scale * norm(x) + branch(norm(x)).

    Args:
        x: [..., C], contiguous.
        norm: frozen; its weight is [C].
        branch_grad: [..., C], gradient of the branch's input, norm(x).
        sum_grad: [..., C], gradient of the sum.
        residual_scale: factor of norm(x) in the sum.
    Returns:
        [..., C], in the dtype of `x`.
    """
    hidden_size = x.shape[-1]
    x_grad = torch.empty_like(x)
    branch_grad, sum_grad = branch_grad.contiguous(), sum_grad.contiguous()
    block = triton.next_power_of_2(hidden_size)
    norm_grad_kernel[(x.numel() // hidden_size,)](
        x, norm.weight, branch_grad, sum_grad, x_grad, norm.eps,
        residual_scale, hidden_size, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return x_grad
