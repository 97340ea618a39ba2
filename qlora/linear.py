"""Linear layers for training on frozen 4-bit weights: nothing is kept for the backward pass that it does not need.

The weight is dequantised when it is used, in the forward and again in the backward pass; or once, where there is
memory to keep it. The adapter's two small matrices are added in place. T tokens, r rank.
"""

import functools

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from qlora.nf4 import dequantize


def frozen_weight(layer: Linear4bit) -> torch.Tensor:
    """[out_features, in_features] in the compute type: made on the spot, unless `keep_dense` made it before."""
    dense = getattr(layer, "dense_weight", None)
    return dequantize(layer.weight, layer.weight.quant_state) if dense is None else dense


def keep_dense(layer: Linear4bit):
    """Dequantises a layer once and for all: 2 bytes a weight instead of half a byte, and no work later."""
    layer.dense_weight = dequantize(layer.weight, layer.weight.quant_state)


class FrozenMatmul(torch.autograd.Function):
    """`x @ W.T + b` with a constant W: the backward pass needs W and not x."""

    @staticmethod
    def forward(ctx, hidden_states, layer):
        # Not saved through autograd: checkpointing then stops recomputing before the layers that need nothing.
        ctx.layer = layer
        return F.linear(hidden_states, frozen_weight(layer), layer.bias)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output @ frozen_weight(ctx.layer), None


class LoraMatmul(torch.autograd.Function):
    """`x @ W.T + b + scaling * dropout(x) @ A.T @ B.T` with constant W and trained A [r, in], B [out, r]."""

    @staticmethod
    def forward(ctx, hidden_states, lora_A, lora_B, layer, scaling, dropout, seed):
        A, B = lora_A.to(hidden_states.dtype), lora_B.to(hidden_states.dtype)
        rows = hidden_states.flatten(0, -2)
        low_rank = drop(rows, dropout, seed) @ A.T
        output = F.linear(rows, frozen_weight(layer), layer.bias).addmm_(low_rank, B.T, alpha=scaling)
        ctx.save_for_backward(rows, low_rank, A, B)
        ctx.layer, ctx.scaling, ctx.dropout, ctx.seed = layer, scaling, dropout, seed
        return output.view(*hidden_states.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_output):
        rows, low_rank, A, B = ctx.saved_tensors
        grad = grad_output.flatten(0, -2)
        low_rank_grad = (grad @ B) * ctx.scaling
        grad_A = matmul_fp32(low_rank_grad.T, drop(rows, ctx.dropout, ctx.seed))
        grad_B = matmul_fp32(grad.T, low_rank) * ctx.scaling
        if not ctx.needs_input_grad[0]:
            return None, grad_A, grad_B, None, None, None, None
        hidden_grad = grad @ frozen_weight(ctx.layer)
        if ctx.dropout:
            hidden_grad += drop(low_rank_grad @ A, ctx.dropout, ctx.seed)
        else:
            hidden_grad.addmm_(low_rank_grad, A)
        return hidden_grad.view(*grad_output.shape[:-1], -1), grad_A, grad_B, None, None, None, None


def drop(rows: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    """Dropout that the same seed repeats, so that no mask needs to be kept."""
    if not probability:
        return rows
    generator = torch.Generator(rows.device).manual_seed(seed)
    keep = torch.empty_like(rows).bernoulli_(1 - probability, generator=generator)
    return keep.mul_(rows).div_(1 - probability)


def matmul_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` with the sums kept in fp32, as the adapter's gradients are."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


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
    seed = int(torch.randint(2**62, ())) if dropout else 0
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LoraMatmul.apply(hidden_states, A, B, layer.base_layer, layer.scaling[adapter], dropout, seed)


def use_training_kernels(model: nn.Module):
    """Gives the model's 4-bit layers, with and without adapter, the forwards above; everything else stays peft's."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = functools.partial(lora_forward, module)
        elif isinstance(module, Linear4bit):
            module.forward = functools.partial(frozen_forward, module)
