"""Rotary positions and causal attention for samples concatenated in one row; see `chatglm2.modeling_chatglm2`.

Shapes: T tokens, H heads of queries, G heads of keys and values, D head dimension.
"""

import torch

import glm_shared.packed_attention as by_sample
from chatglm2.rotary import split_and_rotate
from glm_kernels import kernels_supported
from glm_shared.packed_attention import PackedSequences


def packed_attention(
    projected: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    packed_sequences: PackedSequences,
    heads: int,
    groups: int,
) -> torch.Tensor:
    """Rotary positions and attention within each sample, by a Triton kernel where one can run.

    Args:
        projected: [1, T, (H + 2G) * D], all queries, all keys, all values. On a GPU it is overwritten.
        position_embeddings: cos and sin, each [1, T, 1, D / 4].
        packed_sequences: where the samples lie, with contexts of 0 tokens: attention is causal.
        heads: H.
        groups: G.
    Returns:
        [1, T, H * D].
    """
    if kernels_supported(projected):
        from glm_kernels.attention import GroupedPackedAttention

        cos, sin = (table[0, :, 0] for table in position_embeddings)  # [T, D / 4]
        output = GroupedPackedAttention.apply(projected[0], cos, sin, packed_sequences.tiles, heads, groups)
        return output.unsqueeze(0)
    return attention_by_sample(projected, position_embeddings, packed_sequences, heads, groups)


def attention_by_sample(
    projected: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    packed_sequences: PackedSequences,
    heads: int,
    groups: int,
) -> torch.Tensor:
    """The same with one masked SDPA call a sample."""
    states = split_and_rotate(projected, *position_embeddings, heads, groups)
    return by_sample.attention_by_sample(*states, packed_sequences)
