"""Batch layouts for training: samples one after the other in a single row, or, plainly, a padded row for each."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from chatglm import ChatGLMConfig, PackedSequences
from chatglm.modeling_chatglm import prefix_lm_position_ids
from qlora.data.dataset import IGNORE_INDEX


@dataclass
class PaddingCollator:
    """One sample a row, padded on the right: the plain layout.

    Returns, for N samples of at most T tokens: input_ids, attention_mask, labels, each [N, T].
    """

    config: ChatGLMConfig

    def __call__(self, samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = [torch.as_tensor(sample["input_ids"]) for sample in samples]
        labels = [torch.as_tensor(sample["labels"]) for sample in samples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.config.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }


@dataclass
class PaddingFreeCollator:
    """Concatenates samples into one row; each keeps its own positions and sees only itself.

    Returns, for N samples of T tokens altogether, L of which are labels:
        input_ids [1, T]; attention_mask [1, T], n for the n-th sample; position_ids [1, 2, T]; packed_sequences, the
        same layout for attention without a mask; labels [1, T]; logits_to_keep [L], positions that predict a label;
        shift_labels [1, L], what they predict.
    """

    config: ChatGLMConfig

    def __call__(self, samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | PackedSequences]:
        ids = [torch.as_tensor(sample["input_ids"]) for sample in samples]
        labels = torch.cat([torch.as_tensor(sample["labels"]) for sample in samples])
        padded = pad_sequence(ids, batch_first=True, padding_value=self.config.pad_token_id)
        position_ids = prefix_lm_position_ids(padded, None, self.config)
        lengths = torch.tensor([len(row) for row in ids])
        real = torch.arange(padded.shape[1]) < lengths[:, None]  # [N, longest]
        contexts = ((position_ids[:, 1] == 0) & real).sum(dim=1)
        targets = (labels != IGNORE_INDEX).nonzero()[:, 0]
        return {
            "input_ids": padded[real][None],
            "attention_mask": torch.arange(1, len(ids) + 1)[:, None].expand_as(padded)[real][None],
            "position_ids": position_ids.transpose(1, 2)[real].T[None],
            "packed_sequences": PackedSequences.of(torch.stack((contexts, lengths - contexts), dim=1).tolist()),
            "labels": labels[None],
            "logits_to_keep": targets - 1,
            "shift_labels": labels[targets][None],
        }
