"""Attention of one new token a sequence in a single kernel, for decoding with a cache of fixed size.

Shapes: B rows, T tokens, S key tokens, C hidden size.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticCache

from glm_shared.packed_attention import PackedSequences


class DecodingStepMixin:
    """Put before a model's attention: a decoding step, from projection to output, is one kernel.

    Args:
        attention: the module whose layers it takes over.
    Attributes:
        by_head: whether query, key and value of a head are side by side in the projection, see `decode_attention`.
    """

    by_head: bool
    layer_idx: int
    query_key_value: nn.Linear
    dense: nn.Linear

    def __init__(self, attention: Any):
        with torch.device("meta"):  # the linear layers come from the other one
            super().__init__(attention.config, attention.layer_idx)  # type: ignore[call-arg]
        self.query_key_value, self.dense = attention.query_key_value, attention.dense

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None = None,
        packed_sequences: PackedSequences | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]; for prompts (T > 1) and other caches as the class that it extends."""
        if hidden_states.shape[1] > 1 or not isinstance(cache, StaticCache) or attention_mask is None:
            return super().forward(  # type: ignore[misc]
                hidden_states, attention_mask, position_embeddings, cache, packed_sequences, **kwargs
            )
        from glm_kernels.decode_attention import decode_attention

        past = cache.layers[self.layer_idx]
        cos, sin = (table.flatten(1) for table in position_embeddings)  # [B, angles of a head]
        projected = self.query_key_value(hidden_states)[:, 0]
        visible = attention_mask[:, 0, 0].expand(len(projected), -1).contiguous()  # [B, S]
        output = decode_attention(
            projected, cos, sin, past.keys, past.values, visible, past.cumulative_length, by_head=self.by_head
        )
        past.cumulative_length += 1
        return self.dense(output[:, None])
