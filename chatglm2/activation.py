"""The gated activation of the MLP, which saves only its input for the backward pass.

Shapes: F features.
"""

import torch
from torch.nn import functional as F

from glm_kernels import kernels_supported


class GatedActivation(torch.autograd.Function):
    """silu(gate) * up, of x = (gate, up).

    Source: "GLU Variants Improve Transformer", section 2.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        """[..., 2F] -> [..., F]."""
        x = x.contiguous()
        ctx.save_for_backward(x)
        if kernels_supported(x):
            from glm_kernels.swiglu import swiglu

            return swiglu(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad_output):
        """[..., F] -> [..., 2F]."""
        (x,) = ctx.saved_tensors
        if kernels_supported(x):
            from glm_kernels.swiglu import swiglu_grad

            return swiglu_grad(x, grad_output)
        gate, up = x.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        gate_grad = grad_output * up * sigmoid * (1 + gate * (1 - sigmoid))
        return torch.cat((gate_grad, grad_output * gate * sigmoid), dim=-1)


def gated_activation(x: torch.Tensor) -> torch.Tensor:
    """The first half of the features, through SiLU, times the second; [..., 2F] -> [..., F]."""
    return GatedActivation.apply(x)
