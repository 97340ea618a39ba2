"""Attention for samples concatenated in one row, without a mask: what no token may see is never computed.

A prefix language model needs two calls over the samples: the prompt sees the prompt, in both directions; the answer
sees its whole sample, causally. On a GPU both are variable-length FlashAttention calls; elsewhere one SDPA call a
sample. Registered with transformers as the attention implementation "packed".

Shapes: B is 1, T tokens, H heads, D head dimension, N samples.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class PackedRow(NamedTuple):
    """Where the samples of a row lie. `lengths` are on the host, the tensors beside the activations."""

    lengths: list[tuple[int, int]]  # N pairs: tokens of the context, which all see each other, and tokens after it
    context_index: torch.Tensor  # [tokens of all contexts], their positions in the row
    answer_index: torch.Tensor  # [tokens of all answers]
    context_offsets: torch.Tensor  # [N + 1], int32: where each context begins among the contexts
    answer_offsets: torch.Tensor  # [N + 1], int32
    sample_offsets: torch.Tensor  # [N + 1], int32: where each sample begins in the row

    @classmethod
    def of(cls, lengths: list[tuple[int, int]]) -> "PackedRow":
        """The layout of N samples of (context, answer) tokens, on the CPU."""
        pairs = torch.tensor(lengths)
        in_context = torch.tensor([True, False]).repeat(len(lengths)).repeat_interleave(pairs.flatten())
        offsets = F.pad(torch.cat((pairs, pairs.sum(1, keepdim=True)), dim=1).cumsum(0), (0, 0, 1, 0)).int()
        return cls(lengths, in_context.nonzero()[:, 0], (~in_context).nonzero()[:, 0], *offsets.T.contiguous())

    def to(self, device: torch.device) -> "PackedRow":
        """The same layout with its tensors on `device`."""
        return PackedRow(self.lengths, *(tensor.to(device, non_blocking=True) for tensor in self[1:]))


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    packed_row: PackedRow | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The interface transformers expects; [1, H, T, D] -> [1, T, H, D]. Without `packed_row`, plain SDPA."""
    if packed_row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if flash_attention_runs_on(query):
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, H, D]
        return flash_attention(query, key, value, packed_row, scaling)[None], None
    return attention_by_sample(query, key, value, packed_row, scaling), None


def flash_attention_runs_on(query: torch.Tensor) -> bool:
    """FlashAttention needs 16-bit numbers and an Ampere GPU or newer."""
    return query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow, scaling: float
) -> torch.Tensor:
    """Two variable-length calls; [T, H, D] -> [T, H, D]."""
    longest_context = max(context for context, _ in row.lengths)
    longest_answer = max(answer for _, answer in row.lengths)
    longest_sample = max(map(sum, row.lengths))
    context = row.context_index
    context_output = varlen_attn(
        *(states.index_select(0, context) for states in (query, key, value)),
        *(row.context_offsets, row.context_offsets, longest_context, longest_context),
        scale=scaling,
    )
    answer_output = varlen_attn(
        *(query.index_select(0, row.answer_index), key, value),
        *(row.answer_offsets, row.sample_offsets, longest_answer, longest_sample),
        scale=scaling,
        window_size=(-1, 0),
    )
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    return output.index_copy(0, context, context_output).index_copy(0, row.answer_index, answer_output)


def attention_by_sample(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow, scaling: float
) -> torch.Tensor:
    """One masked SDPA call a sample; [1, H, T, D] -> [1, T, H, D]."""
    sizes = [context + answer for context, answer in row.lengths]
    outputs = []
    for (context, _), *states in zip(row.lengths, *(s.split(sizes, dim=2) for s in (query, key, value)), strict=True):
        index = torch.arange(states[0].shape[2], device=query.device)
        visible = (index <= index[:, None]) | (index < context)
        outputs.append(F.scaled_dot_product_attention(*states, attn_mask=visible, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2)


AttentionInterface.register("packed", packed_attention_forward)
