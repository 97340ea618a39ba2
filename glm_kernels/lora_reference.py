"""The products of `glm_kernels.lora` in plain PyTorch, for the CPU, for fp32 and for GPUs older than Ampere.

Formula; weight [r, N] is A [r, in] or B.T [r, out], p is the dropout probability:
    lora_down:         low_rank [T, r]    = scale * dropout(x) @ weight.T
    lora_up_add:       output [T, N]      = output + scale * dropout(low_rank @ weight)
    lora_weight_grad:  weight_grad [r, N] = scale * low_rank.T @ dropout(x)
    dropout(x) = x * mask / (1 - p)         the mask is drawn from a generator with the seed
The same seed, shape and dtype give the same mask in every function here, but not the mask of the kernels.

Shapes: T tokens, N features, r rank.
Reference: these functions are the reference of the kernels in `glm_kernels.lora`.
Source: "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

import torch


def lora_down(x: torch.Tensor, weight: torch.Tensor, scale: float, dropout: float, seed: int) -> torch.Tensor:
    """scale * dropout(x) @ weight.T

    Args:
        x: [T, N].
        weight: [r, N]; converted to the dtype of `x`.
        scale: factor of the product.
        dropout: probability p, 0 <= p < 1.
        seed: of the dropout mask.
    Returns:
        [T, r], in the dtype of `x`.
    """
    return scale * dropout_by_seed(x, dropout, seed) @ weight.T.to(x.dtype)


def lora_up_add(
    output: torch.Tensor, low_rank: torch.Tensor, weight: torch.Tensor, scale: float, dropout: float, seed: int
):
    """output += scale * dropout(low_rank @ weight)

    Args:
        output: [T, N]; updated in place.
        low_rank: [T, r], in the dtype of `output`.
        weight: [r, N]; converted to the dtype of `output`.
        scale: factor of the product.
        dropout: probability p, 0 <= p < 1; the mask is that of `lora_down` for a matrix [T, N].
        seed: of the dropout mask.
    """
    output.add_(dropout_by_seed(low_rank @ weight.to(output.dtype), dropout, seed), alpha=scale)


def lora_weight_grad(low_rank: torch.Tensor, x: torch.Tensor, scale: float, dropout: float, seed: int) -> torch.Tensor:
    """scale * low_rank.T @ dropout(x)

    Args:
        low_rank: [T, r].
        x: [T, N].
        scale: factor of the product.
        dropout: probability p, 0 <= p < 1; the mask is that of `lora_down`.
        seed: of the dropout mask.
    Returns:
        [r, N], fp32.
    """
    return scale * low_rank.T.float() @ dropout_by_seed(x, dropout, seed).float()


def dropout_by_seed(x: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    """Dropout whose mask is a function of the seed, so that the backward pass recomputes it instead of storing it.

    Args:
        x: any shape.
        probability: p, 0 <= p < 1.
        seed: of the mask.
    Returns:
        x * mask / (1 - p), shape and dtype of `x`; `x` itself where p is 0.
    """
    if not probability:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty_like(x).bernoulli_(1 - probability, generator=generator)
    return mask.mul_(x).div_(1 - probability)
