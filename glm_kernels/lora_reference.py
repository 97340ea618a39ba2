"""The products of `lora` in plain operations: for any device and type, and as their specification."""

import torch


def lora_down(rows: torch.Tensor, thin: torch.Tensor, factor: float, dropout: float, seed: int) -> torch.Tensor:
    """`factor * dropout(rows) @ thin.T`: [T, N] and [r, N] -> [T, r] in the type of `rows`."""
    return factor * dropout_by_seed(rows, dropout, seed) @ thin.T.to(rows.dtype)


def lora_up_add(
    rows: torch.Tensor, low_rank: torch.Tensor, thin: torch.Tensor, factor: float, dropout: float, seed: int
):
    """`rows += factor * dropout(low_rank @ thin)`: [T, r] and [r, N] into [T, N]."""
    rows.add_(dropout_by_seed(low_rank @ thin.to(rows.dtype), dropout, seed), alpha=factor)


def lora_weight_grad(
    low_rank: torch.Tensor, rows: torch.Tensor, factor: float, dropout: float, seed: int
) -> torch.Tensor:
    """`factor * low_rank.T @ dropout(rows)`: [T, r] and [T, N] -> [r, N] in fp32."""
    return factor * low_rank.T.float() @ dropout_by_seed(rows, dropout, seed).float()


def dropout_by_seed(rows: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    """Dropout that the same seed repeats, so that no mask needs to be kept."""
    if not probability:
        return rows
    generator = torch.Generator(rows.device).manual_seed(seed)
    keep = torch.empty_like(rows).bernoulli_(1 - probability, generator=generator)
    return keep.mul_(rows).div_(1 - probability)
