"""ChatGLM-6B: a prefix language model with two-dimensional rotary positions and post-norm residuals.

Shapes: B rows, T query tokens, S key tokens (past and current), H heads, D head dimension, C hidden size, V vocabulary
size.
"""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatglm.chat import ChatMixin
from chatglm.configuration_chatglm import ChatGLMConfig
from chatglm.loss import linear_cross_entropy
from chatglm.packed_attention import PackedSequences, packed_attention
from chatglm.rotary import ChatGLMRotaryEmbedding, split_and_rotate

# The official blocks scale the residual for 28 layers whatever the number of layers in the configuration.
RESIDUAL_SCALE = math.sqrt(2 * 28)


def first_index(matches: torch.Tensor) -> torch.Tensor:
    """Index of the first True of each row [B, T] -> [B, 1]; T for a row that has none."""
    found = matches.any(dim=1, keepdim=True)
    return torch.where(found, matches.int().argmax(dim=1, keepdim=True), matches.shape[1])


def prefix_lm_position_ids(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: ChatGLMConfig
) -> torch.Tensor:
    """Two-dimensional positions, for rows of one sample each, padded on the left or on the right.

    Before the first `<sop>`: `position` is 0, 1, 2, ... and `block_position` is 0. From `<sop>` on: `position` is that
    of the first `[gMASK]`, or else of the first `[MASK]`, or else of the last token before `<sop>`, and
    `block_position` is 1, 2, 3, ...

    Args:
        input_ids: [B, T], long.
        attention_mask: [B, T], 0 for padding; None where there is no padding on the left.
        config: with the ids of `<sop>`, `[gMASK]` and `[MASK]`.
    Returns:
        [B, 2, T], long: `position`, `block_position`.
    Source: "GLM: General Language Model Pretraining with Autoregressive Blank Infilling", section 2.1.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    start = 0 if attention_mask is None else first_index(attention_mask != 0)
    context_end = first_index(input_ids == config.bos_token_id)  # type: ignore[arg-type]
    gmask, mask = first_index(input_ids == config.gmask_token_id), first_index(input_ids == config.mask_token_id)
    blank = torch.where(gmask < input_ids.shape[1], gmask, mask).minimum(context_end - 1)
    in_context = index < context_end
    position = (torch.where(in_context, index, blank) - start).clamp(min=0)
    block_position = torch.where(in_context, 0, index - context_end + 1)
    return torch.stack((position, block_position), dim=1)


def prefix_lm_mask(
    segment_ids: torch.Tensor | None,
    block_position: torch.Tensor,
    past_length: int | torch.Tensor,
    kv_length: int,
) -> torch.Tensor:
    """The attention mask: a query attends to keys of its sample that are in the prompt or not after it.

    `chatglm.packed_attention.sample_mask` states the same rule for one of the samples concatenated in a row, and
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


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(scaling * Q K^T) V in plain operations, the softmax in fp32; no dropout.

    Args:
        module: the attention module, not used.
        query, key, value: [B, H, T, D], [B, H, S, D], [B, H, S, D].
        attention_mask: [B, 1, T, S], bool, True where the key is visible; None where every key is.
        scaling: factor of the scores.
    Returns:
        The output [B, T, H, D], and the attention weights [B, H, T, S].
    """
    scores = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class ChatGLMAttention(nn.Module):
    """Self-attention with query, key and value of each head side by side in one projection."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # every call has an explicit mask
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


