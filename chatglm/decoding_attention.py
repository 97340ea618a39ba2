"""Attention of one new token a sequence in a single kernel, for decoding with a cache of fixed size."""

import torch
from transformers.cache_utils import Cache, StaticCache

from chatglm.modeling_chatglm import ChatGLMAttention
from glm_shared.packed_attention import PackedSequences


class DecodingAttention(ChatGLMAttention):
    """A `ChatGLMAttention` whose decoding step, from projection to output, is one kernel; takes over its layers."""

    def __init__(self, attention: ChatGLMAttention):
        with torch.device("meta"):  # the linear layers come from the other one
            super().__init__(attention.config, attention.layer_idx)
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
            return super().forward(
                hidden_states, attention_mask, position_embeddings, cache, packed_sequences, **kwargs
            )
        from glm_kernels.decode_attention import decode_attention

        past = cache.layers[self.layer_idx]
        cos, sin = (table.reshape(-1, self.head_dim) for table in position_embeddings)  # [B, D]
        projected = self.query_key_value(hidden_states)[:, 0]  # [B, 3C]
        visible = attention_mask[:, 0, 0]  # [B, S]
        output = decode_attention(projected, cos, sin, past.keys, past.values, visible, past.cumulative_length)
        past.cumulative_length += 1
        return self.dense(output[:, None])
