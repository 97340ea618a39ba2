"""Triton kernels: attention of a prefix language model over concatenated samples.

A row holds samples one after the other; `tiles` lists the pieces of TILE tokens they are cut into, as
(first token of the sample, tokens in it, tokens of its context, first token of the tile within the sample).
Each program works for one head on one tile; every row belongs to a sample. The softmax is computed block by block, its
sums in fp32.

Source: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", algorithms 1 and 2.
"""

import math

import torch
import triton
import triton.language as tl

from glm_kernels import TILE
from glm_kernels.launch import launch
from glm_kernels.rotary import rotate_in_place

BLOCK_N, BLOCK_M = 32, 64  # at once, in the loops over keys and over queries
LOG2_E = math.log2(math.e)


@triton.jit
def load_rows(base, start, index, length, stride, HEAD_DIM: tl.constexpr):
    """Rows `index` of a sample that begins at row `start`; zeros beyond its end."""
    at = (start + index).to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(base + at, mask=(index < length)[:, None], other=0.0)


@triton.jit
def store_rows(base, value, start, index, length, stride, HEAD_DIM: tl.constexpr):
    """The counterpart of `load_rows`."""
    at = (start + index).to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(base + at, value.to(base.dtype.element_ty), mask=(index < length)[:, None])


@triton.jit
def read_tile(tiles, tile):
    """Of a tile: the first token of its sample, tokens in it, tokens of its context, first token of the tile in it."""
    at = tiles + tile * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def visible(query_index, key_index, length, context):
    """[queries, keys]: the key is of the same sample, and in its context or not after the query."""
    return (key_index < length)[None, :] & (
        (key_index[None, :] <= query_index[:, None]) | (key_index < context)[None, :]
    )


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    projected, output, lse, tiles, scale, tokens, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp (base 2) of one tile of queries of one head."""
    head = tl.program_id(1)
    start, length, context, first_query = read_tile(tiles, tl.program_id(0))
    stride: tl.constexpr = HEADS * 3 * HEAD_DIM
    queries = projected + head * 3 * HEAD_DIM
    query_index = first_query + tl.arange(0, TILE)
    query = load_rows(queries, start, query_index, length, stride, HEAD_DIM)
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    accumulated = tl.zeros([TILE, HEAD_DIM], tl.float32)
    for first_key in range(0, tl.maximum(context, tl.minimum(first_query + TILE, length)), BLOCK):
        key_index = first_key + tl.arange(0, BLOCK)
        key = load_rows(queries + HEAD_DIM, start, key_index, length, stride, HEAD_DIM)
        value = load_rows(queries + 2 * HEAD_DIM, start, key_index, length, stride, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key)) * scale
        scores = tl.where(visible(query_index, key_index, length, context), scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - better[:, None])
        shrink = tl.exp2(best - better)
        total = total * shrink + tl.sum(weights, 1)
        accumulated = accumulated * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
        best = better
    store_rows(
        output + head * HEAD_DIM, accumulated / total[:, None], start, query_index, length, HEADS * HEAD_DIM, HEAD_DIM
    )
    tl.store(lse + head * tokens + start + query_index, best + tl.log2(total), mask=query_index < length)


@triton.jit(do_not_specialize=["tokens"])
def query_grad_kernel(
    projected, output, output_grad, lse, delta, projected_grad, tiles, scale, log2_scale, tokens,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, and `delta`, the sum of output x its gradient of each query."""
    head = tl.program_id(1)
    start, length, context, first_query = read_tile(tiles, tl.program_id(0))
    stride: tl.constexpr = HEADS * 3 * HEAD_DIM
    queries = projected + head * 3 * HEAD_DIM
    query_index = first_query + tl.arange(0, TILE)
    query = load_rows(queries, start, query_index, length, stride, HEAD_DIM)
    out_stride: tl.constexpr = HEADS * HEAD_DIM
    out_grad = load_rows(output_grad + head * HEAD_DIM, start, query_index, length, out_stride, HEAD_DIM)
    out = load_rows(output + head * HEAD_DIM, start, query_index, length, out_stride, HEAD_DIM)
    delta_of_query = tl.sum(out.to(tl.float32) * out_grad.to(tl.float32), 1)
    statistics_at = head * tokens + start + query_index
    tl.store(delta + statistics_at, delta_of_query, mask=query_index < length)
    lse_of_query = tl.load(lse + statistics_at, mask=query_index < length, other=0.0)
    accumulated = tl.zeros([TILE, HEAD_DIM], tl.float32)
    for first_key in range(0, tl.maximum(context, tl.minimum(first_query + TILE, length)), BLOCK):
        key_index = first_key + tl.arange(0, BLOCK)
        key = load_rows(queries + HEAD_DIM, start, key_index, length, stride, HEAD_DIM)
        value = load_rows(queries + 2 * HEAD_DIM, start, key_index, length, stride, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key)) * log2_scale
        seen = visible(query_index, key_index, length, context)
        weights = tl.where(seen, tl.exp2(scores - lse_of_query[:, None]), 0.0)
        scores_grad = weights * (tl.dot(out_grad, tl.trans(value)) - delta_of_query[:, None])
        accumulated += tl.dot(scores_grad.to(key.dtype), key)
    store_rows(projected_grad + head * 3 * HEAD_DIM, accumulated * scale, start, query_index, length, stride, HEAD_DIM)


