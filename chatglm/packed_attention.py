"""Attention for samples concatenated in one row: each token attends within its own sample only.

On a supported GPU one Triton kernel computes it for all samples, without a mask in memory; elsewhere there is one SDPA
call a sample, with `sample_mask`. Both take the fused projection of queries, keys and values, because the kernel
rotates and reads them in place.

Shapes: T tokens, C hidden size, H heads, D head dimension.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from chatglm.rotary import split_and_rotate
from glm_kernels import TILE, kernels_supported


@dataclass(frozen=True)
class PackedSequences:
    """Where the samples lie that are concatenated in a row.

    Attributes:
        lengths: on the host, for each sample the tokens of its prompt, which attend to each other in both directions,
            and the tokens after the prompt, which attend causally.
        tiles: [number of tiles, 4], int32, on the device of the activations; see `glm_kernels.attention`.
    """

    lengths: list[tuple[int, int]]
    tiles: torch.Tensor

    @classmethod
    def from_lengths(cls, lengths: list[tuple[int, int]]) -> "PackedSequences":
        """The layout of samples of (prompt, answer) tokens, on the CPU."""
        tiles, start = [], 0
        for prompt, answer in lengths:
            tiles += [(start, prompt + answer, prompt, first) for first in range(0, prompt + answer, TILE)]
            start += prompt + answer
        return cls(lengths, torch.tensor(tiles, dtype=torch.int32))

    def fill_up(self, tiles: int) -> "PackedSequences":
        """The same layout with so many tiles; those that are added are empty."""
        return PackedSequences(self.lengths, F.pad(self.tiles, (0, 0, 0, tiles - len(self.tiles))))

    def pin_memory(self) -> "PackedSequences":
        """The same layout in pinned memory, from which a copy to the GPU does not block the host."""
        return PackedSequences(self.lengths, self.tiles.pin_memory())

    def clone(self) -> "PackedSequences":
        """The same layout with tiles of its own."""
        return PackedSequences(self.lengths, self.tiles.clone())

    def copy_(self, other: "PackedSequences", non_blocking: bool = False) -> "PackedSequences":
        """Takes over the tiles of a layout with as many tiles, in place; `lengths` are not taken over."""
        self.tiles.copy_(other.tiles, non_blocking=non_blocking)
        return self

    def to(self, device: torch.device, non_blocking: bool = True) -> "PackedSequences":
        """The same layout with its tiles on `device`."""
        return PackedSequences(self.lengths, self.tiles.to(device, non_blocking=non_blocking))


def packed_attention(
    projected: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    packed_sequences: PackedSequences,
    head_dim: int,
) -> torch.Tensor:
    """Rotary positions and prefix-LM attention within each sample.

    Args:
        projected: [1, T, 3C], query, key and value of each head side by side. On a GPU it is overwritten.
        position_embeddings: cos and sin, each [1, T, 1, 2, D / 2].
        packed_sequences: where the samples lie.
        head_dim: D.
    Returns:
        [1, T, C].
    """
    if kernels_supported(projected):
        from glm_kernels.attention import PackedAttention

        cos, sin = (table.reshape(-1, head_dim) for table in position_embeddings)  # [T, D]
        return PackedAttention.apply(projected.squeeze(0), cos, sin, packed_sequences.tiles, head_dim).unsqueeze(0)
    return attention_by_sample(projected, position_embeddings, packed_sequences, head_dim)


def attention_by_sample(
    projected: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    packed_sequences: PackedSequences,
    head_dim: int,
) -> torch.Tensor:
    """The same with one masked SDPA call a sample."""
    states = (state.transpose(1, 2) for state in split_and_rotate(projected, *position_embeddings, head_dim))
    samples = (state.split([sum(lengths) for lengths in packed_sequences.lengths], dim=2) for state in states)
    outputs = []
    for (prompt, answer), query, key, value in zip(packed_sequences.lengths, *samples, strict=True):  # [1, H, n, D]
        mask = sample_mask(prompt, answer, query.device)
        outputs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=head_dim**-0.5))
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)


def sample_mask(prompt: int, answer: int, device: torch.device) -> torch.Tensor:
    """Which keys a query of one sample attends to: those of the prompt, and those that are not after it.

    The same rule for padded rows and a cache is `chatglm.modeling_chatglm.prefix_lm_mask`, in the kernel
    `glm_kernels.attention.prefix_lm_mask`.

    Returns:
        [n, n], bool, queries and keys, for n = prompt + answer tokens.
    """
    index = torch.arange(prompt + answer, device=device)
    return (index <= index[:, None]) | (index < prompt)
