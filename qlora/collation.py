"""The batch layout for training: samples one after the other in a single row, without padding."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from chatglm.configuration_chatglm import ChatGLMConfig
from chatglm.modeling_chatglm import prefix_lm_position_ids
from qlora.data import IGNORE_INDEX


@dataclass
class ConcatenatingCollator:
    """Concatenates samples into one row; each keeps its own positions and sees only itself.

    Returns, for N samples of T tokens altogether, L of which are labels:
        input_ids [1, T]; attention_mask [1, T], n for the n-th sample; position_ids [1, 2, T]; labels [1, T];
        logits_to_keep [L], the positions that predict a label; shift_labels [1, L], what they predict.
    """

    config: ChatGLMConfig

    def __call__(self, samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(sample["input_ids"]) for sample in samples]
        labels = torch.cat([torch.tensor(sample["labels"]) for sample in samples])
        padded = pad_sequence(ids, batch_first=True, padding_value=self.config.pad_token_id)
        position_ids = prefix_lm_position_ids(padded, None, self.config)
        segment_ids = [torch.full_like(row, number) for number, row in enumerate(ids, 1)]
        targets = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        return {
            "input_ids": torch.cat(ids)[None],
            "attention_mask": torch.cat(segment_ids)[None],
            "position_ids": torch.cat([row[:, : len(i)] for row, i in zip(position_ids, ids, strict=True)], dim=1)[
                None
            ],
            "labels": labels[None],
            "logits_to_keep": targets - 1,
            "shift_labels": labels[targets][None],
        }
