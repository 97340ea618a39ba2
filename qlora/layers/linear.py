"""Frozen 4-bit linear layers, with and without a LoRA adapter.

    NF4Linear                   x @ W.T + bias
    LoRANF4Linear               x @ W.T + bias + scaling * dropout(x) @ A.T @ B.T    with gradients, for training
    InferenceLoRANF4Linear      the same without dropout and without gradients; each row may have an adapter of its own

W is stored in NF4 and dequantized where it is used, in the forward and again in the backward pass, or once by
`cache_dequantized`. It is constant, so its backward pass needs no input: autograd saves the input only for A and B.
What is saved is counted in `Sizes` of qlora/training/memory_plan.py. Training with `--plain` uses peft's and
bitsandbytes' own layers instead.

Shapes: T tokens (all leading dimensions together), C_in and C_out features, r rank.
"""

from types import ModuleType
from typing import cast

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from glm_kernels import kernels_supported
from glm_kernels.lora_reference import Dropout
from qlora.layers.nf4 import dequantize, packed_linear

MOST_SEED = 2**30  # of dropout; with the number of a layer it stays within 31 bits


def draw_seed(dropout_seed: torch.Tensor):
    """Draws the seed [1] of the dropout masks, in place, from the generator of its device."""
    dropout_seed.random_(MOST_SEED)


class NF4Linear(nn.Module):
    """A frozen linear layer with a weight in NF4; takes over the weight and bias of a bitsandbytes layer."""

    def __init__(self, layer: Linear4bit):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.cached_weight: torch.Tensor | None = None  # no buffer: DDP would broadcast gigabytes at its start

    def dequantized_weight(self) -> torch.Tensor:
        """[C_out, C_in] in the compute dtype."""
        if self.cached_weight is not None:
            return self.cached_weight
        return dequantize(self.weight, self.weight.quant_state)

    def cache_dequantized(self, enabled: bool):
        """Dequantizes the weight once, 2 bytes a weight in 16-bit types beside half a byte; or where it is used."""
        self.cached_weight = self.dequantized_weight() if enabled else None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W.T + bias, without autograd; [..., C_in] -> [..., C_out]."""
        return F.linear(x, self.dequantized_weight(), self.bias)

    def multiply_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """G @ W, the gradient of x; [..., C_out] -> [..., C_in]."""
        return grad @ self.dequantized_weight()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., C_in] -> [..., C_out]."""
        if torch.is_grad_enabled():
            return FrozenLinearFunction.apply(hidden_states, self)
        output = packed_linear(hidden_states, self.weight, self.weight.quant_state, self.bias)
        return self.multiply(hidden_states) if output is None else output


class LoRANF4Linear(nn.Module, LoraLayer):
    """A 4-bit layer with one LoRA adapter; takes over the base layer and the adapter of a peft layer.

    It is one of peft's `LoraLayer`s, so that saving, loading and `disable_adapter` work as for peft's own.

    Args:
        layer: a peft layer.

    Attributes:
        dropout_seed: [1], int32, at most MOST_SEED, on the layer's device; the same tensor in all layers of a model.
            Whoever trains draws it anew before each forward pass. The mask is a function of it and of `number`: it is
            the same in the backward pass, and where activations are recomputed.
        number: of the layer.
    """

    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...]
    base_layer: NF4Linear
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    dropout_seed: torch.Tensor
    number: int

    def __init__(self, layer: LoraLayer):
        nn.Module.__init__(self)
        LoraLayer.__init__(self, layer.base_layer)
        for name in (*self.adapter_layer_names, *self.other_param_names):
            setattr(self, name, getattr(layer, name))
        (self.adapter,) = layer.active_adapters
        self._active_adapter, self._disable_adapters = self.adapter, layer.disable_adapters

    def adapter_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, C_in] and B [C_out, r], fp32."""
        lora_A, lora_B = (cast(nn.Linear, matrices[self.adapter]) for matrices in (self.lora_A, self.lora_B))
        return lora_A.weight, lora_B.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., C_in] -> [..., C_out]."""
        if self.disable_adapters:
            return self.base_layer(hidden_states)
        scaling = self.scaling[self.adapter]
        return LoRALinearFunction.apply(
            hidden_states, *self.adapter_weights(), self.base_layer, scaling, self.dropout()
        )

    def dropout(self) -> Dropout | None:
        """The dropout before A; None where there is none."""
        probability = getattr(self.lora_dropout[self.adapter], "p", 0.0) if self.training else 0.0  # Identity has no p
        return Dropout(probability, self.dropout_seed, self.number) if probability else None


