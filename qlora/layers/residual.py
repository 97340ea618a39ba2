"""The residual around a frozen layer norm, its gradients joined in the norm's backward pass.

    sum = scale * norm(x) + branch(norm(x))

Autograd would scale the gradient of the sum, add it to that of the branch's input, and go through the norm: three
passes over memory where one will do.
"""

from collections.abc import Callable

import torch

from chatglm.modeling_chatglm import RESIDUAL_SCALE, ResidualNorm


class FrozenNorm(torch.autograd.Function):
    """norm(x) twice, for the branch and for `ResidualSum`, which sends back the sum's gradient as it is."""

    @staticmethod
    def forward(ctx, hidden_states, norm):
        from glm_kernels.layer_norm import layer_norm

        hidden_states = hidden_states.contiguous()
        ctx.save_for_backward(hidden_states)
        ctx.norm = norm
        normed = layer_norm(hidden_states, norm)
        return normed, normed.detach()

    @staticmethod
    def backward(ctx, branch_grad, sum_grad):
        from glm_kernels.layer_norm import residual_norm_grad

        (hidden_states,) = ctx.saved_tensors
        return residual_norm_grad(hidden_states, ctx.norm, branch_grad, sum_grad, RESIDUAL_SCALE), None


class ResidualSum(torch.autograd.Function):
    """scale * normed + branch; the scale of the gradient is left to `FrozenNorm`."""

    @staticmethod
    def forward(ctx, branch, normed):
        return torch.add(branch, normed, alpha=RESIDUAL_SCALE)

    @staticmethod
    def backward(ctx, sum_grad):
        return sum_grad, sum_grad


def residual_norm(
    norm: ResidualNorm, hidden_states: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The forward of a `ResidualNorm` that is not trained: [..., C] -> [..., C]."""
    normed, residual = FrozenNorm.apply(hidden_states, norm)
    return ResidualSum.apply(branch(normed), residual)
