"""Triton kernel: one decoding step of attention, from the fused projection to the output, for one head of one row.

It rotates query and key, writes key and value into the cache, and attends to what the cache holds.
"""

import math

import torch
import triton
import triton.language as tl

from glm_kernels.launch import launch

BLOCK, STAGES = 64, 3  # keys at once, and loads in flight


@triton.jit
def rotated(base, cos, sin, HEAD_DIM: tl.constexpr):
    """A query or key [D] turned by its position, rounded as the cache holds it."""
    dim = tl.arange(0, HEAD_DIM)
    first = dim % (HEAD_DIM // 2) < HEAD_DIM // 4
    partner = tl.where(first, dim + HEAD_DIM // 4, dim - HEAD_DIM // 4)
    turned = tl.load(base + partner).to(tl.float32) * tl.where(first, -1.0, 1.0)
    result = tl.load(base + dim).to(tl.float32) * tl.load(cos + dim).to(tl.float32)
    return (result + turned * tl.load(sin + dim).to(tl.float32)).to(base.dtype.element_ty)


@triton.jit(do_not_specialize=["capacity"])
def decode_attention_kernel(
    projected, cos, sin, keys, values, visible, cache_position, output, scale, capacity,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    past = tl.load(cache_position)
    dim = tl.arange(0, HEAD_DIM)
    own = projected + (row * heads + head) * 3 * HEAD_DIM
    cache = (row * heads + head) * capacity * HEAD_DIM
    query = rotated(own, cos + row * HEAD_DIM, sin + row * HEAD_DIM, HEAD_DIM).to(tl.float32) * scale
    key = rotated(own + HEAD_DIM, cos + row * HEAD_DIM, sin + row * HEAD_DIM, HEAD_DIM)
    value = tl.load(own + 2 * HEAD_DIM + dim)
    tl.store(keys + cache + past * HEAD_DIM + dim, key)
    tl.store(values + cache + past * HEAD_DIM + dim, value)
    # Each of BLOCK lanes takes every BLOCK-th key and keeps a softmax of its own, so that lanes need not wait for each
    # other before the end. The token itself begins the first lane: what has just been written is not read back.
    lane = tl.arange(0, BLOCK)
    best = tl.where(lane == 0, tl.sum(query * key.to(tl.float32), 0), float("-inf"))
    total = tl.where(lane == 0, 1.0, 0.0)
    accumulated = total[:, None] * value.to(tl.float32)[None, :]
    for first in tl.range(0, past, BLOCK, num_stages=STAGES):
        index = first + lane
        there = index < past
        seen = tl.load(visible + row * capacity + index, mask=there, other=0) != 0
        at = cache + index[:, None] * HEAD_DIM + dim[None, :]
        tile = tl.load(keys + at, mask=there[:, None], other=0.0)
        value_tile = tl.load(values + at, mask=there[:, None], other=0.0)
        scores = tl.where(seen, tl.sum(tile.to(tl.float32) * query[None, :], 1), float("-inf"))
        better = tl.maximum(best, scores)
        seen_any = better > float("-inf")  # a lane that has seen nothing has no scale: -inf - -inf is no number
        weights = tl.where(seen_any, tl.exp2(scores - better), 0.0)
        shrink = tl.where(seen_any, tl.exp2(best - better), 0.0)
        accumulated = accumulated * shrink[:, None] + value_tile.to(tl.float32) * weights[:, None]
        total = total * shrink + weights
        best = better
    factor = tl.exp2(best - tl.max(best, 0))
    result = tl.sum(accumulated * factor[:, None], 0) / tl.sum(total * factor, 0)
    tl.store(output + (row * heads + head) * HEAD_DIM + dim, result.to(output.dtype.element_ty))


def decode_attention(
    projected: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    cache_position: torch.Tensor,
) -> torch.Tensor:
    """Attention of one new token a row; S positions in the cache.

    Args:
        projected: [B, 3C], query, key and value of each head side by side, not rotated.
        cos, sin: [B, D], of the tokens' positions.
        keys, values: [B, H, S, D], contiguous; the new ones are written into them.
        visible: [B, S], bool: what may be seen of the positions before `cache_position`.
        cache_position: one long number on the device, where the new ones go.
    Returns:
        [B, C].
    """
    B, H, S, D = keys.shape
    output = projected.new_empty(B, H * D)
    launch(
        decode_attention_kernel, (B, H), projected, cos, sin, keys, values, visible, cache_position, output,
        D**-0.5 * math.log2(math.e), S, HEAD_DIM=D, BLOCK=BLOCK, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return output
