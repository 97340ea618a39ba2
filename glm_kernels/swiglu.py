"""Triton kernels: the gated activation of an MLP, and its gradient.

Formula, for a token's vector x [2F], with gate = x[:F] and up = x[F:], in fp32:
    y = silu(gate) * up                     silu(g) = g * sigmoid(g)
    gate_grad = y_grad * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
    up_grad   = y_grad * silu(gate)

Shapes: T tokens, F features, BLOCK features of a program.
Reference: `chatglm2.activation.GatedActivation`.
Source: "GLU Variants Improve Transformer", section 2.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # features of a program


@triton.jit
def swiglu_kernel(x, y, features, BLOCK: tl.constexpr):
    """y for BLOCK features of one token of x [T, 2F] and y [T, F]."""
    token = tl.program_id(0).to(tl.int64)  # int64, because token * 2F may pass 2**31
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = index < features
    gate = tl.load(x + token * 2 * features + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(x + (token * 2 + 1) * features + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    result = gate * tl.sigmoid(gate) * up  # [BLOCK]
    tl.store(y + token * features + index, result.to(y.dtype.element_ty), mask=in_range)  # [BLOCK]


@triton.jit
def swiglu_grad_kernel(x, y_grad, x_grad, features, BLOCK: tl.constexpr):
    """Gradient of x [T, 2F] for BLOCK features of one token; y_grad is [T, F]."""
    token = tl.program_id(0).to(tl.int64)  # int64, because token * 2F may pass 2**31
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = index < features
    gate_offsets, up_offsets = token * 2 * features + index, (token * 2 + 1) * features + index
    gate = tl.load(x + gate_offsets, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(x + up_offsets, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    grad = tl.load(y_grad + token * features + index, mask=in_range, other=0.0).to(tl.float32)  # [BLOCK]
    sigmoid = tl.sigmoid(gate)  # [BLOCK]
    gate_grad = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))  # [BLOCK]
    tl.store(x_grad + gate_offsets, gate_grad.to(x_grad.dtype.element_ty), mask=in_range)  # [BLOCK]
    tl.store(x_grad + up_offsets, (grad * gate * sigmoid).to(x_grad.dtype.element_ty), mask=in_range)  # [BLOCK]


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half; [..., 2F] -> [..., F]."""
    x, features = x.contiguous(), x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], features)
    swiglu_kernel[grid_of(x)](x, y, features, BLOCK=BLOCK, num_warps=4)
    return y


def swiglu_grad(x: torch.Tensor, y_grad: torch.Tensor) -> torch.Tensor:
    """Gradient of `swiglu`: x [..., 2F], contiguous, and the gradient of its output [..., F] -> [..., 2F]."""
    y_grad, x_grad = y_grad.contiguous(), torch.empty_like(x)
    swiglu_grad_kernel[grid_of(x)](x, y_grad, x_grad, x.shape[-1] // 2, BLOCK=BLOCK, num_warps=4)
    return x_grad


def grid_of(x: torch.Tensor) -> tuple[int, int]:
    """Programs for x [..., 2F]: one for BLOCK features of each token."""
    return x.numel() // x.shape[-1], triton.cdiv(x.shape[-1] // 2, BLOCK)
