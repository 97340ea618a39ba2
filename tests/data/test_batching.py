"""qlora/data/batching.py: how the samples of an optimizer step are split."""

import pytest

from qlora.data.batching import split_evenly


def samples_of(*lengths: int) -> list[dict]:
    return [{"input_ids": [number] * length} for number, length in enumerate(lengths)]


def sizes(groups: list[list[dict]]) -> list[int]:
    return [sum(len(sample["input_ids"]) for sample in group) for group in groups]


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
def test_split_keeps_every_sample_and_the_limit(lengths, max_tokens, count):
    samples = samples_of(*lengths)
    groups = split_evenly(samples, max_tokens)
    assert len(groups) == count and all(groups)
    found = sorted(sample["input_ids"][0] for group in groups for sample in group)
    assert found == list(range(len(lengths)))
    assert max(sizes(groups)) <= max(max_tokens, max(lengths))


def test_groups_are_about_equally_long():
    groups = split_evenly(samples_of(*range(40, 168, 4)), max_tokens=1100)
    assert max(sizes(groups)) - min(sizes(groups)) <= 40
