"""qlora/training/memory_plan.py: a plan fits its budget, and a larger budget never gives a slower plan."""

import dataclasses
import re

import pytest
import torch

from chatglm import ChatGLMConfig
from chatglm2 import ChatGLM2Config
from glm_shared.loss import ROWS_AT_ONCE
from qlora.adapter import add_lora
from qlora.arguments import LoraSettings
from qlora.layers.linear import NF4Linear
from qlora.layers.replacement import replace_layers
from qlora.loading import BITS_PER_QUANTIZED_WEIGHT, load_quantized_model
from qlora.training import memory_plan
from qlora.training.memory_plan import (
    MOST_PARTS,
    MOST_ROWS,
    RESERVE,
    WORKSPACES,
    MemoryPlan,
    Sizes,
    apply_plan,
    choose_plan,
    longest_step,
    memory_budget,
    model_sizes,
    plan_without_gpu,
    predict_peak,
    relative_cost,
    set_activation_checkpointing,
)
from qlora.units import GIB

# The 6B model in NF4 with a bf16 embedding: 4.0 GiB, and an adapter of rank 4.
SIZES = Sizes(ChatGLMConfig(), bytes_per_number=2, resident=4 * GIB, trainable=1_835_008)
STEP_TOKENS, LONGEST_SAMPLE = 32 * 110, 217  # tokens, as in ADGEN


@pytest.mark.parametrize("gib", [5, 6, 8, 12, 16, 24, 40, 80])
def test_plan_fits_the_budget(gib):
    plan = choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, gib * GIB)
    assert plan.predicted_peak == predict_peak(SIZES, plan) <= gib * GIB
    assert plan.max_tokens >= LONGEST_SAMPLE and plan.step_tokens == STEP_TOKENS
    assert all(0 <= n <= 28 for n in (plan.recompute_mlp, plan.recompute_attention, plan.dequantized_layers))


def test_more_memory_is_never_slower():
    plans = [choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, gib * GIB) for gib in (5, 6, 8, 12, 16, 24, 40, 80)]
    costs = [relative_cost(SIZES, plan, STEP_TOKENS) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert plans[-1].max_tokens >= STEP_TOKENS and plans[-1].recompute_mlp == plans[-1].recompute_attention == 0


def test_step_is_not_split_if_it_fits():
    # Two micro-batches with fewer recomputed activations would take twice the time of the host.
    for gib in (4.9, 5.5, 6, 6.25, 7, 8):
        assert choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, int(gib * GIB)).max_tokens >= STEP_TOKENS


def test_host_counts_where_there_are_no_graphs():
    one = MemoryPlan(STEP_TOKENS, 28, 28)
    eight = MemoryPlan(STEP_TOKENS // 8, 28, 28)
    graphs, *launches = SIZES, dataclasses.replace(SIZES, processes=2), dataclasses.replace(SIZES, has_kernels=False)
    launched = [relative_cost(graphs, plan, STEP_TOKENS) for plan in (one, eight)]
    for sizes in launches:
        costs = [relative_cost(sizes, plan, STEP_TOKENS) for plan in (one, eight)]
        assert costs[0] == launched[0] and 4 * launched[1] < 3 * costs[1]


def test_offloading_costs_time():
    plan = MemoryPlan(STEP_TOKENS, 28, 28)
    costs = [
        relative_cost(SIZES, dataclasses.replace(plan, offload=offload), STEP_TOKENS) for offload in (False, True)
    ]
    assert costs[0] < costs[1]


def test_too_small_budget_is_refused():
    too_little = r"^4\.00 GiB of GPU memory are too little: the longest sample, 2048 tokens, needs ([\d.]+) GiB\."
    with pytest.raises(ValueError, match=too_little) as raised:
        choose_plan(SIZES, STEP_TOKENS, 2048, 4 * GIB)
    # So much is enough for this sample, and for no longer micro-batch; less is not.
    needed = float(re.match(too_little, str(raised.value))[1])
    assert choose_plan(SIZES, STEP_TOKENS, 2048, int((needed + 0.01) * GIB)).max_tokens == 2048
    with pytest.raises(ValueError, match="are too little"):
        choose_plan(SIZES, STEP_TOKENS, 2048, int((needed - 0.01) * GIB))


@pytest.mark.parametrize(
    "fixed", [{"max_tokens": 500}, {"recompute_mlp": 25, "recompute_attention": 28}, {"offload": True}]
)
def test_fixed_fields_are_not_changed(fixed):
    plan = choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, 24 * GIB, fixed)
    assert {name: getattr(plan, name) for name in fixed} == fixed


