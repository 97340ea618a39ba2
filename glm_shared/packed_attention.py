"""Attention for samples concatenated in one row: each token attends within its own sample only.

Shapes: T tokens, H heads of queries, G heads of keys and values, D head dimension.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from glm_kernels import TILE


@dataclass(frozen=True)
class PackedSequences:
    """Where the samples lie that are concatenated in a row.

    Attributes:
        lengths: on the host, for each sample the tokens of its context, which attend to each other in both directions,
            and the tokens after it, which attend causally.
        tiles: [number of tiles, 4], int32, on the device of the activations; see `glm_kernels.attention`.
    """

    lengths: list[tuple[int, int]]
    tiles: torch.Tensor

    @classmethod
    def from_lengths(cls, lengths: list[tuple[int, int]]) -> "PackedSequences":
        """The layout of samples of (context, other) tokens, on the CPU."""
        tiles, start = [], 0
        for context, other in lengths:
            tiles += [(start, context + other, context, first) for first in range(0, context + other, TILE)]
            start += context + other
        return cls(lengths, torch.tensor(tiles, dtype=torch.int32))

    def fill_up(self, tiles: int) -> "PackedSequences":
        """The same layout with so many tiles, at least as many as it has; those that are added are empty."""
        assert tiles >= len(self.tiles)
        return PackedSequences(self.lengths, F.pad(self.tiles, (0, 0, 0, tiles - len(self.tiles))))

    def pin_memory(self) -> "PackedSequences":
        """The same layout in pinned memory, from which a copy to the GPU does not block the host."""
        return PackedSequences(self.lengths, self.tiles.pin_memory())

    def copy_(self, other: "PackedSequences", non_blocking: bool = False) -> "PackedSequences":
        """Takes over a layout with as many tiles, in place."""
        self.lengths[:] = other.lengths
        self.tiles.copy_(other.tiles, non_blocking=non_blocking)
        return self

    def to(self, device: torch.device, non_blocking: bool = True) -> "PackedSequences":
        """The same layout with its tiles on `device`."""
        return PackedSequences(self.lengths, self.tiles.to(device, non_blocking=non_blocking))


def attention_by_sample(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed_sequences: PackedSequences
) -> torch.Tensor:
    """Attention within each sample, with one masked SDPA call a sample.

    Args:
        query, key, value: [1, T, H, D], [1, T, G, D], [1, T, G, D]; queries and keys are rotated.
        packed_sequences: where the samples lie.
    Returns:
        [1, T, H * D].
    """
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    assert not capturing, "a CUDA graph would keep the lengths of these samples"
    states = (state.transpose(1, 2) for state in (query, key, value))
    samples = (state.split([sum(lengths) for lengths in packed_sequences.lengths], dim=2) for state in states)
    outputs = []
    for (context, other), *sample in zip(packed_sequences.lengths, *samples, strict=True):
        q, k, v = sample  # [1, H, n, D], [1, G, n, D], [1, G, n, D]
        mask = sample_mask(context, other, q.device)
        is_grouped = q.shape[1] != k.shape[1]
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=is_grouped))
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)


def sample_mask(context: int, other: int, device: torch.device) -> torch.Tensor:
    """Which keys a query of one sample attends to: those of the context, and those that are not after it.

    The same rule in the kernel is `glm_kernels.attention.prefix_lm_mask`; the models state it for padded rows.

    Returns:
        [n, n], bool, queries and keys, for n = context + other tokens.
    """
    index = torch.arange(context + other, device=device)
    return (index <= index[:, None]) | (index < context)
