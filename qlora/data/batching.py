"""The samples of an optimizer step, and their division into micro-batches."""

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from glm_kernels import TILE
from qlora.data.dataset import IGNORE_INDEX

LEAST_TOKENS = 64  # of a row that is filled up, and what its number of tokens is a multiple of
LARGE_ROW = 1024  # tokens; matrix products of more of them take as long for any number up to a multiple of 128
TOKEN_SIZES = 32  # numbers of tokens to fill a row up to, at most, between n and 2n
LABEL_SIZES = 16  # numbers of labels to fill it up to, between none and all tokens

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


class RowSize(NamedTuple):
    """The sizes of everything in a packed row: its tokens, the positions with a label, the tiles of its samples."""

    tokens: int
    labels: int
    tiles: int


def size_of_row(samples: list[Sample], most_samples: int) -> RowSize:
    """The size that a row of these samples is filled up to, one of few.

    Args:
        samples: of a micro-batch.
        most_samples: of any micro-batch.
    """
    tokens = filled_tokens(count_tokens(samples))
    step = tokens // LABEL_SIZES
    labels = max(1, math.ceil(count_labels(samples) / step)) * step
    return RowSize(tokens, labels, tokens // TILE + most_samples)


def filled_tokens(tokens: int) -> int:
    """The number of tokens that a row of so many is filled up to."""
    octave = 2 ** (tokens - 1).bit_length() // 2
    step = max(LEAST_TOKENS if tokens <= LARGE_ROW else 128, octave // TOKEN_SIZES)
    return math.ceil(tokens / step) * step


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
