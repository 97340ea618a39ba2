"""Triton kernel: cross-entropy and its gradient, which takes the place of the logits."""

import torch
import triton
import triton.language as tl

from glm_kernels.launch import launch

BLOCK = 8192  # logits of a row at once


@triton.jit
def cross_entropy_kernel(logits, labels, losses, vocabulary, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its loss, and in place of its logits softmax - one-hot."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * vocabulary
    label = tl.load(labels + row)
    target = tl.load(base + label).to(tl.float32)  # before its place is overwritten
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        index = first + tl.arange(0, BLOCK)
        value = tl.load(base + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
        better = tl.maximum(best, value)
        # A lane that has seen nothing yet has -inf for its best, and -inf - -inf is no number.
        total = total * tl.where(best == better, 1.0, tl.exp(best - better)) + tl.where(
            value == float("-inf"), 0.0, tl.exp(value - better)
        )
        best = better
    top = tl.max(best, 0)
    log_normalizer = top + tl.log(tl.sum(tl.where(best == float("-inf"), 0.0, total * tl.exp(best - top)), 0))
    tl.store(losses + row, log_normalizer - target)
    if GRADIENT:
        for first in range(0, vocabulary, BLOCK):
            index = first + tl.arange(0, BLOCK)
            value = tl.load(base + index, mask=index < vocabulary, other=0.0).to(tl.float32)
            grad = tl.exp(value - log_normalizer) - tl.where(index == label, 1.0, 0.0)
            tl.store(base + index, grad.to(logits.dtype.element_ty), mask=index < vocabulary)


def cross_entropy_in_place(logits: torch.Tensor, labels: torch.Tensor, gradient: bool) -> torch.Tensor:
    """Losses of the rows, [N] fp32; with `gradient`, logits [N, V] become the gradient of their sum."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    shape = {"GRADIENT": gradient, "BLOCK": BLOCK, "num_warps": 16}
    launch(cross_entropy_kernel, (len(logits),), logits, labels, losses, logits.shape[1], **shape)
    return losses
