"""The samples of an optimizer step, and how they are split into groups for the GPU."""

from dataclasses import dataclass

import torch

from qlora.data.dataset import IGNORE_INDEX


@dataclass
class StepBatch:
    """The samples of one step. Not a list, so that the libraries on the way leave it as it is."""

    items: list[dict]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, prompts and answers."""
        return count_tokens(self.items)

    @property
    def rows(self) -> list[tuple[str, int]]:
        """File and line of the samples that come from files; no name where there is only one file."""
        return [(item.get("file", ""), item["line"]) for item in self.items if "line" in item]


def count_tokens(samples: list[dict]) -> int:
    """Tokens of samples, prompts and answers."""
    return sum(len(sample["input_ids"]) for sample in samples)


def label_count(samples: list[dict]) -> int:
    """Label tokens of samples."""
    return sum(int((torch.as_tensor(sample["labels"]) != IGNORE_INDEX).sum()) for sample in samples)


def split_evenly(samples: list[dict], max_tokens: int) -> list[list[dict]]:
    """Splits samples into as few groups of at most `max_tokens` tokens as a greedy division finds, about equally long.

    A sample that is longer than `max_tokens` has a group to itself.
    """
    by_length = sorted(samples, key=lambda sample: len(sample["input_ids"]), reverse=True)
    for count in range(min(len(samples), -(-count_tokens(samples) // max_tokens)), len(samples) + 1):
        groups, sizes = [[] for _ in range(count)], [0] * count
        for sample in by_length:
            smallest = sizes.index(min(sizes))
            groups[smallest].append(sample)
            sizes[smallest] += len(sample["input_ids"])
        if max(sizes) <= max_tokens or count == len(samples):
            break
    return [group for group in groups if group]


def own_samples(batch: list, number: int, batch_size: int, total: int) -> list:
    """The samples of the batch of this number that no other batch has.

    Processes take batches in turn; for each to have as many, accelerate fills up the last ones with the first rows.
    """
    return batch[: max(0, total - number * batch_size)]
