"""Triton kernel: attention of one new token a row, from the fused projection to the output, with the cache update.

Formula, for each row and head; t is the cache position of its new token, `rotary` is that of `glm_kernels.rotary`;
with grouped queries a group of heads has k, v, keys and values in common:
    q, k, v   = rotary(query), rotary(key), value       of the fused projection
    keys[t]   = k          values[t] = v
    score[j]  = D ** -0.5 * q . keys[j]                 for j = t, and for j < t with visible[j]; else -inf
    output    = sum over j of softmax(score)[j] * values[j]
Computed in fp32; the scores are scaled by log2(e), so that exp2 takes the place of exp.

Shapes: B rows, H heads of queries, G heads of keys and values, S positions in the cache, D head dimension, BLOCK keys
per iteration. The fused projection [B, (H + 2G) * D] is laid out by head or by kind, as `glm_kernels.attention` says;
by head it is rotated as in ChatGLM-6B, by kind as in ChatGLM2-6B. One program a head of a row.
Reference: `split_and_rotate` of the models, and `torch.nn.functional.scaled_dot_product_attention` over the cache.
Source: "Online normalizer calculation for softmax", its parallel form.
"""

import math

import torch
import triton
import triton.language as tl

from glm_kernels.attention import key_offset, query_offset, value_offset

BLOCK, STAGES = 64, 3  # keys per iteration; iterations whose loads are in flight at once


