"""qlora/training/graphs.py with a stand-in for the recording of CUDA graphs: what is recorded is called again.

That a graph does the same is tested on a GPU, in tests/test_gpu.py.
"""

import pytest
import torch
from conftest import StandInRecorder, add_random_lora, random_samples

from qlora.data.batching import LARGE_ROW, count_labels, count_tokens, filled_tokens, size_of_row
from qlora.data.collator import PaddingFreeCollator
from qlora.layers.replacement import replace_layers
from qlora.loading import load_quantized_model
from qlora.training.graphs import GraphedPasses


@pytest.fixture
def model(golden_folder):
    model = add_random_lora(load_quantized_model(str(golden_folder), torch.float32), dropout=0.2).train()
    replace_layers(model, for_training=True)
    return model


@pytest.fixture
def passes(model) -> GraphedPasses:
    return GraphedPasses(model, PaddingFreeCollator(model.config), most_samples=4, recorder=StandInRecorder)


def plain_passes(model, samples: list[dict], divisor: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the gradients of a row that is not filled up."""
    model.zero_grad()
    loss = model(**PaddingFreeCollator(model.config)(samples), num_items_in_batch=divisor).loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def test_rows_that_are_filled_up_give_the_same_loss_and_gradients(model, passes):
    lengths = [(5, 9), (12, 30)], [(3, 4)], [(20, 30), (2, 3), (30, 40)], [(8, 20), (3, 9)]
    for row in (*lengths, *lengths):  # the second time with other tokens
        samples = random_samples(model.config, *row)
        model.zero_grad()
        loss = passes.forward_backward([samples], divisor=7)
        found = [parameter.grad.clone() for parameter in passes.parameters]
        # The dropout seed is still the same.
        expected, gradients = plain_passes(model, samples, divisor=7)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        assert max(gradient.abs().max() for gradient in gradients) > 1e-3
        torch.testing.assert_close(found, gradients, atol=1e-6, rtol=1e-5)
    sizes = {size_of_row(random_samples(model.config, *row), 4) for row in lengths}
    assert {size for size, _ in passes.graphs} == sizes


def test_micro_batches_and_steps_add_up_until_gradients_are_dropped(model, passes):
    first, second = random_samples(model.config, (5, 9)), random_samples(model.config, (6, 20), (3, 4))
    for parameter in dropout_layers(model):
        parameter.p = 0.0
    expected = [plain_passes(model, samples, divisor=5) for samples in (first, second)]
    model.zero_grad()
    loss = passes.forward_backward([first, second], divisor=5)
    torch.testing.assert_close(loss, expected[0][0] + expected[1][0], atol=1e-6, rtol=1e-6)
    gradients = [one + other for one, other in zip(expected[0][1], expected[1][1], strict=True)]
    torch.testing.assert_close([p.grad for p in passes.parameters], gradients, atol=1e-6, rtol=1e-5)
    kept = loss.clone()
    passes.forward_backward([first], divisor=5, loss_scale=torch.tensor(2.0))
    assert torch.equal(loss, kept)  # it is checked some steps later
    gradients = [total + 2 * one for total, one in zip(gradients, expected[0][1], strict=True)]
    torch.testing.assert_close([p.grad for p in passes.parameters], gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_step_that_loss_scaling_skips_leaves_nothing_behind(model, passes, set_to_none):
    samples = random_samples(model.config, (5, 9))
    passes.forward_backward([samples], divisor=3, loss_scale=torch.tensor(float("inf")))
    assert not any(parameter.grad.isfinite().all() for parameter in passes.parameters)
    model.zero_grad(set_to_none)
    loss = passes.forward_backward([samples], divisor=3)
    found = [parameter.grad.clone() for parameter in passes.parameters]
    expected, gradients = plain_passes(model, samples, divisor=3)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, gradients, atol=1e-6, rtol=1e-5)


def test_gradients_in_other_tensors_are_added_to(model, passes):
    samples = random_samples(model.config, (5, 9))
    passes.forward_backward([samples], divisor=3)
    for parameter in passes.parameters:
        parameter.grad = torch.ones_like(parameter)
    passes.forward_backward([samples], divisor=3)
    # A graph has their addresses.
    assert all(p.grad is gradient for p, gradient in zip(passes.parameters, passes.gradients, strict=True))
    found = [parameter.grad.clone() for parameter in passes.parameters]
    _, gradients = plain_passes(model, samples, divisor=3)
    torch.testing.assert_close(found, [1 + gradient for gradient in gradients], atol=1e-6, rtol=1e-5)


def test_loss_without_gradients_leaves_them_alone(model, passes):
    samples = random_samples(model.config, (5, 9), (12, 30))
    passes.forward_backward([samples], divisor=3)
    before = [parameter.grad.clone() for parameter in passes.parameters]
    model.eval()
    with torch.no_grad():
        loss = passes.loss([samples, samples], divisor=1)
        expected = model(**PaddingFreeCollator(model.config)(samples), num_items_in_batch=1).loss
    torch.testing.assert_close(loss, 2 * expected, atol=1e-5, rtol=1e-6)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(passes.parameters, before, strict=True))


def test_every_micro_batch_has_a_dropout_mask_of_its_own(model, passes):
    samples = random_samples(model.config, (5, 9))
    losses = {passes.forward_backward([samples], divisor=1).item() for _ in range(4)}
    assert len(losses) == 4


def test_evaluation_before_the_first_step_changes_nothing_in_it(model, passes):
    samples, losses = random_samples(model.config, (5, 9)), []
    for evaluate in (False, True):
        passes.forget()
        model.zero_grad()
        torch.manual_seed(0)
        if evaluate:
            with torch.no_grad():
                passes.loss([samples], divisor=1)
        losses.append(passes.forward_backward([samples], divisor=1))
        assert passes.warmed_up == ({True, False} if evaluate else {True})
    assert torch.equal(*losses)


def test_forgotten_graphs_are_recorded_again(model, passes):
    recorders = []
    passes.make_recorder = lambda: recorders.append(StandInRecorder()) or recorders[-1]
    samples, longer = random_samples(model.config, (5, 9)), random_samples(model.config, (50, 90))
    for times in (1, 2):
        for row in (samples, longer, samples):
            passes.forward_backward([row], divisor=1)
        # One recorder for all sizes, whose memory ends with its graphs.
        assert len(passes.graphs) == 2 and len(recorders) == times and passes.recorder is recorders[-1]
        passes.forget()
        assert not passes.graphs


def dropout_layers(model) -> list[torch.nn.Dropout]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 700, LARGE_ROW, 1025, 3300, 4096, 4097, 13_200, 100_000])
def test_rows_have_few_sizes_and_little_padding(tokens):
    filled = filled_tokens(tokens)
    assert tokens <= filled < tokens * (1 + 1 / 16) + 128
    assert filled_tokens(filled) == filled
    assert len({filled_tokens(n) for n in range(tokens, 2 * tokens)}) <= 34


def test_size_of_a_row_holds_its_labels_and_tiles(model):
    for lengths in ([(1, 500)] * 3, [(1, 1)], [(64, 1), (1, 63), (2, 127)], [(700, 2)] * 4):
        samples = random_samples(model.config, *lengths)
        size = size_of_row(samples, most_samples=4)
        assert size.tokens >= count_tokens(samples) and size.labels >= count_labels(samples)
        row = PaddingFreeCollator(model.config)(samples, size)
        assert len(row["packed_sequences"].tiles) == size.tiles
        assert (row["packed_sequences"].tiles[:, 1] == 0).any() or size.tiles == -(-size.tokens // 64)
        assert row["input_ids"].shape[1] == size.tokens and len(row["logits_to_keep"]) == size.labels