class ChatGLMBlock(GradientCheckpointingLayer):
    """One transformer block: attention and MLP, each with a layer norm before it and a residual around it.

    Each of the two sub-layers can recompute its activations in the backward pass, so that only its input is saved.
    transformers' gradient checkpointing is a separate setting, which recomputes the whole block.
    """

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = ResidualNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = ResidualNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)
        self.recompute_attention = False
        self.recompute_mlp = False
        self.preserve_rng_state = True  # recomputing restores the random generators, for layers that draw from them
        self.offload = None  # an ActivationOffload, in whose `context()` the inputs are saved

    def forward(
        self, hidden_states: torch.Tensor, output_positions: slice | torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """The block's output.

        Args:
            hidden_states: [B, T, C].
            output_positions: a slice, or a 1-D tensor of positions, for which the output is needed; the other
                positions are only keys and values. None for all.
            kwargs: the other arguments of `ChatGLMAttention.forward`.
        Returns:
            [B, T, C], or [B, output positions, C].
        """
        hidden_states = self.run_sublayer(self.attend, self.recompute_attention, hidden_states, **kwargs)
        if output_positions is not None:
            hidden_states = select_positions(hidden_states, output_positions)
        return self.run_sublayer(self.feed_forward, self.recompute_mlp, hidden_states)

    def run_sublayer(
        self, sublayer: Callable[..., torch.Tensor], recompute: bool, hidden_states: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        """The output of a sub-layer, whose activations are saved for the backward pass or recomputed in it."""
        if recompute and self.training and torch.is_grad_enabled():
            with self.offload.context() if self.offload else contextlib.nullcontext():
                kwargs |= {"use_reentrant": False, "preserve_rng_state": self.preserve_rng_state}
                return checkpoint(sublayer, hidden_states, **kwargs)
        return sublayer(hidden_states, **kwargs)

    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """The attention sub-layer, [B, T, C] -> [B, T, C]."""
        normed, residual = self.input_layernorm(hidden_states)
        return self.input_layernorm.add_residual(self.attention(normed, **kwargs), residual)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The MLP sub-layer, [B, T, C] -> [B, T, C]."""
        normed, residual = self.post_attention_layernorm(hidden_states)
        return self.post_attention_layernorm.add_residual(self.mlp(normed), residual)


def select_positions(hidden_states: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
    """[B, T, C] -> [B, positions, C]."""
    if isinstance(positions, slice):
        return hidden_states[:, positions]
    return hidden_states.index_select(1, positions)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Base class: the initialization of weights, and the attributes that tell transformers what the model supports."""

    config_class = ChatGLMConfig
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ChatGLMRotaryEmbedding):
            init.copy_(module.inv_freq, module.inverse_frequencies())


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, blocks and final norm, without the head."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = ChatGLMRotaryEmbedding(config)
        self.layers = nn.ModuleList(ChatGLMBlock(config, layer_idx) for layer_idx in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.word_embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        packed_sequences: PackedSequences | None = None,
        output_positions: slice | torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The hidden states after the final norm.

        Args:
            output_positions: a slice, or a 1-D tensor of positions, for which they are needed; None for all.
            The other arguments are those of `ChatGLMForConditionalGeneration.forward`.
        Returns:
            The hidden states [B, T, C] or [B, output positions, C], and the cache (or None).
        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds` are given, or `position_ids` are missing
                where they cannot be derived from `input_ids`.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds, not both and not neither.")
        if position_ids is None:
            if input_ids is None or (cache is not None and cache.get_seq_length() > 0):
                raise ValueError("With inputs_embeds or a filled cache, pass position_ids of shape [B, 2, T].")
            position_ids = prefix_lm_position_ids(input_ids, attention_mask, self.config)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        if packed_sequences is None and (attention_mask is None or attention_mask.dim() == 2):
            attention_mask = self.attention_mask(attention_mask, position_ids, cache)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(position_ids, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                output_positions=output_positions if layer is self.layers[-1] else None,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                cache=cache,
                packed_sequences=packed_sequences,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.final_layernorm(hidden_states), cache)

    @staticmethod
    def attention_mask(
        segment_ids: torch.Tensor | None, position_ids: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        """The mask of `prefix_lm_mask` for the present tokens and a cache.

        Args:
            segment_ids: [B, past + T], as for `prefix_lm_mask`.
            position_ids: [B, 2, T].
            cache: the keys and values of earlier tokens.
        Returns:
            [B, 1, T, S], bool.
        """
        T = position_ids.shape[-1]
        if cache is None:
            past_length, kv_length = 0, T
        else:
            past_length, kv_length = cache.get_seq_length(), cache.get_mask_sizes(T, 0)[0]
        return prefix_lm_mask(segment_ids, position_ids[:, 1], past_length, kv_length)


class ChatGLMForConditionalGeneration(ChatMixin, ChatGLMPreTrainedModel, GenerationMixin):
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

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        shift_labels: torch.Tensor | None = None,
        packed_sequences: PackedSequences | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits and, with labels, the cross-entropy in fp32.

        Args:
            input_ids: [B, T], long.
            attention_mask: [B, past + T], long: 0 for padding, n for the n-th sample of the row, so 1 for all tokens
                where a row is one sample. Or the mask itself, [B, 1, T, S], bool.
            position_ids: [B, 2, T], long. If they are None, they are derived from `input_ids`, which must then be one
                sample a row, without earlier tokens in the cache.
            cache: the keys and values of earlier tokens.
            inputs_embeds: [B, T, C], instead of `input_ids`.
            labels: [B, T], long, -100 where no loss is computed; logits at t predict label t + 1.
            use_cache: whether to return a cache; None for the configuration's value. In training a cache is returned
                only if one was given.
            logits_to_keep: number of the last positions that get logits, 0 for all; or a 1-D tensor of positions.
            shift_labels: [B, output positions], long: the label of each position of `logits_to_keep`; -100 for none.
                The loss is then computed a slice of rows at a time, and no logits are returned.
            packed_sequences: where the samples lie, if several are concatenated in a single row; `attention_mask` is
                then not used.
            num_items_in_batch: divisor of the summed loss, the label tokens of all micro-batches of one optimizer
                step; None for the label tokens of this batch.
            past_key_values: the name of `cache` before transformers 5.24.
        Returns:
            loss (scalar, fp32, or None), logits [B, output positions, V] (or None), the cache (or None).
        Raises:
            ValueError: see `ChatGLMModel.forward`.
        """
        output_positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states, *present_cache = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            packed_sequences=packed_sequences,
            output_positions=output_positions,
            past_key_values=past_key_values,
            **kwargs,
        ).to_tuple()
        loss = logits = None
        if shift_labels is not None:
            loss = linear_cross_entropy(
                hidden_states.flatten(0, 1), self.lm_head.weight, shift_labels.flatten(), num_items_in_batch
            )
        else:
            logits = self.lm_head(hidden_states)
        if labels is not None and shift_labels is None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss, logits, *present_cache)

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
        kwargs["position_ids"] = prefix_lm_position_ids(input_ids, attention_mask, self.config)
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)

    def create_masks_for_generate(
        self, config, inputs_embeds, attention_mask, cache=None, position_ids=None, past_key_values=None, **kwargs
    ) -> torch.Tensor:
        """The mask [B, 1, T, S] for a cache of fixed size; `generate` calls it before a compiled forward pass."""
        return self.transformer.attention_mask(
            attention_mask, position_ids, past_key_values if cache is None else cache
        )


__all__ = ["ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMPreTrainedModel"]