@triton.jit
def load_rotated(x, cos, sin, row, HEAD_DIM: tl.constexpr, BY_HEAD: tl.constexpr):
    """A query or key x [D], rotated by the tables of its row, in the dtype of the cache."""
    dim = tl.arange(0, HEAD_DIM)  # [D]
    if BY_HEAD:  # tables [B, D]; the two elements of a pair are D/4 apart, within a half
        is_first = dim % (HEAD_DIM // 2) < HEAD_DIM // 4
        partner = tl.where(is_first, dim + HEAD_DIM // 4, dim - HEAD_DIM // 4)
        c = tl.load(cos + row * HEAD_DIM + dim).to(tl.float32)  # [D]
        s = tl.load(sin + row * HEAD_DIM + dim).to(tl.float32)  # [D]
    else:  # tables [B, D/4]; the two elements of a pair are neighbours, in the first half
        is_first = dim % 2 == 0
        partner = tl.where(is_first, dim + 1, dim - 1)
        is_rotated = dim < HEAD_DIM // 2
        table_offsets = row * (HEAD_DIM // 4) + dim // 2
        c = tl.load(cos + table_offsets, mask=is_rotated, other=1.0).to(tl.float32)  # [D]
        s = tl.load(sin + table_offsets, mask=is_rotated, other=0.0).to(tl.float32)  # [D]
    rotated_half = tl.load(x + partner).to(tl.float32) * tl.where(is_first, -1.0, 1.0)  # [D]
    return (tl.load(x + dim).to(tl.float32) * c + rotated_half * s).to(x.dtype.element_ty)  # [D]


@triton.jit(do_not_specialize=["capacity"])
def decode_attention_kernel(
    projected, cos, sin, keys, values, visible, cache_position, output, log2_scale, capacity,
    PER_ROW: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BY_HEAD: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output of one head of one row.

    `capacity` is S; `log2_scale` is D ** -0.5 * log2(e); PER_ROW is 1 if each row has a cache position, else 0.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = head // (HEADS // GROUPS)
    past_length = tl.load(cache_position + row * PER_ROW)  # scalar: tokens in the cache before the new one
    dim = tl.arange(0, HEAD_DIM)  # [D]
    row_base = projected + row * (HEADS + 2 * GROUPS) * HEAD_DIM
    cache_offset = (row * GROUPS + group) * capacity * HEAD_DIM
    query = load_rotated(row_base + query_offset(head, HEAD_DIM, BY_HEAD), cos, sin, row, HEAD_DIM, BY_HEAD)  # [D]
    query = query.to(tl.float32) * log2_scale
    key = load_rotated(row_base + key_offset(group, HEADS, HEAD_DIM, BY_HEAD), cos, sin, row, HEAD_DIM, BY_HEAD)  # [D]
    value = tl.load(row_base + value_offset(group, HEADS, GROUPS, HEAD_DIM, BY_HEAD) + dim)  # [D]
    if head % (HEADS // GROUPS) == 0:  # the first head of a group stores what they have in common
        tl.store(keys + cache_offset + past_length * HEAD_DIM + dim, key)  # [D]
        tl.store(values + cache_offset + past_length * HEAD_DIM + dim, value)  # [D]
    # Lane i computes a partial softmax over the keys i, i + BLOCK, i + 2 * BLOCK and so on. An iteration then needs no
    # reduction over keys; the lanes are combined after the loop. Lane 0 starts with the new token, whose key and value
    # are in registers, so that the loop does not read back what was just stored.
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    running_max = tl.where(lane == 0, tl.sum(query * key.to(tl.float32), 0), float("-inf"))  # [BLOCK], sum: scalar
    running_sum = tl.where(lane == 0, 1.0, 0.0)  # [BLOCK]
    acc = running_sum[:, None] * value.to(tl.float32)[None, :]  # [BLOCK, D]
    for first_key in tl.range(0, past_length, BLOCK, num_stages=STAGES):
        key_index = first_key + lane
        in_range = key_index < past_length
        is_visible = tl.load(visible + row * capacity + key_index, mask=in_range, other=0) != 0  # [BLOCK]
        offsets = cache_offset + key_index[:, None] * HEAD_DIM + dim[None, :]
        key_block = tl.load(keys + offsets, mask=in_range[:, None], other=0.0)  # [BLOCK, D]
        value_block = tl.load(values + offsets, mask=in_range[:, None], other=0.0)  # [BLOCK, D]
        scores = tl.sum(key_block.to(tl.float32) * query[None, :], 1)  # [BLOCK]
        scores = tl.where(is_visible, scores, float("-inf"))
        new_max = tl.maximum(running_max, scores)
        # A lane's maximum is -inf until its first visible key. `where` excludes that case: -inf - -inf is NaN.
        has_key = new_max > float("-inf")
        probabilities = tl.where(has_key, tl.exp2(scores - new_max), 0.0)  # [BLOCK], not yet normalized
        rescale = tl.where(has_key, tl.exp2(running_max - new_max), 0.0)
        acc = acc * rescale[:, None] + value_block.to(tl.float32) * probabilities[:, None]
        running_sum = running_sum * rescale + probabilities
        running_max = new_max
    # Lane 0 has at least the new token: the maximum over the lanes is finite.
    lane_rescale = tl.exp2(running_max - tl.max(running_max, 0))  # [BLOCK], max: scalar
    result = tl.sum(acc * lane_rescale[:, None], 0) / tl.sum(running_sum * lane_rescale, 0)  # [D] / scalar
    tl.store(output + (row * HEADS + head) * HEAD_DIM + dim, result.to(output.dtype.element_ty))  # [D]


def decode_attention(
    projected: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    cache_position: torch.Tensor,
    by_head: bool = True,
) -> torch.Tensor:
    """Attention of one new token a row, over the cache and itself.

    Args:
        projected: [B, (H + 2G) * D], contiguous: queries, keys and values, not rotated.
        cos: [B, D], contiguous, of the new tokens' positions; [B, D / 4] by kind.
        sin: as `cos`.
        keys: [B, G, S, D], contiguous, rotated; the new key is written at `cache_position`.
        values: [B, G, S, D], contiguous; the new value is written at `cache_position`.
        visible: [B, S], bool, contiguous: which keys before `cache_position` count.
        cache_position: [B], long, below S; or a single number on the device, the same for all rows.
        by_head: how `projected` is laid out.
    Returns:
        [B, H * D], in the dtype of `projected`.
    """
    B, G, S, D = keys.shape
    H = projected.shape[-1] // D - 2 * G
    output = projected.new_empty(B, H * D)
    constants = {"HEADS": H, "GROUPS": G, "HEAD_DIM": D, "BY_HEAD": int(by_head), "BLOCK": BLOCK, "STAGES": STAGES}
    decode_attention_kernel[(B, H)](
        projected, cos, sin, keys, values, visible, cache_position, output,
        D**-0.5 * math.log2(math.e), S,
        PER_ROW=int(cache_position.numel() > 1), **constants, num_warps=4,
    )  # fmt: skip
    return output