def test_fixed_micro_batches_hold_the_longest_sample():
    assert choose_plan(SIZES, STEP_TOKENS, LONGEST_SAMPLE, 24 * GIB, {"max_tokens": 100}).max_tokens == LONGEST_SAMPLE


def test_nothing_is_offloaded_without_a_gpu():
    assert plan_without_gpu({"offload": True, "recompute_mlp": 2}) == MemoryPlan(memory_plan.CPU_TOKENS, 2, 0)


@pytest.mark.parametrize(("tokens", "shown"), [(3000, "1 micro-batch "), (3001, "2 micro-batches ")])
def test_table_counts_micro_batches(tokens, shown):
    assert f"3,000 ({shown}for the longest step)" in MemoryPlan(3000, 28, 28, step_tokens=tokens).table(28)


def test_budget_is_what_is_free_or_a_part_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: GIB)  # by this process
    assert memory_budget(None) == 8 * GIB - RESERVE
    assert memory_budget("8GiB") == 8 * GIB
    with pytest.raises(ValueError, match=r"^--memory_budget 9GiB: only 8\.00 GiB are free on this GPU"):
        memory_budget("9GiB")


def test_sizes_of_a_model(tiny_model, monkeypatch):
    monkeypatch.setattr(memory_plan, "gpu_has_kernels", lambda dtype: False)
    model = add_lora(tiny_model, *LoraSettings())
    sizes = model_sizes(model, LoraSettings(), processes=2, fp8=True)
    assert (sizes.processes, sizes.has_kernels, sizes.fp8) == (2, False, True)
    assert (sizes.rank, sizes.targets, sizes.bytes_per_number) == (4, {"query_key_value"}, 4)
    # Of the linear layers' weights, in fp32 here, 4 bits and the scales are left.
    quantized = 2 * (3 + 1 + 2 + 2) * 64**2  # query_key_value, dense, and the two of the MLP, in two layers
    every = sum(parameter.nbytes for parameter in model.parameters())
    assert sizes.resident == pytest.approx(every - quantized * (4 - BITS_PER_QUANTIZED_WEIGHT / 8), abs=1)


def test_longest_step():
    assert longest_step([100] * 50, 32) == 3200
    assert longest_step([100] * 10, 32) == 1000  # fewer samples than one step
    assert 3200 < longest_step([50, 150] * 500, 32) <= 32 * 150


def test_peak_counts_the_row_that_is_filled_up():
    assert predict_peak(SIZES, MemoryPlan(3000, 28, 28)) == predict_peak(SIZES, MemoryPlan(3072, 28, 28))


def test_peak_counts_the_optimizer_and_everything_resident():
    plan = MemoryPlan(3000, 28, 28)
    more = dataclasses.replace(SIZES, trainable=SIZES.trainable + 1000, resident=SIZES.resident + 7)
    # Gradient, two moments of Adam and the temporary tensors of its step, fp32.
    assert predict_peak(more, plan) - predict_peak(SIZES, plan) == 16 * 1000 + 7
    # With several processes the gradient's copy in the buckets of DDP. Without graphs, the step has what passes freed.
    two_processes = dataclasses.replace(SIZES, processes=2)
    assert predict_peak(two_processes, plan) == predict_peak(SIZES, plan)
    many = dataclasses.replace(two_processes, trainable=GIB)
    assert predict_peak(many, plan) == many.resident + WORKSPACES + 4 * 5 * GIB


def test_peak_counts_what_a_layer_saves():
    plan, T = MemoryPlan(3072, 28, 28), 3072
    less_mlp, less_attention = (
        dataclasses.replace(plan, **{name: 27}) for name in ("recompute_mlp", "recompute_attention")
    )
    # The input of the GELU in bf16 and the statistics; norm, projection (3) and output, statistics of 32 heads.
    assert predict_peak(SIZES, less_mlp) - predict_peak(SIZES, plan) == T * (2 * 16384 + 16)
    assert predict_peak(SIZES, less_attention) - predict_peak(SIZES, plan) == T * (5 * 2 * 4096 + 4 * 32 + 16)
    # Without the kernel of attention also queries and keys after the rotation, and the values.
    assert dataclasses.replace(SIZES, has_kernels=False).attention_bytes == SIZES.attention_bytes + 3 * 2 * 4096
    adapters = dataclasses.replace(SIZES, targets=frozenset(["dense_h_to_4h", "dense_4h_to_h"]))
    saved_more = predict_peak(adapters, less_mlp) - predict_peak(adapters, plan)
    assert saved_more == T * (2 * 16384 + 16 + 2 * 4096 + 2 * 16384)
    # dropout(x) @ A.T in bf16: of one of the two layers of an attention sub-layer, of both of an MLP.
    ranked = dataclasses.replace(adapters, targets=adapters.targets | {"dense"}, rank=128)
    without = dataclasses.replace(ranked, rank=0)
    for less, layers in ((less_attention, 1), (less_mlp, 2)):
        saved = [predict_peak(sizes, less) - predict_peak(sizes, plan) for sizes in (ranked, without)]
        assert saved[0] - saved[1] == T * 2 * 128 * layers


