"""The samples of an optimizer step, and their division into micro-batches."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from qlora.data.dataset import IGNORE_INDEX

# `input_ids` and `labels`, [tokens], long; `line`, `element`, `turn` and `file` where they are known
Sample: TypeAlias = dict


class SourceRow(NamedTuple):
    """The file of a sample, empty where there is one data file only, and the number of its line, or array element.

    And the turn of its conversation from 1, or 0 for the whole row.
    """

    file: str
    kind: str
    number: int
    turn: int = 0

    def __str__(self) -> str:
        return f"{self.number} (turn {self.turn})" if self.turn else str(self.number)

    @classmethod
    def of(cls, sample: Sample) -> "SourceRow":
        """Where a sample that has a line is from."""
        kind = "element" if sample.get("element") else "line"
        return cls(sample.get("file", ""), kind, sample[kind], sample.get("turn", 0))


@dataclass
class StepBatch:
    """The samples of one optimizer step on one process; the data loader's batch.

    It is no list, because the Trainer and accelerate would move, split or pad a list of tensors.
    """

    samples: list[Sample]

    @classmethod
    def collate(cls, samples: list[dict]) -> "StepBatch":
        """Samples with lists of ints -> the same samples with tensors."""
        tensors = [{name: torch.as_tensor(sample[name]) for name in ("input_ids", "labels")} for sample in samples]
        return cls([sample | tensor for sample, tensor in zip(samples, tensors, strict=True)])

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, prompts and answers."""
        return count_tokens(self.samples)

    @property
    def source_rows(self) -> list[SourceRow]:
        """Where each sample is from, if it has a line."""
        return [SourceRow.of(sample) for sample in self.samples if "line" in sample]


def count_tokens(samples: list[Sample]) -> int:
    """Tokens of samples, prompts and answers."""
    return sum(len(sample["input_ids"]) for sample in samples)


def count_labels(samples: list[Sample]) -> int:
    """Label tokens of samples."""
    return sum(int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples)


def split_evenly(samples: list[Sample], max_tokens: int) -> list[list[Sample]]:
    """Divides samples into few micro-batches of at most `max_tokens` tokens, about equally long.

    Greedy: the longest sample first, each to the micro-batch with the fewest tokens; one more micro-batch is tried
    until all are within the limit. A sample longer than `max_tokens` has a micro-batch to itself.
    """
    by_length = sorted(samples, key=lambda sample: len(sample["input_ids"]), reverse=True)
    for count in range(min(len(samples), -(-count_tokens(samples) // max_tokens)), len(samples) + 1):
        micro_batches: list[list[Sample]] = [[] for _ in range(count)]
        sizes = [0] * count
        for sample in by_length:
            smallest = sizes.index(min(sizes))
            micro_batches[smallest].append(sample)
            sizes[smallest] += len(sample["input_ids"])
        if max(sizes) <= max_tokens or count == len(samples):
            break
    return [micro_batch for micro_batch in micro_batches if micro_batch]


def own_samples(batch: list[Sample], number: int, batch_size: int, total: int) -> list[Sample]:
    """The samples of the batch of this number, without those that repeat samples of an earlier batch.

    Processes take batches in turn. accelerate fills the last ones up with the first samples of the data set, so that
    every process has the same number of samples.
    """
    return batch[: max(0, total - number * batch_size)]
