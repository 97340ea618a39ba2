"""Triton kernel: cross-entropy of logits, and its gradient in place of the logits.

Formula, for each row x [V] of logits with label y:
    log_sum_exp = log(sum(exp(x)))
    loss        = log_sum_exp - x[y]
    x           = exp(x - log_sum_exp) - one_hot(y)         with GRADIENT: the gradient of the sum of the losses
A negative label makes both of them zero.
Computed in fp32. The sum is an online softmax: a running maximum and a running sum that is rescaled when the maximum
grows, so that one pass over the logits computes both.

Shapes: N rows, V vocabulary size, BLOCK logits of a row per iteration. One program a row.
Reference: `torch.nn.functional.cross_entropy`, and `glm_shared.loss.cross_entropy_in_place` on the CPU.
Source: "Online normalizer calculation for softmax", algorithm 3.
"""

import torch
import triton
import triton.language as tl

BLOCK = 8192  # logits of a row per iteration


@triton.jit
def cross_entropy_kernel(logits, labels, losses, vocab_size, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Loss of one row, and with GRADIENT its gradient in place of the logits."""
    row = tl.program_id(0).to(tl.int64)  # int64, because row * V may pass 2**31
    row_base = logits + row * vocab_size
    label = tl.load(labels + row)  # scalar
    counts = tl.where(label >= 0, 1.0, 0.0)  # scalar
    # Read before the gradient overwrites it.
    label_logit = tl.load(row_base + label, mask=label >= 0, other=0.0).to(tl.float32)  # scalar
    # Each of the BLOCK elements has a maximum and a sum of its own; they are reduced to one after the loop.
    running_max = tl.full([BLOCK], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocab_size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        logit = tl.load(row_base + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)  # [BLOCK]
        new_max = tl.maximum(running_max, logit)
        # new_max is -inf until the first finite logit. `where` excludes that case, because -inf - -inf is NaN.
        rescale = tl.where(running_max == new_max, 1.0, tl.exp(running_max - new_max))
        running_sum = running_sum * rescale + tl.where(logit == float("-inf"), 0.0, tl.exp(logit - new_max))
        running_max = new_max
    row_max = tl.max(running_max, 0)  # scalar
    rescaled_sum = tl.where(running_max == float("-inf"), 0.0, running_sum * tl.exp(running_max - row_max))
    log_sum_exp = row_max + tl.log(tl.sum(rescaled_sum, 0))  # scalar
    tl.store(losses + row, counts * (log_sum_exp - label_logit))  # scalar
    if GRADIENT:
        for first in range(0, vocab_size, BLOCK):
            index = first + tl.arange(0, BLOCK)
            logit = tl.load(row_base + index, mask=index < vocab_size, other=0.0).to(tl.float32)  # [BLOCK]
            grad = counts * (tl.exp(logit - log_sum_exp) - tl.where(index == label, 1.0, 0.0))
            tl.store(row_base + index, grad.to(logits.dtype.element_ty), mask=index < vocab_size)  # [BLOCK]


def cross_entropy_in_place(logits: torch.Tensor, labels: torch.Tensor, gradient: bool) -> torch.Tensor:
    """Cross-entropy of each row; with `gradient`, the logits are replaced by the gradient of the sum of the losses.

    Args:
        logits: [N, V], contiguous; overwritten with `gradient`.
        labels: [N], long, each in 0 .. V - 1, or negative for a row that does not count.
        gradient: compute the gradient too.
    Returns:
        [N], fp32, in nats.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    constants = {"GRADIENT": gradient, "BLOCK": BLOCK, "num_warps": 16}
    cross_entropy_kernel[(len(logits),)](logits, labels, losses, logits.shape[1], **constants)
    return losses