def test_peak_of_grouped_queries_and_gated_activations():
    sizes, plan, T = dataclasses.replace(SIZES, config=ChatGLM2Config()), MemoryPlan(3072, 28, 28), 3072
    less_mlp, less_attention = (
        dataclasses.replace(plan, **{name: 27}) for name in ("recompute_mlp", "recompute_attention")
    )
    # The gate and the other factor, each 13,696 wide; norm, projection (32 + 2 + 2 heads of 128) and output.
    assert predict_peak(sizes, less_mlp) - predict_peak(sizes, plan) == T * (2 * 2 * 13696 + 16)
    projected = 36 * 128
    assert predict_peak(sizes, less_attention) - predict_peak(sizes, plan) == T * (
        2 * (4096 + projected + 4096) + 4 * 32 + 16
    )
    # Gradients of the sub-layer's output and of its norm, of gate and other factor; a weight or their product's.
    wide = T * (2 * 2 * 4096 + 2 * 2 * 13696)
    assert sizes.mlp_working_bytes(T, dequantizes=True) == wide + 2 * 4096 * 2 * 13696
    assert sizes.mlp_working_bytes(T, dequantizes=False) == wide + T * 2 * 13696
    assert sizes.attention_working_bytes(T, dequantizes=True) == T * 2 * (2 * 4096 + projected) + 2 * 4096 * projected
    # Embedding and head are two tensors, of which only the head is in the arithmetic.
    assert sizes.config.embedding_weights == 2 * sizes.config.head_weights


def test_peak_counts_offloading_and_cached_weights():
    plan, T, input_bytes = MemoryPlan(3072, 28, 28), 3072, 2 * 4096
    offloaded = dataclasses.replace(plan, offload=True)
    # All 56 inputs except the three that are being copied.
    assert predict_peak(SIZES, plan) - predict_peak(SIZES, offloaded) == T * 53 * input_bytes
    one, two = (dataclasses.replace(plan, dequantized_layers=count) for count in (1, 2))
    assert predict_peak(SIZES, two) - predict_peak(SIZES, one) == 2 * SIZES.config.weights_per_layer


def test_peak_counts_temporary_tensors_of_a_sublayer_or_of_the_logits():
    one_layer = ChatGLMConfig(num_layers=1)
    sizes = dataclasses.replace(SIZES, config=one_layer, trainable=0, resident=0)
    few, many = MemoryPlan(64, 0, 0, dequantized_layers=1), MemoryPlan(100_352, 0, 0, dequantized_layers=1)
    saved = sizes.mlp_bytes + sizes.attention_bytes + 2 * sizes.input_bytes
    weights = 2 * one_layer.weights_per_layer
    # Few tokens: a slice of logits, and three times the hidden states. Many: the temporary tensors of a sub-layer.
    logits = ROWS_AT_ONCE * one_layer.vocab_size * 2 + 3 * 64 * sizes.input_bytes
    assert predict_peak(sizes, few) == weights + 64 * saved + logits + WORKSPACES
    working = 100_352 * (2 * 2 * 4096 + 2 * 2 * 16384)
    assert predict_peak(sizes, many) == weights + 100_352 * saved + working + WORKSPACES
    # What is recomputed is there then, too.
    recomputed = dataclasses.replace(many, recompute_mlp=1)
    assert predict_peak(sizes, recomputed) == predict_peak(sizes, many)


