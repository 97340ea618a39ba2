"""The products of `glm_kernels.lora` in plain PyTorch, for the CPU, for fp32 and for GPUs older than Ampere.

Formula; weight [r, N] is A [r, in] or B.T [r, out], p is the dropout probability:
    lora_down:         low_rank [T, r]    = scale * dropout(x) @ weight.T
    lora_up_add:       output [T, N]      = output + scale * dropout(low_rank @ weight)
    lora_weight_grad:  weight_grad [r, N] = scale * low_rank.T @ dropout(x)
    dropout(x) = x * mask / (1 - p)         the mask is drawn from a generator with seed + layer
The same seed, layer, shape and dtype give the same mask in every function here, but not the mask of the kernels.

Shapes: T tokens, N features, r rank.
Reference: these functions are the reference of the kernels in `glm_kernels.lora`.
Source: "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from typing import NamedTuple

import torch


class Dropout(NamedTuple):
    """Dropout whose mask is a function of a seed, so that the backward pass recomputes it instead of storing it.

    Attributes:
        probability: p of an element to be dropped, 0 <= p < 1.
        seed: [1], int32, 0 <= seed < 2**31, on the device of the activations.
        layer: a number of its own for each layer, which is added to the seed.
    """

    probability: float
    seed: torch.Tensor
    layer: int


def lora_down(x: torch.Tensor, weight: torch.Tensor, scale: float, dropout: Dropout | None) -> torch.Tensor:
    """scale * dropout(x) @ weight.T

    Args:
        x: [T, N].
        weight: [r, N]; converted to the dtype of `x`.
        scale: factor of the product.
        dropout: of x; None for none.
    Returns:
        [T, r], in the dtype of `x`.
    """
    return scale * apply_dropout(x, dropout) @ weight.T.to(x.dtype)


def lora_up_add(
    output: torch.Tensor, low_rank: torch.Tensor, weight: torch.Tensor, scale: float, dropout: Dropout | None
):
    """output += scale * dropout(low_rank @ weight)

    Args:
        output: [T, N]; updated in place.
        low_rank: [T, r], in the dtype of `output`.
        weight: [r, N]; converted to the dtype of `output`.
        scale: factor of the product.
        dropout: of the product, with the mask that `lora_down` has for a matrix [T, N]; None for none.
    """
    output.add_(apply_dropout(low_rank @ weight.to(output.dtype), dropout), alpha=scale)


def lora_weight_grad(low_rank: torch.Tensor, x: torch.Tensor, scale: float, dropout: Dropout | None) -> torch.Tensor:
    """scale * low_rank.T @ dropout(x)

    Args:
        low_rank: [T, r].
        x: [T, N].
        scale: factor of the product.
        dropout: of x, with the mask of `lora_down`; None for none.
    Returns:
        [r, N], fp32.
    """
    return scale * low_rank.T.float() @ apply_dropout(x, dropout).float()


def apply_dropout(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """x * mask / (1 - p), of any shape; `x` itself without dropout."""
    if dropout is None:
        return x
    generator = torch.Generator(x.device).manual_seed(int(dropout.seed) + dropout.layer)
    mask = torch.empty_like(x).bernoulli_(1 - dropout.probability, generator=generator)
    return mask.mul_(x).div_(1 - dropout.probability)
