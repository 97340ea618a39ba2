"""Triton kernels: RMS norm, and its gradient joined with that of the residual.

Formula, for each vector x [C]; the mean is over C, and everything is in fp32:
    x_hat   = x * rstd          rstd = 1 / sqrt(mean(x ** 2) + eps)
    norm(x) = x_hat * weight
Gradient of x in sum = x + branch(norm(x)); weight is frozen:
    x_hat_grad = branch_grad * weight
    x_grad     = sum_grad + (x_hat_grad - x_hat * mean(x_hat_grad * x_hat)) * rstd

Shapes: C hidden size, BLOCK = C rounded up to a power of 2. One program a vector.
Reference: `chatglm2.modeling_chatglm2.RMSNorm` and its autograd.
Source: "Root Mean Square Layer Normalization", section 3.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def normalize(x, index, hidden_size, eps, BLOCK: tl.constexpr):
    """x_hat [BLOCK] and rstd (scalar) of one vector, fp32; x_hat is zero where index >= C."""
    value = tl.load(x + index, mask=index < hidden_size, other=0.0).to(tl.float32)  # [BLOCK]
    rstd = tl.rsqrt(tl.sum(value * value, 0) / hidden_size + eps)  # scalar
    return value * rstd, rstd


@triton.jit
def rms_norm_kernel(x, weight, output, eps, hidden_size, BLOCK: tl.constexpr):
    """output = norm(x) for one vector."""
    offset = tl.program_id(0).to(tl.int64) * hidden_size  # of the vector
    index = tl.arange(0, BLOCK)
    in_range = index < hidden_size
    x_hat, _ = normalize(x + offset, index, hidden_size, eps, BLOCK)  # [BLOCK]
    w = tl.load(weight + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(output + offset + index, (x_hat * w).to(output.dtype.element_ty), mask=in_range)  # [BLOCK]


@triton.jit
def rms_norm_grad_kernel(x, weight, branch_grad, sum_grad, x_grad, eps, hidden_size, BLOCK: tl.constexpr):
    """Gradient of one vector x in sum = x + branch(norm(x))."""
    offset = tl.program_id(0).to(tl.int64) * hidden_size  # of the vector
    index = tl.arange(0, BLOCK)
    in_range = index < hidden_size
    x_hat, rstd = normalize(x + offset, index, hidden_size, eps, BLOCK)  # [BLOCK], scalar
    from_branch = tl.load(branch_grad + offset + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    from_sum = tl.load(sum_grad + offset + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    w = tl.load(weight + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    x_hat_grad = from_branch * w  # [BLOCK]
    mean_product = tl.sum(x_hat_grad * x_hat, 0) / hidden_size  # scalar
    result = from_sum + (x_hat_grad - x_hat * mean_product) * rstd  # [BLOCK]
    tl.store(x_grad + offset + index, result.to(x_grad.dtype.element_ty), mask=in_range)  # [BLOCK]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension.

    Args:
        x: [..., C].
        weight: [C].
        eps: added to the mean of the squares.
    Returns:
        [..., C], in the dtype of `x`.
    """
    x, hidden_size = x.contiguous(), x.shape[-1]
    output = torch.empty_like(x)
    block = triton.next_power_of_2(hidden_size)
    grid = (x.numel() // hidden_size,)
    rms_norm_kernel[grid](x, weight, output, eps, hidden_size, BLOCK=block, num_warps=8)
    return output


def rms_norm_grad(
    x: torch.Tensor, weight: torch.Tensor, eps: float, branch_grad: torch.Tensor, sum_grad: torch.Tensor
) -> torch.Tensor:
    """Gradient of x in sum = x + branch(norm(x)).

    Args:
        x: [..., C], contiguous.
        weight: [C], frozen.
        eps: as for `rms_norm`.
        branch_grad: [..., C], gradient of the branch's input, norm(x).
        sum_grad: [..., C], gradient of the sum.
    Returns:
        [..., C], in the dtype of `x`.
    """
    hidden_size = x.shape[-1]
    x_grad = torch.empty_like(x)
    branch_grad, sum_grad = branch_grad.contiguous(), sum_grad.contiguous()
    block = triton.next_power_of_2(hidden_size)
    rms_norm_grad_kernel[(x.numel() // hidden_size,)](
        x, weight, branch_grad, sum_grad, x_grad, eps, hidden_size,
        BLOCK=block, num_warps=8,
    )  # fmt: skip
    return x_grad
