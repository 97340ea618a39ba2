"""Linear layers for training on frozen 4-bit weights: nothing is kept for the backward pass that it does not need.

The weight is dequantised when it is used, in the forward and again in the backward pass; or once, where there is
memory to keep it. The adapter's two thin matrices are added in place. T tokens, r rank.
"""

import functools

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from chatglm.modeling_chatglm import ResidualNorm
from glm_kernels import kernels_supported
from qlora.layers.nf4 import dequantized_weight
from qlora.layers.residual import residual_norm


class FrozenMatmul(torch.autograd.Function):
    """`x @ W.T + b` with a constant W: the backward pass needs W and not x."""

    @staticmethod
    def forward(ctx, hidden_states, layer):
        # Not saved through autograd: checkpointing then stops recomputing before the layers that need nothing.
        ctx.layer = layer
        return F.linear(hidden_states, dequantized_weight(layer), layer.bias)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output @ dequantized_weight(ctx.layer), None


class LoraMatmul(torch.autograd.Function):
    """`x @ W.T + b + scaling * dropout(x) @ A.T @ B.T` with constant W and trained A [r, in], B [out, r]."""

    @staticmethod
    def forward(ctx, hidden_states, lora_A, lora_B, layer, scaling, dropout, seed):
        rows, thin = hidden_states.flatten(0, -2), lora_operations(hidden_states)
        up = lora_B.T.contiguous()
        low_rank = thin.lora_down(rows, lora_A, 1.0, dropout, seed)
        output = F.linear(rows, dequantized_weight(layer), layer.bias)
        thin.lora_up_add(output, low_rank, up, scaling, 0.0, 0)
        ctx.save_for_backward(rows, low_rank, lora_A, up)
        ctx.layer, ctx.scaling, ctx.dropout, ctx.seed = layer, scaling, dropout, seed
        return output.view(*hidden_states.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_output):
        rows, low_rank, lora_A, up = ctx.saved_tensors
        grad, thin = grad_output.flatten(0, -2), lora_operations(grad_output)
        low_rank_grad = thin.lora_down(grad, up, ctx.scaling, 0.0, 0)
        grad_A = thin.lora_weight_grad(low_rank_grad, rows, 1.0, ctx.dropout, ctx.seed)
        grad_B = thin.lora_weight_grad(low_rank, grad, ctx.scaling, 0.0, 0).T
        hidden_grad = None
        if ctx.needs_input_grad[0]:
            hidden_grad = grad @ dequantized_weight(ctx.layer)
            thin.lora_up_add(hidden_grad, low_rank_grad, lora_A, 1.0, ctx.dropout, ctx.seed)
            hidden_grad = hidden_grad.view(*grad_output.shape[:-1], -1)
        return hidden_grad, grad_A, grad_B, None, None, None, None


def lora_operations(tensor: torch.Tensor):
    """The module with `lora_down`, `lora_up_add` and `lora_weight_grad` for this device."""
    if tensor.is_cuda and tensor.dtype != torch.float32:
        from glm_kernels import lora

        return lora
    from glm_kernels import lora_reference

    return lora_reference


def frozen_forward(layer: Linear4bit, hidden_states: torch.Tensor) -> torch.Tensor:
    """The forward of a 4-bit layer that is not trained."""
    return FrozenMatmul.apply(hidden_states, layer)


def lora_forward(layer: LoraLayer, hidden_states: torch.Tensor) -> torch.Tensor:
    """The forward of a 4-bit layer with one LoRA adapter."""
    if layer.disable_adapters:
        return layer.base_layer(hidden_states)
    (adapter,) = layer.active_adapters
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0) if layer.training else 0.0  # Identity has no p
    # Drawn on the host, whose generator checkpointing restores before it recomputes.
    seed = int(torch.randint(2**31, ())) if dropout else 0
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LoraMatmul.apply(hidden_states, A, B, layer.base_layer, layer.scaling[adapter], dropout, seed)


def replace_layers(model: nn.Module):
    """Gives 4-bit layers, with and without adapter, the forwards above, and norms theirs; the rest stays as it is."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = functools.partial(lora_forward, module)
        elif isinstance(module, Linear4bit):
            module.forward = functools.partial(frozen_forward, module)
        elif isinstance(module, ResidualNorm) and kernels_supported(module.weight):
            module.forward = functools.partial(residual_norm, module)
