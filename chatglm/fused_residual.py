"""The layer norm before a sub-layer and the residual around it, with one fused backward pass.

    normed = norm(x)        output = scale * normed + sublayer(normed)

Autograd would scale the gradient of the output, add it to the gradient of the sub-layer's input and then go through
the norm: three passes over memory. Here the norm returns its output twice, for the sub-layer and for the residual, and
its backward kernel reads both gradients and writes that of x in one pass.
"""

import torch

from chatglm.modeling_chatglm import RESIDUAL_SCALE, ResidualNorm


class FusedResidualNorm(ResidualNorm):
    """A `ResidualNorm` with constant weights, computed by Triton kernels; takes over the weights of another."""

    def __init__(self, norm: ResidualNorm):
        super().__init__(list(norm.normalized_shape), eps=norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """[..., C] -> norm(x) for the sub-layer, and norm(x) for `add_residual`; each [..., C]."""
        return NormForTwoFunction.apply(hidden_states, self)

    def add_residual(self, sublayer_output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[..., C], [..., C] -> [..., C]."""
        return AddResidualFunction.apply(sublayer_output, residual)


class NormForTwoFunction(torch.autograd.Function):
    """norm(x), twice; the second output's gradient is scaled in the backward pass."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, norm: FusedResidualNorm) -> tuple[torch.Tensor, torch.Tensor]:
        from glm_kernels.layer_norm import layer_norm

        hidden_states = hidden_states.contiguous()
        ctx.save_for_backward(hidden_states)
        ctx.norm = norm
        normed = layer_norm(hidden_states, norm)
        return normed, normed.detach()

    @staticmethod
    def backward(ctx, sublayer_grad, residual_grad):
        from glm_kernels.layer_norm import residual_norm_grad

        (hidden_states,) = ctx.saved_tensors
        return residual_norm_grad(hidden_states, ctx.norm, sublayer_grad, residual_grad, RESIDUAL_SCALE), None


class AddResidualFunction(torch.autograd.Function):
    """scale * residual + sub-layer's output; the residual's gradient is scaled by `NormForTwoFunction`, not here."""

    @staticmethod
    def forward(ctx, sublayer_output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.add(sublayer_output, residual, alpha=RESIDUAL_SCALE)

    @staticmethod
    def backward(ctx, output_grad):
        return output_grad, output_grad
