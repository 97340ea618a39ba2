"""What the models have in common: blocks that can recompute their activations, the forward pass, and the loss.

Shapes: B rows, T query tokens, S key tokens (past and current), H heads of queries, G heads of keys and values, D head
dimension, C hidden size, V vocabulary size.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from glm_shared.loss import linear_cross_entropy
from glm_shared.packed_attention import PackedSequences
from glm_shared.rotary import RotaryEmbedding


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(scaling * Q K^T) V in plain operations, the softmax in fp32; no dropout.

    Args:
        module: the attention module, not used.
        query, key, value: [B, H, T, D], [B, G, S, D], [B, G, S, D].
        attention_mask: [B, 1, T, S], bool, True where the key is visible; None where every key is.
        scaling: factor of the scores.
    Returns:
        The output [B, T, H, D], and the attention weights [B, H, T, S].
    """
    key, value = (state.repeat_interleave(query.shape[1] // state.shape[1], dim=1) for state in (key, value))
    scores = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class SharedPreTrainedModel(PreTrainedModel):
    """Base class: the initialization of weights, and the attributes that tell transformers what the model supports."""

    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.inverse_frequencies())


class SublayerBlock(GradientCheckpointingLayer):
    """A transformer block of two sub-layers: attention and MLP, each with a norm before it and a residual around it.

    A norm returns the input of the sub-layer and that of its `add_residual`. Each of the two sub-layers can recompute
    its activations in the backward pass, so that only its input is saved. transformers' gradient checkpointing is a
    separate setting, which recomputes the whole block.

    Args:
        attention_name: of the attention, which as the official files call it is an attribute of the block.
    """

    input_layernorm: Any  # a module that returns two tensors, with `add_residual`
    post_attention_layernorm: Any
    mlp: nn.Module
    attention_name = "attention"

    def __init__(self):
        super().__init__()
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
            kwargs: the other arguments of the attention's `forward`.
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
        return self.input_layernorm.add_residual(getattr(self, self.attention_name)(normed, **kwargs), residual)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The MLP sub-layer, [B, T, C] -> [B, T, C]."""
        normed, residual = self.post_attention_layernorm(hidden_states)
        return self.post_attention_layernorm.add_residual(self.mlp(normed), residual)


def select_positions(hidden_states: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
    """[B, T, C] -> [B, positions, C]."""
    if isinstance(positions, slice):
        return hidden_states[:, positions]
    return hidden_states.index_select(1, positions)


class TransformerMixin:
    """The forward pass of embedding, blocks and final norm, without the head.

    Attributes:
        blocks: the SublayerBlocks.
        rotary: position_ids, dtype -> the position embeddings that the blocks take.
        final_norm: after the last block.
    """

    config: Any
    training: bool
    get_input_embeddings: Callable[[], nn.Module]
    blocks: nn.ModuleList
    rotary: nn.Module
    final_norm: nn.Module

    def attention_mask(
        self, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        """The mask [B, 1, T, S], bool, for the present tokens and a cache.

        Args:
            attention_mask: [B, past + T], 0 for padding, n for the n-th sample of the row; None for no padding.
            position_ids: [B, ..., T].
            cache: the keys and values of earlier tokens.
        """
        raise NotImplementedError

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
            The other arguments are those of `CausalLMMixin.forward`.
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
                raise ValueError("With inputs_embeds or a filled cache, pass position_ids.")
            position_ids = self.config.position_ids(input_ids, attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        if packed_sequences is None and (attention_mask is None or attention_mask.dim() == 2):
            attention_mask = self.attention_mask(attention_mask, position_ids, cache)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary(position_ids, hidden_states.dtype)
        for block in self.blocks:
            hidden_states = block(
                hidden_states,
                output_positions=output_positions if block is self.blocks[-1] else None,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                cache=cache,
                packed_sequences=packed_sequences,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.final_norm(hidden_states), cache)


def mask_lengths(position_ids: torch.Tensor, cache: Cache | None) -> tuple[int | torch.Tensor, int]:
    """The number of tokens in the cache, and S, more than these and the present ones for a cache of fixed size."""
    T = position_ids.shape[-1]
    return (0, T) if cache is None else (cache.get_seq_length(), cache.get_mask_sizes(T, 0)[0])


class CausalLMMixin:
    """The forward pass with the head, and with labels the loss."""

    config: Any
    transformer: Any  # a TransformerMixin
    get_output_embeddings: Callable[[], nn.Linear]
    loss_function: Callable[..., torch.Tensor]

    @property
    def blocks(self) -> nn.ModuleList:
        """The SublayerBlocks, from the first to the last."""
        return self.transformer.blocks

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
            position_ids: [B, ..., T], long, see `ModelDescription.position_ids`. If they are None, they are derived
                from `input_ids`, which must then be one sample a row, without earlier tokens in the cache.
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
            ValueError: see `TransformerMixin.forward`.
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
        head = self.get_output_embeddings()
        if shift_labels is not None:
            loss = linear_cross_entropy(
                hidden_states.flatten(0, 1), head.weight, shift_labels.flatten(), num_items_in_batch
            )
        else:
            logits = head(hidden_states)
        if labels is not None and shift_labels is None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss, logits, *present_cache)

    def create_masks_for_generate(
        self, config, inputs_embeds, attention_mask, cache=None, position_ids=None, past_key_values=None, **kwargs
    ) -> torch.Tensor:
        """The mask [B, 1, T, S] for a cache of fixed size; `generate` calls it before a compiled forward pass."""
        return self.transformer.attention_mask(
            attention_mask, position_ids, past_key_values if cache is None else cache
        )

    @classmethod
    def official_buffers(cls, config) -> dict[str, torch.Tensor]:
        """Name -> tensor of what official files hold beside the weights, for a configuration."""
        raise NotImplementedError
