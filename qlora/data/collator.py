"""Batch layouts for training: all samples in a single row without padding, or a padded row for each sample."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from glm_shared.description import ModelDescription
from glm_shared.packed_attention import PackedSequences
from qlora.data.batching import RowSize, Sample, count_tokens
from qlora.data.dataset import IGNORE_INDEX


@dataclass
class PaddingCollator:
    """One sample a row, padded on the right.

    Returns, for N samples of at most T tokens: input_ids, attention_mask, labels, each [N, T], long.
    """

    config: ModelDescription

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        ids = [sample["input_ids"] for sample in samples]
        labels = [sample["labels"] for sample in samples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.config.pad_token_id or 0),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }


@dataclass
class PaddingFreeCollator:
    """Concatenates samples into one row; each keeps its own positions and attends to itself only.

    A row can be filled up to a given size: with a sample of padding, with positions whose label is -100, and with
    empty tiles. What is added changes neither the loss nor a gradient.

    Returns, for N samples of T tokens altogether, L of which are labels:
        input_ids [1, T]; position_ids [1, ..., T]; packed_sequences, where the samples lie; logits_to_keep [L], the
        positions that predict a label; shift_labels [1, L], what they predict. All long.
    """

    config: ModelDescription

    def __call__(
        self, samples: list[Sample], size: RowSize | None = None
    ) -> dict[str, torch.Tensor | PackedSequences]:
        missing = size.tokens - count_tokens(samples) if size else 0
        if missing:
            samples = [*samples, self.padding(missing)]
        inputs = self.concatenate(samples)
        if size:
            labels = size.labels - inputs["shift_labels"].shape[1]
            assert missing >= 0 and labels >= 0, "the row is longer than its size"
            inputs["logits_to_keep"] = F.pad(inputs["logits_to_keep"], (0, labels))
            inputs["shift_labels"] = F.pad(inputs["shift_labels"], (0, labels), value=IGNORE_INDEX)
            inputs["packed_sequences"] = inputs["packed_sequences"].fill_up(size.tiles)
        return inputs

    def padding(self, tokens: int) -> Sample:
        """A sample without labels."""
        pad_token_id = self.config.pad_token_id or 0
        return {"input_ids": torch.full((tokens,), pad_token_id), "labels": torch.full((tokens,), IGNORE_INDEX)}

    def concatenate(self, samples: list[Sample]) -> dict:
        """The row without anything added."""
        ids = [sample["input_ids"] for sample in samples]
        labels = torch.cat([sample["labels"] for sample in samples])  # [T]
        padded = pad_sequence(ids, batch_first=True, padding_value=self.config.pad_token_id or 0)  # [N, longest]
        position_ids = self.config.position_ids(padded)  # [N, ..., longest]
        lengths = torch.tensor([len(row) for row in ids])  # [N]
        is_token = torch.arange(padded.shape[1]) < lengths[:, None]  # [N, longest]
        contexts = self.config.context_lengths(padded).minimum(lengths)  # [N]
        targets = (labels != IGNORE_INDEX).nonzero()[:, 0]  # [L]
        return {
            "input_ids": padded[is_token][None],
            "position_ids": position_ids.movedim(-1, 1)[is_token].movedim(0, -1)[None],
            "packed_sequences": PackedSequences.from_lengths(torch.stack((contexts, lengths - contexts), 1).tolist()),
            "logits_to_keep": targets - 1,
            "shift_labels": labels[targets][None],
        }