@triton.jit(do_not_specialize=["tokens"])
def key_value_grad_kernel(
    projected, output_grad, lse, delta, projected_grad, tiles, scale, log2_scale, tokens,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, from every query that sees any of them."""
    head = tl.program_id(1)
    start, length, context, first_key = read_tile(tiles, tl.program_id(0))
    stride: tl.constexpr = HEADS * 3 * HEAD_DIM
    queries = projected + head * 3 * HEAD_DIM
    key_index = first_key + tl.arange(0, TILE)
    key = load_rows(queries + HEAD_DIM, start, key_index, length, stride, HEAD_DIM)
    value = load_rows(queries + 2 * HEAD_DIM, start, key_index, length, stride, HEAD_DIM)
    key_grad = tl.zeros([TILE, HEAD_DIM], tl.float32)
    value_grad = tl.zeros([TILE, HEAD_DIM], tl.float32)
    for first_query in range(tl.where(first_key < context, 0, first_key), length, BLOCK):
        query_index = first_query + tl.arange(0, BLOCK)
        query = load_rows(queries, start, query_index, length, stride, HEAD_DIM)
        out_grad = load_rows(output_grad + head * HEAD_DIM, start, query_index, length, HEADS * HEAD_DIM, HEAD_DIM)
        statistics_at = head * tokens + start + query_index
        lse_of_query = tl.load(lse + statistics_at, mask=query_index < length, other=0.0)
        delta_of_query = tl.load(delta + statistics_at, mask=query_index < length, other=0.0)
        scores = tl.dot(query, tl.trans(key)) * log2_scale
        seen = visible(query_index, key_index, length, context) & (query_index < length)[:, None]
        weights = tl.where(seen, tl.exp2(scores - lse_of_query[:, None]), 0.0)
        value_grad += tl.dot(tl.trans(weights.to(out_grad.dtype)), out_grad)
        scores_grad = weights * (tl.dot(out_grad, tl.trans(value)) - delta_of_query[:, None])
        key_grad += tl.dot(tl.trans(scores_grad.to(query.dtype)), query)
    grads = projected_grad + head * 3 * HEAD_DIM
    store_rows(grads + HEAD_DIM, key_grad * scale, start, key_index, length, stride, HEAD_DIM)
    store_rows(grads + 2 * HEAD_DIM, value_grad, start, key_index, length, stride, HEAD_DIM)


class PackedAttention(torch.autograd.Function):
    """Rotary positions and attention. `projected` is overwritten: queries and keys in it are rotated afterwards."""

    @staticmethod
    def forward(ctx, projected, cos, sin, tiles, head_dim):
        heads = projected.shape[-1] // (3 * head_dim)
        shape = {"HEADS": heads, "HEAD_DIM": head_dim, "TILE": TILE}
        rotate_in_place(projected, cos, sin, head_dim)
        output = projected.new_empty(len(projected), heads * head_dim)
        lse = torch.empty(heads, len(projected), dtype=torch.float32, device=projected.device)
        launch(
            forward_kernel, (len(tiles), heads), projected, output, lse, tiles, head_dim**-0.5 * LOG2_E,
            len(projected), **shape, BLOCK=BLOCK_N, num_stages=3,
        )  # fmt: skip
        ctx.save_for_backward(projected, cos, sin, tiles, output, lse)
        ctx.shape = shape
        return output

    @staticmethod
    def backward(ctx, output_grad):
        projected, cos, sin, tiles, output, lse = ctx.saved_tensors
        output_grad = output_grad.contiguous()
        grad, delta = torch.empty_like(projected), torch.empty_like(lse)
        head_dim, grid = ctx.shape["HEAD_DIM"], (len(tiles), ctx.shape["HEADS"])
        scales = (head_dim**-0.5, head_dim**-0.5 * LOG2_E, len(projected))
        launch(
            query_grad_kernel, grid, projected, output, output_grad, lse, delta, grad, tiles, *scales, **ctx.shape,
            BLOCK=BLOCK_N, num_stages=2,
        )  # fmt: skip
        launch(
            key_value_grad_kernel, grid, projected, output_grad, lse, delta, grad, tiles, *scales, **ctx.shape,
            BLOCK=BLOCK_M, num_stages=2,
        )  # fmt: skip
        rotate_in_place(grad, cos, sin, head_dim, inverse=True)
        return grad, None, None, None, None
