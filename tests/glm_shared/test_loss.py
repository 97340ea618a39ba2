"""glm_shared/loss.py, compared with PyTorch's cross-entropy of all logits."""

import pytest
import torch
from torch.nn import functional as F

from glm_shared.loss import ROWS_AT_ONCE, linear_cross_entropy

HIDDEN, VOCABULARY = 16, 40


@pytest.fixture(params=[1, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 3])
def inputs(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight of the head and labels, for one row, one slice of rows, and several slices."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(request.param, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, requires_grad=True)
    return hidden_states, weight, torch.randint(VOCABULARY, (request.param,), generator=generator)


def expected(hidden_states, weight, labels, divisor=None) -> tuple[torch.Tensor, ...]:
    """Loss, gradient of the hidden states, and gradient of the head."""
    loss = F.cross_entropy(hidden_states @ weight.T, labels, reduction="sum") / (divisor or len(labels))
    return loss.detach(), *torch.autograd.grad(loss, (hidden_states, weight))


@pytest.mark.parametrize("divisor", [None, 7, torch.tensor(7)])
def test_loss_and_gradients(inputs, divisor):
    hidden_states, weight, labels = inputs
    loss = linear_cross_entropy(hidden_states, weight, labels, divisor)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    found = loss.detach(), *torch.autograd.grad(loss, (hidden_states, weight))
    for actual, reference in zip(found, expected(*inputs, divisor), strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-5, rtol=1e-5)


def test_gradient_is_scaled_with_the_loss(inputs):
    hidden_states, weight, labels = inputs
    loss = 3 * linear_cross_entropy(hidden_states, weight, labels)
    (gradient,) = torch.autograd.grad(loss, hidden_states)
    torch.testing.assert_close(gradient, 3 * expected(*inputs)[1], atol=1e-5, rtol=1e-5)


def test_gradient_with_a_frozen_head(inputs):
    hidden_states, weight, labels = inputs
    linear_cross_entropy(hidden_states, weight.detach(), labels).backward()
    torch.testing.assert_close(hidden_states.grad, expected(*inputs)[1], atol=1e-5, rtol=1e-5)


def test_half_precision_is_summed_in_fp32(inputs):
    hidden_states, weight, labels = (t.bfloat16().detach() if t.is_floating_point() else t for t in inputs)
    loss = linear_cross_entropy(hidden_states.requires_grad_(), weight, labels)
    reference = F.cross_entropy((hidden_states @ weight.T).float(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, atol=1e-4, rtol=1e-4)
    loss.backward()
    assert hidden_states.grad.dtype == torch.bfloat16


def test_factor_of_the_loss_is_not_rounded_to_half_precision(inputs):
    hidden_states, weight, labels = (t.bfloat16().detach() if t.is_floating_point() else t for t in inputs)
    hidden_states.requires_grad_()
    factor = 1 + 3 * 2**-10  # in bf16 this is 1
    gradients = []
    for scale in (1, factor):
        loss = scale * linear_cross_entropy(hidden_states, weight, labels, 1)
        gradients += torch.autograd.grad(loss, hidden_states)
    torch.testing.assert_close(gradients[1], (gradients[0].float() * factor).bfloat16(), atol=0, rtol=0)
    assert not torch.equal(*gradients)


def test_without_gradients(inputs):
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*inputs), expected_loss(inputs), atol=1e-5, rtol=1e-5)


def expected_loss(inputs) -> torch.Tensor:
    hidden_states, weight, labels = inputs
    return F.cross_entropy(hidden_states @ weight.T, labels)