class InferenceLoRANF4Linear(LoRANF4Linear):
    """The same layer without gradients: A and scaling * B are converted to the compute dtype once.

    The matrices of several adapters are concatenated along r. For each row of a batch, the columns of its own adapter
    remain; those of the others become zero. This costs little, since r is small beside C_in and C_out, and every
    adapter can be in one batch, and in one CUDA graph.

    Args:
        layer: a peft layer.
        adapters: the names of all adapters of the model, of which the layer may lack some.
    """

    @torch.no_grad()
    def __init__(self, layer: LoraLayer, adapters: list[str]):
        super().__init__(layer)
        dtype = layer.base_layer.weight.quant_state.dtype
        own = [name for name in adapters if name in layer.lora_A]
        lora_A, lora_B = ([cast(nn.Linear, m[name]).weight for name in own] for m in (layer.lora_A, layer.lora_B))
        lora_B = [weight * self.scaling[name] for name, weight in zip(own, lora_B, strict=True)]
        self.down = torch.cat(lora_A).to(dtype)  # [r, C_in], r of all adapters together
        self.up = torch.cat(lora_B, dim=1).to(dtype).T  # [r, C_out]
        ranks = torch.tensor([len(weight) for weight in lora_A])
        places = torch.tensor([adapters.index(name) for name in own])
        self.adapter_of_column = places.repeat_interleave(ranks).to(self.down.device)  # [r], places in `adapters`
        # [B], places in `adapters`, -1 for the base model; None if all rows have the only adapter.
        self.adapter_of_row: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., C_in] -> [..., C_out]; [B, T, C_in] where rows have adapters of their own."""
        output = self.base_layer(hidden_states)
        if not self.disable_adapters:
            low_rank = F.linear(hidden_states, self.down)  # [..., r]
            if self.adapter_of_row is not None:
                low_rank *= self.adapter_of_row[:, None, None] == self.adapter_of_column
            output.view(-1, output.shape[-1]).addmm_(low_rank.view(-1, low_rank.shape[-1]), self.up)
        return output


class FrozenLinearFunction(torch.autograd.Function):
    """`x @ W.T + bias` with constant W and bias: nothing is saved but the layer."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, layer: NF4Linear) -> torch.Tensor:
        # A plain attribute, not a saved tensor: recomputation stops once all saved tensors of a block are there.
        ctx.layer = layer
        return layer.multiply(hidden_states)

    @staticmethod
    def backward(ctx, grad_output):
        return ctx.layer.multiply_gradient(grad_output), None


class LoRALinearFunction(torch.autograd.Function):
    """`x @ W.T + bias + scaling * dropout(x) @ A.T @ B.T` with constant W, and A [r, C_in], B [C_out, r] trained.

    With G the gradient of the output [T, C_out] and L = dropout(x) @ A.T:
        grad L = scaling * G @ B        grad A = (grad L).T @ dropout(x)        grad B = scaling * G.T @ L
        grad x = G @ W + dropout(grad L @ A)
    """

    @staticmethod
    def forward(
        ctx,
        hidden_states: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        layer: NF4Linear,
        scaling: float,
        dropout: Dropout | None,
    ) -> torch.Tensor:
        x = hidden_states.flatten(0, -2)  # [T, C_in]
        operations = lora_operations(x)
        low_rank = operations.lora_down(x, lora_A, 1.0, dropout)  # [T, r]
        output = layer.multiply(x)  # [T, C_out]
        operations.lora_up_add(output, low_rank, lora_B.T, scaling, None)
        ctx.save_for_backward(x, low_rank, lora_A, lora_B)
        ctx.layer, ctx.scaling, ctx.dropout = layer, scaling, dropout
        return output.view(*hidden_states.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_output):
        x, low_rank, lora_A, lora_B = ctx.saved_tensors
        grad = grad_output.flatten(0, -2)  # [T, C_out]
        operations = lora_operations(grad)
        low_rank_grad = operations.lora_down(grad, lora_B.T, ctx.scaling, None)  # [T, r] = scaling * G @ B
        grad_A = operations.lora_weight_grad(low_rank_grad, x, 1.0, ctx.dropout)  # [r, C_in]
        grad_B = operations.lora_weight_grad(low_rank, grad, ctx.scaling, None).T  # [C_out, r]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.layer.multiply_gradient(grad)  # [T, C_in]
            operations.lora_up_add(grad_x, low_rank_grad, lora_A, 1.0, ctx.dropout)
            grad_x = grad_x.view(*grad_output.shape[:-1], -1)
        return grad_x, grad_A, grad_B, None, None, None


def lora_operations(tensor: torch.Tensor) -> ModuleType:
    """The module with `lora_down`, `lora_up_add` and `lora_weight_grad` for this device and dtype."""
    if kernels_supported(tensor):
        from glm_kernels import lora

        return lora
    from glm_kernels import lora_reference

    return lora_reference
