"""qlora/data/batching.py: the samples of an optimizer step are split into micro-batches."""

import pytest

from qlora.data.batching import split_evenly


def samples_of(*lengths: int) -> list[dict]:
    return [{"input_ids": [number] * length} for number, length in enumerate(lengths)]


def sizes(micro_batches: list[list[dict]]) -> list[int]:
    return [sum(len(sample["input_ids"]) for sample in micro_batch) for micro_batch in micro_batches]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "count"),
    [
        ((10, 20, 30), 60, 1),
        ((10, 20, 30), 59, 2),
        ((50, 50, 50, 50), 100, 2),
        ((90, 10, 90, 10), 100, 2),
        ((100, 100, 100), 50, 3),  # each is longer than the limit
        ((5,), 1, 1),
        ((7,) * 32, 64, 4),
    ],
)
def test_micro_batches_have_every_sample_once_and_are_within_the_limit(lengths, max_tokens, count):
    samples = samples_of(*lengths)
    micro_batches = split_evenly(samples, max_tokens)
    assert len(micro_batches) == count and all(micro_batches)
    found = sorted(sample["input_ids"][0] for micro_batch in micro_batches for sample in micro_batch)
    assert found == list(range(len(lengths)))
    assert max(sizes(micro_batches)) <= max(max_tokens, max(lengths))


def test_micro_batches_are_about_equally_long():
    micro_batches = split_evenly(samples_of(*range(40, 168, 4)), max_tokens=1100)
    assert max(sizes(micro_batches)) - min(sizes(micro_batches)) <= 40
