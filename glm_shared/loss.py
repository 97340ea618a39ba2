"""Cross-entropy over a large vocabulary, a slice of rows at a time: the logits of all rows never exist at once.

Shapes: N rows (tokens with a label), C hidden size, V vocabulary size.
"""

import torch
from torch.nn import functional as F

ROWS_AT_ONCE = 512  # rows of logits in a slice: 127 MiB in bf16 with a vocabulary of 130,528


class LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy(hidden_states @ weight.T, labels, reduction="sum") / divisor`, a slice of rows at a time.

    The gradients are computed in the forward pass, while the logits of a slice exist. For the backward pass only the
    gradients of the hidden states and, if the head is trained, of its weight are stored; no logits are recomputed.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, divisor):
        divisor = torch.as_tensor(divisor, dtype=torch.float32).to(hidden_states.device, non_blocking=True)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        ctx.hidden_grad = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        ctx.weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(labels), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logits = F.linear(hidden_states[rows], weight)
            losses = cross_entropy_in_place(logits, labels[rows], gradient=any(ctx.needs_input_grad[:2]))
            loss += losses.sum()
            if ctx.hidden_grad is not None:
                torch.mm(logits, weight, out=ctx.hidden_grad[rows])
            if ctx.weight_grad is not None:
                ctx.weight_grad += logits.T @ hidden_states[rows]
        ctx.divisor = divisor
        return loss / divisor

    @staticmethod
    def backward(ctx, grad_output):
        # The stored gradients are not divided yet. The factor contains the loss scale of the Trainer: divided by
        # thousands of labels without it, small fp16 gradients would underflow to zero.
        factor = grad_output / ctx.divisor
        hidden_grad = None
        if ctx.hidden_grad is not None:
            # With a shape like that of the gradients, the factor is not rounded to their dtype.
            hidden_grad = torch.mul(ctx.hidden_grad, factor.view(1, 1), out=torch.empty_like(ctx.hidden_grad))
        weight_grad = None if ctx.weight_grad is None else ctx.weight_grad * factor
        return hidden_grad, weight_grad, None, None


def cross_entropy_in_place(logits: torch.Tensor, labels: torch.Tensor, gradient: bool) -> torch.Tensor:
    """Losses of the rows, [N], fp32; with `gradient`, logits [N, V] are overwritten with the gradient of their sum.

    A row with a negative label does not count: its loss and its gradient are zero.
    """
    if logits.is_cuda:
        from glm_kernels import cross_entropy

        return cross_entropy.cross_entropy_in_place(logits, labels, gradient)
    log_probabilities = logits.float().log_softmax(dim=-1)
    counts, labels = labels >= 0, labels.clamp(min=0)
    if gradient:
        one_hot = F.one_hot(labels, logits.shape[1])
        logits.copy_((log_probabilities.exp() - one_hot) * counts[:, None])
    return -log_probabilities.gather(1, labels[:, None])[:, 0] * counts


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy of the logits `hidden_states @ weight.T`, with softmax and sum in fp32.

    Args:
        hidden_states: [N, C].
        weight: [V, C], of the head, in the dtype of the hidden states.
        labels: [N], long; a negative label does not count.
        num_items_in_batch: divisor of the summed loss; None for the number of labels that count.
    Returns:
        Scalar, fp32.
    """
    divisor = (labels >= 0).sum() if num_items_in_batch is None else num_items_in_batch
    return LinearCrossEntropy.apply(hidden_states, weight, labels, divisor)
