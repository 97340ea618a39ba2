"""Attention for samples concatenated in one row, without a mask: what no token may see is never computed.

On a GPU one Triton kernel does it for all samples; elsewhere it is one SDPA call a sample. Both take the fused
projection of queries, keys and values, because the kernel rotates and reads them where they lie.

Shapes: T tokens, C hidden size, H heads, D head dimension, N samples.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from chatglm.rotary import split_and_rotate
from glm_kernels import TILE, kernels_supported


@dataclass(frozen=True)
class PackedSequences:
    """Where the samples of a row lie.

    `lengths`, on the host: for each sample the tokens of its context, which all see each other, and the tokens after.
    `tiles`, beside the activations: [number of tiles, 4], int32, see `glm_kernels.attention`.
    """

    lengths: list[tuple[int, int]]
    tiles: torch.Tensor

    @classmethod
    def of(cls, lengths: list[tuple[int, int]]) -> "PackedSequences":
        """The layout of N samples of (context, later) tokens, on the CPU."""
        tiles, start = [], 0
        for context, later in lengths:
            tiles += [(start, context + later, context, first) for first in range(0, context + later, TILE)]
            start += context + later
        return cls(lengths, torch.tensor(tiles, dtype=torch.int32))

    def pin_memory(self) -> "PackedSequences":
        """The same layout in memory from which copies to the GPU need not be waited for."""
        return PackedSequences(self.lengths, self.tiles.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = True) -> "PackedSequences":
        """The same layout with its tiles on `device`."""
        return PackedSequences(self.lengths, self.tiles.to(device, non_blocking=non_blocking))


def packed_attention(
    projected: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    row: PackedSequences,
    head_dim: int,
) -> torch.Tensor:
    """Rotary positions and prefix-LM attention within each sample.

    Args:
        projected: [1, T, 3C], query, key and value of each head side by side. On a GPU it is overwritten.
        position_embeddings: cos and sin, each [1, T, 1, 2, D / 2].
        row: where the samples lie.
        head_dim: D.
    Returns:
        [1, T, C].
    """
    if kernels_supported(projected):
        from glm_kernels.attention import PackedAttention

        cos, sin = (table.reshape(-1, head_dim) for table in position_embeddings)
        return PackedAttention.apply(projected.squeeze(0), cos, sin, row.tiles, head_dim).unsqueeze(0)
    return attention_by_sample(projected, position_embeddings, row, head_dim)


def attention_by_sample(
    projected: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    row: PackedSequences,
    head_dim: int,
) -> torch.Tensor:
    """The same with one masked SDPA call a sample."""
    states = (state.transpose(1, 2) for state in split_and_rotate(projected, *position_embeddings, head_dim))
    samples = (state.split([sum(lengths) for lengths in row.lengths], dim=2) for state in states)
    outputs = []
    for (context, later), query, key, value in zip(row.lengths, *samples, strict=True):
        index = torch.arange(context + later, device=query.device)
        visible = (index <= index[:, None]) | (index < context)
        outputs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=head_dim**-0.5))
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
