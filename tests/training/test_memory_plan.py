"""qlora/training/memory_plan.py: a plan fits its budget, and more memory is never worse."""

import pytest

from chatglm import ChatGLMConfig
from qlora.training.memory_plan import Sizes, choose_plan, longest_step, predict_peak, relative_cost
from qlora.units import GIB

# The 6B model in NF4 with a bf16 embedding: 4.0 GiB, and an adapter of rank 4.
SIZES = Sizes(ChatGLMConfig(), bytes_per_number=2, resident=4 * GIB, trainable=1_835_008)
STEP_TOKENS, LONGEST_SAMPLE = 32 * 110, 217  # ADGEN


@pytest.mark.parametrize("gib", [5, 6, 8, 12, 16, 24, 40, 80])
def test_plan_fits_the_budget(gib):
    plan = choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, gib * GIB)
    assert plan.predicted_peak == predict_peak(SIZES, plan) <= gib * GIB
    assert plan.max_tokens >= LONGEST_SAMPLE
    assert all(0 <= n <= 28 for n in (plan.recompute_mlp, plan.recompute_attention, plan.dequantized_layers))


def test_more_memory_is_never_slower():
    plans = [choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, gib * GIB) for gib in (5, 6, 8, 12, 16, 24, 40, 80)]
    costs = [relative_cost(SIZES, plan, STEP_TOKENS) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert plans[-1].max_tokens >= STEP_TOKENS and plans[-1].recompute_mlp == plans[-1].recompute_attention == 0


def test_a_step_goes_through_at_once_where_it_can():
    """Two micro-batches, with less recomputed, take the host twice the time of one."""
    for gib in (4.9, 5.5, 6, 6.25, 7, 8):
        assert choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, int(gib * GIB)).max_tokens >= STEP_TOKENS


def test_too_little_memory_is_said():
    with pytest.raises(ValueError, match=r"4\.00 GiB of GPU memory are too little: the longest sample, 2048 tokens"):
        choose_plan(SIZES, STEP_TOKENS, 2048, 4 * GIB)


@pytest.mark.parametrize(
    "fixed", [{"max_tokens": 500}, {"recompute_mlp": 25, "recompute_attention": 28}, {"offload": True}]
)
def test_what_the_user_chose_stays(fixed):
    plan = choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, 24 * GIB, fixed)
    assert {name: getattr(plan, name) for name in fixed} == fixed


def test_longest_step():
    assert longest_step([100] * 50, 32) == 3200
    assert longest_step([100] * 10, 32) == 1000  # fewer samples than a step takes
    assert 3200 < longest_step([50, 150] * 500, 32) <= 32 * 150
