"""Rotary positions and attention for samples concatenated in one row: each token attends within its own sample only.

On a supported GPU one Triton kernel computes it for all samples, without a mask in memory; elsewhere there is one SDPA
call a sample. Both take the fused projection of queries, keys and values, because the kernel rotates and reads them in
place.

Shapes: T tokens, C hidden size, D head dimension.
"""

import torch

import glm_shared.packed_attention as by_sample
from chatglm.rotary import split_and_rotate
from glm_kernels import kernels_supported
from glm_shared.packed_attention import PackedSequences


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
    states = split_and_rotate(projected, *position_embeddings, head_dim)
    return by_sample.attention_by_sample(*states, packed_sequences)
