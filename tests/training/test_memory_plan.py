"""qlora/training/memory_plan.py: a plan fits its budget, and more memory is never worse."""

import pytest

from chatglm import ChatGLMConfig
from qlora.training.memory_plan import GIB, Sizes, choose_plan, longest_step, parse_size, predict_peak, relative_cost

# The 6B model in NF4 with a bf16 embedding: 4.0 GiB, and an adapter of rank 4.
SIZES = Sizes(ChatGLMConfig(), bytes_per_number=2, resident=4 * GIB, trainable=1_835_008)
STEP_TOKENS, LONGEST_SAMPLE = 32 * 110, 217  # ADGEN


@pytest.mark.parametrize("gib", [5, 6, 8, 12, 16, 24, 40, 80])
def test_plan_fits_the_budget(gib):
    plan = choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, gib * GIB)
    assert plan.predicted_peak == predict_peak(SIZES, plan) <= gib * GIB
    assert plan.max_tokens >= LONGEST_SAMPLE
    assert all(0 <= n <= 28 for n in (plan.kept_mlp, plan.kept_attention, plan.dense))


def test_more_memory_is_never_slower():
    plans = [choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, gib * GIB) for gib in (5, 6, 8, 12, 16, 24, 40, 80)]
    costs = [relative_cost(SIZES, plan, STEP_TOKENS) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert plans[-1].max_tokens >= STEP_TOKENS and plans[-1].kept_mlp == plans[-1].kept_attention == 28


def test_a_step_goes_through_at_once_where_it_can():
    """Two passes with less recomputed wait for the host, which needs as long for half of a step as for all of it."""
    for gib in (4.9, 5.5, 6, 6.25, 7, 8):
        assert choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, int(gib * GIB)).max_tokens >= STEP_TOKENS


def test_too_little_memory_is_said():
    with pytest.raises(ValueError, match=r"4\.00 GiB of GPU memory are too little: the longest sample, 2048 tokens"):
        choose_plan(SIZES, STEP_TOKENS, 2048, 4 * GIB)


@pytest.mark.parametrize("fixed", [{"max_tokens": 500}, {"kept_mlp": 3, "kept_attention": 0}, {"offload": True}])
def test_what_the_user_chose_is_kept(fixed):
    plan = choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, 24 * GIB, fixed)
    assert {name: getattr(plan, name) for name in fixed} == fixed


def test_longest_step():
    assert longest_step([100] * 50, 32) == 3200
    assert longest_step([100] * 10, 32) == 1000  # fewer samples than a step takes
    assert 3200 < longest_step([50, 150] * 500, 32) <= 32 * 150


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("7.5GB", 7_500_000_000), ("6000MiB", 6000 * 2**20), (" 1 MB ", 10**6), ("0.5 GiB", 2**29)],
)
def test_size_is_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["8", "8G", "GiB", "-1GiB", "eight GiB", "1.2.3GB", "1e3MB", ""])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match=r"--memory_budget .*8GiB"):
        parse_size(text)
