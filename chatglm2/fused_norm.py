"""The norm before a sub-layer and the residual around it, with one fused backward pass.

    normed = norm(x)        output = x + sublayer(normed)

Autograd would go through the norm and add the gradient of the residual to the result. Here the norm returns its input
too, for the residual, and its backward kernel reads both gradients and writes that of x in one pass.
"""

import torch

from chatglm2.modeling_chatglm2 import RMSNorm, SublayerNorm


class FusedRMSNorm(RMSNorm):
    """An `RMSNorm` with a constant weight, computed by a Triton kernel; takes over the weight of another."""

    def __init__(self, norm: RMSNorm):
        with torch.device("meta"):
            super().__init__(norm.weight.numel(), norm.eps)
        self.weight = norm.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return NormForTwoFunction.apply(hidden_states, self)[0]


class FusedSublayerNorm(FusedRMSNorm, SublayerNorm):
    """A `SublayerNorm` with a constant weight; takes over the weight of another."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """[..., C] -> norm(x) for the sub-layer, and x for `add_residual`; each [..., C]."""
        return NormForTwoFunction.apply(hidden_states, self)


class NormForTwoFunction(torch.autograd.Function):
    """norm(x), and x itself."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, norm: RMSNorm) -> tuple[torch.Tensor, torch.Tensor]:
        from glm_kernels.rms_norm import rms_norm

        hidden_states = hidden_states.contiguous()
        ctx.save_for_backward(hidden_states)
        ctx.norm = norm
        return rms_norm(hidden_states, norm.weight, norm.eps), hidden_states.detach()

    @staticmethod
    def backward(ctx, normed_grad, residual_grad):
        from glm_kernels.rms_norm import rms_norm_grad

        (hidden_states,) = ctx.saved_tensors
        return rms_norm_grad(hidden_states, ctx.norm.weight, ctx.norm.eps, normed_grad, residual_grad), None
