"""ChatGLM-6B: a prefix language model with two-dimensional rotary positions and post-norm residuals.

Shapes: B rows, T query tokens, S key tokens (past and current), H heads, D head dimension, C hidden size, V vocabulary
size.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatglm.configuration_chatglm import ChatGLMConfig
from chatglm.packed_attention import packed_attention
from chatglm.rotary import ChatGLMRotaryEmbedding, split_and_rotate
from glm_shared.chat import ChatMixin
from glm_shared.modeling import (
    CausalLMMixin,
    SharedPreTrainedModel,
    SublayerBlock,
    TransformerMixin,
    eager_attention_forward,
    mask_lengths,
)
from glm_shared.packed_attention import PackedSequences

# The official blocks scale the residual for 28 layers whatever the number of layers in the configuration.
RESIDUAL_SCALE = math.sqrt(2 * 28)


def prefix_lm_mask(
    segment_ids: torch.Tensor | None,
    block_position: torch.Tensor,
    past_length: int | torch.Tensor,
    kv_length: int,
) -> torch.Tensor:
    """The attention mask: a query attends to keys of its sample that are in the prompt or not after it.

    `glm_shared.packed_attention.sample_mask` states the same rule for one of the samples concatenated in a row, and
    `glm_kernels.attention.prefix_lm_mask` states it in the kernels.

    Args:
        segment_ids: [B, past + T], 0 for padding, n for the n-th sample of the row. With one sample a row this is an
            ordinary attention mask. None: all tokens of a row belong to one sample.
        block_position: [B, T], 0 in the prompt.
        past_length: number of tokens in the cache.
        kv_length: S; more than past + T for a cache of fixed size.
    Returns:
        [B, 1, T, S], bool, True where the key is visible. Padding is visible to padding, so that no softmax is empty.
    """
    B, T = block_position.shape
    query_index = torch.arange(T, device=block_position.device) + past_length
    key_index = torch.arange(kv_length, device=block_position.device)
    prompt_keys = torch.zeros(B, kv_length, dtype=torch.bool, device=block_position.device)
    prompt_keys.index_copy_(1, query_index, block_position == 0)
    visible = (key_index <= query_index[:, None]) | prompt_keys[:, None, :]
    if segment_ids is not None:
        segment_of_keys = F.pad(segment_ids, (0, kv_length - segment_ids.shape[1]))
        visible = visible & (segment_ids[:, -T:, None] == segment_of_keys[:, None, :])
    return visible[:, None]


class ChatGLMAttention(nn.Module):
    """Self-attention with query, key and value of each head side by side in one projection."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None = None,
        packed_sequences: PackedSequences | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Self-attention.

        Args:
            hidden_states: [B, T, C].
            attention_mask: [B, 1, T, S], bool; not used with `packed_sequences`.
            position_embeddings: cos and sin, each [B, T, 1, 2, D / 2].
            cache: the keys and values of earlier tokens, to which those of these tokens are added.
            packed_sequences: where the samples lie, if several are concatenated in a single row.
        Returns:
            [B, T, C].
        """
        projected = self.query_key_value(hidden_states)
        if packed_sequences is not None:
            return self.dense(packed_attention(projected, position_embeddings, packed_sequences, self.head_dim))
        states = split_and_rotate(projected, *position_embeddings, self.head_dim)
        query, key, value = (state.transpose(1, 2) for state in states)  # [B, H, T, D]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.dense(output.flatten(2))


class ChatGLMMLP(nn.Module):
    """Two linear layers with a GELU (tanh approximation) between them."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ResidualNorm(nn.LayerNorm):
    """The layer norm before a sub-layer; the residual around the sub-layer is its scaled output.

    normed = norm(x)        output = RESIDUAL_SCALE * normed + sublayer(normed)
    """

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """[..., C] -> the input of the sub-layer and that of `add_residual`, each [..., C]."""
        normed = super().forward(hidden_states)
        return normed, normed

    def add_residual(self, sublayer_output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """RESIDUAL_SCALE * residual + sublayer_output; [..., C], [..., C] -> [..., C]."""
        return torch.add(sublayer_output, residual, alpha=RESIDUAL_SCALE)


class ChatGLMBlock(SublayerBlock):
    """One transformer block."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = ResidualNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = ResidualNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)


class ChatGLMPreTrainedModel(SharedPreTrainedModel):
    """Base class: what transformers needs to know of this model."""

    config_class = ChatGLMConfig
    config: ChatGLMConfig
    _no_split_modules = ["ChatGLMBlock"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]


class ChatGLMModel(TransformerMixin, ChatGLMPreTrainedModel):
    """Embedding, blocks and final norm, without the head."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = ChatGLMRotaryEmbedding(config)
        self.layers = nn.ModuleList(ChatGLMBlock(config, layer_idx) for layer_idx in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.layers

    @property
    def rotary(self) -> ChatGLMRotaryEmbedding:  # type: ignore[override]
        return self.rotary_emb

    @property
    def final_norm(self) -> nn.LayerNorm:  # type: ignore[override]
        return self.final_layernorm

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.word_embeddings = value

    def attention_mask(
        self, segment_ids: torch.Tensor | None, position_ids: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        """The mask of `prefix_lm_mask`, [B, 1, T, S], bool, for positions [B, 2, T]."""
        return prefix_lm_mask(segment_ids, position_ids[:, 1], *mask_lengths(position_ids, cache))


class ChatGLMForConditionalGeneration(ChatMixin, CausalLMMixin, ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its head, which shares the embedding's weight.

    Source: modeling_chatglm.py of THUDM/chatglm-6b, whose outputs the tests compare with.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True):
        """Ties the head to the embedding.

        Args:
            missing_keys, recompute_mapping: see `PreTrainedModel.tie_weights`.
        Raises:
            ValueError: a checkpoint has both weights, with different values.
        """
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)
        loading = missing_keys is not None
        if loading and self.config.tie_word_embeddings and not self.all_tied_weights_keys:
            raise ValueError(
                "lm_head.weight and transformer.word_embeddings.weight of this checkpoint differ. In ChatGLM-6B they "
                "are one tensor: the files are damaged, or of another model. Download them again."
            )

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, attention_mask=None, **kwargs) -> dict:
        """Adds the positions; they depend on where `[gMASK]` and `<sop>` are in the complete sequence.

        Args:
            input_ids: [B, all tokens so far], long.
            attention_mask: [B, all tokens so far], 0 for padding.
            kwargs: see `GenerationMixin.prepare_inputs_for_generation`.
        Raises:
            ValueError: `input_ids` are only a part of the sequence.
        """
        if attention_mask is not None and attention_mask.shape[1] != input_ids.shape[1]:
            raise ValueError("A prompt cannot be read in pieces: all of it sees all of it. Give generate all tokens.")
        kwargs["position_ids"] = self.config.position_ids(input_ids, attention_mask)
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)

    @classmethod
    def official_buffers(cls, config: ChatGLMConfig) -> dict[str, torch.Tensor]:
        inv_freq = ChatGLMRotaryEmbedding(config).inv_freq
        return {f"transformer.layers.{i}.attention.rotary_emb.inv_freq": inv_freq for i in range(config.num_layers)}


__all__ = ["ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMPreTrainedModel"]
