"""Cross-entropy of a large vocabulary without ever holding all logits."""

import torch
from torch.nn import functional as F

ROWS_AT_ONCE = 512  # of fp32 logits: 255 MiB with 130,528 tokens


class LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy(hidden_states @ weight.T, labels, reduction="sum") / divisor`, a slice of rows at a time.

    The gradient is computed with the loss, while a slice's logits are there: nothing is kept but the gradient of the
    hidden states, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, divisor):
        loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        ctx.hidden_grad = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        ctx.weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(labels), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logits = F.linear(hidden_states[rows], weight).float()
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            targets = labels[rows, None]
            loss += (log_normalizer - logits.gather(1, targets)).sum()
            if any(ctx.needs_input_grad[:2]):
                grad = logits.sub_(log_normalizer).exp_()
                grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=grad.dtype))
                grad = grad.div_(divisor).to(weight.dtype)
                if ctx.hidden_grad is not None:
                    torch.mm(grad, weight, out=ctx.hidden_grad[rows])
                if ctx.weight_grad is not None:
                    ctx.weight_grad += grad.T @ hidden_states[rows]
        return loss / divisor

    @staticmethod
    def backward(ctx, grad_output):
        hidden_grad = None if ctx.hidden_grad is None else ctx.hidden_grad * grad_output.to(ctx.hidden_grad.dtype)
        weight_grad = None if ctx.weight_grad is None else ctx.weight_grad * grad_output
        return hidden_grad, weight_grad, None, None


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy in fp32 of the logits `hidden_states @ weight.T`.

    Args:
        hidden_states: [N, C].
        weight: [V, C], of the head.
        labels: [N], long, none of them ignored.
        num_items_in_batch: divisor of the summed loss; None for the mean.
    Returns:
        fp32 scalar.
    """
    divisor = len(labels) if num_items_in_batch is None else num_items_in_batch
    return LinearCrossEntropy.apply(hidden_states, weight, labels, divisor)
