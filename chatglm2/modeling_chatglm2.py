"""ChatGLM2-6B and ChatGLM3-6B: a causal language model with grouped queries, RMS norms and gated MLPs.

Shapes: B rows, T query tokens, S key tokens (past and current), H heads of queries, G heads of keys and values, D head
dimension, C hidden size, V vocabulary size.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatglm2.activation import gated_activation
from chatglm2.configuration_chatglm2 import ChatGLM2Config
from chatglm2.packed_attention import packed_attention
from chatglm2.rotary import ChatGLM2RotaryEmbedding, split_and_rotate
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


def causal_mask(
    segment_ids: torch.Tensor | None, T: int, past_length: int | torch.Tensor, kv_length: int, device: torch.device
) -> torch.Tensor:
    """The attention mask: a query attends to the keys of its sample that are not after it.

    Args:
        segment_ids: [B, past + T], 0 for padding, n for the n-th sample of the row. With one sample a row this is an
            ordinary attention mask. None: all tokens of a row belong to one sample.
        T: number of queries.
        past_length: number of tokens in the cache.
        kv_length: S; more than past + T for a cache of fixed size.
        device: of the mask without `segment_ids`.
    Returns:
        [B or 1, 1, T, S], bool, True where the key is visible. A query attends at least to itself.
    """
    query_index = torch.arange(T, device=device) + past_length
    key_index = torch.arange(kv_length, device=device)
    visible = (key_index <= query_index[:, None])[None]
    if segment_ids is not None:
        segment_of_keys = F.pad(segment_ids, (0, kv_length - segment_ids.shape[1]))
        visible = visible & (segment_ids[:, -T:, None] == segment_of_keys[:, None, :])
    return visible[:, None]


class ChatGLM2Attention(nn.Module):
    """Self-attention in which a head of keys and values serves several heads of queries."""

    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.head_dim = config.kv_channels
        self.num_key_value_groups = self.heads // self.groups  # by which transformers' SDPA repeats keys and values
        self.scaling = self.head_dim**-0.5
        (projected, hidden), (_, output) = config.attention_shapes.values()
        self.query_key_value = nn.Linear(hidden, projected)
        self.dense = nn.Linear(output, hidden, bias=False)

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
            attention_mask: [B or 1, 1, T, S], bool; not used with `packed_sequences`.
            position_embeddings: cos and sin, each [B, T, 1, D / 4].
            cache: the keys and values of earlier tokens, to which those of these tokens are added.
            packed_sequences: where the samples lie, if several are concatenated in a single row.
        Returns:
            [B, T, C].
        """
        projected = self.query_key_value(hidden_states)
        if packed_sequences is not None:
            output = packed_attention(projected, position_embeddings, packed_sequences, self.heads, self.groups)
            return self.dense(output)
        states = split_and_rotate(projected, *position_embeddings, self.heads, self.groups)
        query, key, value = (state.transpose(1, 2) for state in states)  # [B, H, T, D], [B, G, T, D], [B, G, T, D]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.dense(output.flatten(2))


class ChatGLM2MLP(nn.Module):
    """Two linear layers; between them the first half of the features, through SiLU, is multiplied by the second."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.dense_4h_to_h(gated_activation(self.dense_h_to_4h(hidden_states)))


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x ** 2) + eps), all of it in fp32.

    Source: "Root Mean Square Layer Normalization"; modeling_chatglm.py of THUDM/chatglm2-6b.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        x = hidden_states.float()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(hidden_states.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return self.normalize(hidden_states)


class SublayerNorm(RMSNorm):
    """The norm before a sub-layer; the residual around the sub-layer is the norm's input."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """[..., C] -> the input of the sub-layer and that of `add_residual`, each [..., C]."""
        return self.normalize(hidden_states), hidden_states

    def add_residual(self, sublayer_output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[..., C], [..., C] -> [..., C]."""
        return residual + sublayer_output


class ChatGLM2Block(SublayerBlock):
    """One transformer block."""

    attention_name = "self_attention"

    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = SublayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = ChatGLM2Attention(config, layer_idx)
        self.post_attention_layernorm = SublayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = ChatGLM2MLP(config)


class ChatGLM2PreTrainedModel(SharedPreTrainedModel):
    """Base class: what transformers needs to know of this model."""

    config_class = ChatGLM2Config
    config: ChatGLM2Config
    _no_split_modules = ["ChatGLM2Block"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)


class Embedding(nn.Module):
    """The embedding under the name of the official files."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """The blocks and the final norm under the names of the official files."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.layers = nn.ModuleList(ChatGLM2Block(config, layer_idx) for layer_idx in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


class ChatGLM2Model(TransformerMixin, ChatGLM2PreTrainedModel):
    """Embedding, blocks and final norm; the head belongs to it as in the official files, and is not applied here."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = ChatGLM2RotaryEmbedding(config)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.encoder.layers

    @property
    def rotary(self) -> ChatGLM2RotaryEmbedding:  # type: ignore[override]
        return self.rotary_pos_emb

    @property
    def final_norm(self) -> RMSNorm:  # type: ignore[override]
        return self.encoder.final_layernorm

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embedding.word_embeddings = value

    def attention_mask(
        self, segment_ids: torch.Tensor | None, position_ids: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        """The mask of `causal_mask`, [B or 1, 1, T, S], bool, for positions [B, T]."""
        return causal_mask(
            segment_ids, position_ids.shape[-1], *mask_lengths(position_ids, cache), device=position_ids.device
        )


class ChatGLM2ForConditionalGeneration(ChatMixin, CausalLMMixin, ChatGLM2PreTrainedModel, GenerationMixin):
    """ChatGLM2-6B or ChatGLM3-6B with its head.

    Source: modeling_chatglm.py of THUDM/chatglm2-6b, whose outputs the tests compare with.
    """

    def __init__(self, config: ChatGLM2Config):
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.transformer.output_layer = new_embeddings

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, attention_mask=None, **kwargs) -> dict:
        """Adds the positions of all tokens so far, which count from the first that is no padding."""
        kwargs["position_ids"] = self.config.position_ids(input_ids, attention_mask)
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)

    @classmethod
    def official_buffers(cls, config: ChatGLM2Config) -> dict[str, torch.Tensor]:
        return {"transformer.rotary_pos_emb.inv_freq": ChatGLM2RotaryEmbedding(config).inv_freq}


__all__ = ["ChatGLM2ForConditionalGeneration", "ChatGLM2Model", "ChatGLM2PreTrainedModel"]