def test_peak_counts_the_gradients_of_the_largest_adapter():
    plan, targets = MemoryPlan(3072, 28, 28), frozenset(["query_key_value", "dense"])
    sizes = dataclasses.replace(SIZES, targets=targets, rank=256)
    # Of A and B in fp32, 256 x 4096 and 12288 x 256; the larger one is the sum of two parts, each as large.
    assert sizes.adapter_gradient_bytes == 4 * 256 * (4096 + 12288 + 2 * 12288)
    assert dataclasses.replace(sizes, rank=4).adapter_gradient_bytes == 4 * 4 * (4096 + 12288 + 8 * 12288)
    assert SIZES.adapter_gradient_bytes == 0
    without = dataclasses.replace(sizes, targets=frozenset())
    assert predict_peak(sizes, plan) - predict_peak(without, plan) == sizes.adapter_gradient_bytes


def test_parts_of_a_sum_are_those_of_the_kernels():
    lora = pytest.importorskip("glm_kernels.lora", reason="no Triton here")
    assert (MOST_PARTS, MOST_ROWS) == (lora.MOST_SPLITS, lora.MOST_R)


def test_peak_of_8_bit_products():
    eight = dataclasses.replace(SIZES, fp8=True)
    # In each layer, for the rows of W and of W.T: query_key_value, dense, and the two of the MLP.
    scales = 4 * 28 * (4 * 4096 + 2 * 4096 + 5 * 4096 + 5 * 4096)
    for T, dequantized in ((3072, 0), (3072, 28), (13_312, 28)):
        plan = MemoryPlan(T, 0, 0, dequantized_layers=dequantized)
        # The widest operand in e4m3. A weight that is made where it is used has half the bytes, fewer than the
        # gradient that shares its memory.
        more = T * 16384 + scales - (0 if dequantized else 2 * 4096 * 16384 - 2 * T * 16384)
        assert predict_peak(eight, plan) - predict_peak(SIZES, plan) == more
    # The gradient of query_key_value's output in e4m3.
    T = 3072
    assert eight.attention_working_bytes(T, False) - SIZES.attention_working_bytes(T, False) == T * 3 * 4096


def test_cost_of_8_bit_products():
    eight = dataclasses.replace(SIZES, fp8=True)
    kept, recomputed = MemoryPlan(3072, 0, 0, dequantized_layers=28), MemoryPlan(3072, 28, 0, dequantized_layers=28)
    costs = [[relative_cost(sizes, plan, 3072) for plan in (kept, recomputed)] for sizes in (SIZES, eight)]
    assert 1.6 < costs[0][0] / costs[1][0] < 2  # the head has 16-bit operands, and launches take as long
    # Two operations for a weight of the first matrix of an MLP and a token.
    assert costs[0][1] - costs[0][0] == 2 * 3072 * 28 * 4096 * 16384
    assert costs[1][1] - costs[1][0] == (costs[0][1] - costs[0][0]) / 2


def test_last_layers_are_recomputed(tiny_model):
    model = add_lora(tiny_model, rank=4, alpha=32, dropout=0.0, target_modules=["query_key_value"])
    apply_plan(model, MemoryPlan(512, recompute_mlp=1, recompute_attention=2))
    first, last = model.get_base_model().blocks
    assert (first.recompute_mlp, last.recompute_mlp) == (False, True)
    assert (first.recompute_attention, last.recompute_attention) == (True, True)
    for enabled in (False, True):
        set_activation_checkpointing(model, enabled)
        assert {block.recompute_mlp for block in (first, last)} == {enabled}
        assert {block.recompute_attention for block in (first, last)} == {enabled}


def test_recomputed_sublayers_are_offloaded_and_the_budget_is_a_limit(tiny_model, monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(memory_plan, "ActivationOffload", lambda *args: args)
    model = add_lora(tiny_model, *LoraSettings())
    apply_plan(model, MemoryPlan(500, recompute_mlp=1, recompute_attention=2, offload=True, budget=4 * GIB))
    # The inputs of three sub-layers, of a row of 500 tokens that is filled up.
    assert {block.offload for block in model.get_base_model().blocks} == {(3, 512 * 64, torch.float32)}
    assert fractions == [4 / 16]


def test_first_layers_are_cached_and_another_plan_drops_what_is_not(golden_folder):
    model = add_lora(load_quantized_model(str(golden_folder), torch.float32), 4, 32, 0.0, ["query_key_value"])
    replace_layers(model, for_training=True)
    for cached in (1, 2, 0):
        apply_plan(model, MemoryPlan(512, 0, 0, dequantized_layers=cached))
        weights = [
            [module.cached_weight is not None for module in block.modules() if isinstance(module, NF4Linear)]
            for block in model.get_base_model().blocks
        ]
        assert weights == [[number < cached] * 4 for number in range(len(weights))]
