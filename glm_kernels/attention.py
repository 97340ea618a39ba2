"""Triton kernels: attention of a prefix language model over the samples concatenated in a row, and its gradient.

Formula, for each sample and head. Q, K, V are its rotated queries, rotated keys and values; key k is visible to query
q if k <= q or k is in the context:
    S   = D ** -0.5 * Q @ K.T               -inf where the key is not visible
    P   = softmax(S) = exp2(S * log2(e) - lse)
    O   = P @ V
    lse = log2(sum over keys of exp(S))
Gradient; P is recomputed from lse:
    delta = sum over D of O * dO
    dS  = P * (dO @ V.T - delta)            dV = P.T @ dO
    dQ  = D ** -0.5 * dS @ K                dK = D ** -0.5 * dS.T @ Q
Scores, softmax and sums are in fp32; the operands of products are in the dtype of the activations. The scores are
scaled by log2(e), so that exp2, one GPU instruction, takes the place of exp.

Shapes: T tokens of the row, H heads, D head dimension, C = H * D hidden size, TILE tokens of a program, BLOCK_N keys
and BLOCK_M queries per iteration. The fused projection [T, 3C] is [T, H, 3, D]: query, key and value of each head.
`tiles` [number of tiles, 4] int32: each sample is cut into tiles of TILE tokens, the last with the remainder. Columns:
    0  first token of the sample in the row     2  tokens of the sample's context
    1  tokens of the sample                     3  first token of the tile in the sample
One program a head of a tile. The samples cover the row, so that the programs write every token of the outputs.
Reference: `chatglm.packed_attention.attention_by_sample`.
Source: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", algorithms 1 and 2.
"""

import math

import torch
import triton
import triton.language as tl

from glm_kernels import TILE
from glm_kernels.launch import launch
from glm_kernels.rotary import rotate_in_place

BLOCK_N = 32  # keys per iteration, in the kernels of the output and of the query gradient
BLOCK_M = 64  # queries per iteration, in the kernel of the key and value gradients
LOG2_E = math.log2(math.e)


@triton.jit
def load_tokens(base, sample_start, index, sample_length, stride, HEAD_DIM: tl.constexpr):
    """The vectors [N, D] of tokens `index` [N] of a sample, `stride` elements apart; zeros beyond its end."""
    offsets = (sample_start + index).to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(base + offsets, mask=(index < sample_length)[:, None], other=0.0)  # [N, D]


@triton.jit
def store_tokens(base, vectors, sample_start, index, sample_length, stride, HEAD_DIM: tl.constexpr):
    """Stores vectors [N, D] for tokens `index` [N] of a sample, `stride` elements apart; none beyond its end."""
    offsets = (sample_start + index).to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(base + offsets, vectors.to(base.dtype.element_ty), mask=(index < sample_length)[:, None])  # [N, D]


@triton.jit
def load_tile(tiles, tile):
    """sample_start, sample_length, context_length and the tile's first token in the sample: one row of `tiles`."""
    columns = tiles + tile * 4
    return tl.load(columns), tl.load(columns + 1), tl.load(columns + 2), tl.load(columns + 3)  # scalars


@triton.jit
def prefix_lm_mask(query_index, key_index, sample_length, context_length):
    """[M, N] bool: key_index [N] is in the sample, and either not after query_index [M] or in the context.

    The loop bounds of the kernels below skip the blocks in which no element is true, and must change with this rule.
    """
    return (key_index < sample_length)[None, :] & (
        (key_index[None, :] <= query_index[:, None]) | (key_index < context_length)[None, :]
    )


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    projected, output, lse, tiles, log2_scale, tokens, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """output [T, C] and lse [H, T] for one head of one tile of queries. `tokens` is T."""
    head = tl.program_id(1)
    sample_start, sample_length, context_length, first_query = load_tile(tiles, tl.program_id(0))
    stride: tl.constexpr = HEADS * 3 * HEAD_DIM
    query_base = projected + head * 3 * HEAD_DIM
    key_base, value_base = query_base + HEAD_DIM, query_base + 2 * HEAD_DIM
    query_index = first_query + tl.arange(0, TILE)
    query = load_tokens(query_base, sample_start, query_index, sample_length, stride, HEAD_DIM)  # [TILE, D]
    running_max = tl.full([TILE], float("-inf"), tl.float32)
    running_sum = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, HEAD_DIM], tl.float32)
    # Keys beyond both the context and the last query of the tile are visible to none of its queries. Key 0 is visible
    # to all: running_max is finite after the first iteration.
    key_end = tl.maximum(context_length, tl.minimum(first_query + TILE, sample_length))
    for first_key in range(0, key_end, BLOCK_N):
        key_index = first_key + tl.arange(0, BLOCK_N)
        key = load_tokens(key_base, sample_start, key_index, sample_length, stride, HEAD_DIM)  # [BLOCK_N, D]
        value = load_tokens(value_base, sample_start, key_index, sample_length, stride, HEAD_DIM)  # [BLOCK_N, D]
        scores = tl.dot(query, tl.trans(key)) * log2_scale  # [TILE, BLOCK_N]
        visible = prefix_lm_mask(query_index, key_index, sample_length, context_length)
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))  # [TILE]
        probabilities = tl.exp2(scores - new_max[:, None])  # [TILE, BLOCK_N], not yet normalized
        rescale = tl.exp2(running_max - new_max)  # [TILE]
        running_sum = running_sum * rescale + tl.sum(probabilities, 1)  # [TILE]
        acc = acc * rescale[:, None] + tl.dot(probabilities.to(value.dtype), value)  # [TILE, D]
        running_max = new_max
    out_stride: tl.constexpr = HEADS * HEAD_DIM
    out_base = output + head * HEAD_DIM
    out = acc / running_sum[:, None]  # [TILE, D]
    store_tokens(out_base, out, sample_start, query_index, sample_length, out_stride, HEAD_DIM)  # [TILE, D]
    lse_pointers = lse + head * tokens + sample_start + query_index
    tl.store(lse_pointers, running_max + tl.log2(running_sum), mask=query_index < sample_length)  # [TILE]


@triton.jit(do_not_specialize=["tokens"])
def query_grad_kernel(
    projected, output, output_grad, lse, delta, projected_grad, tiles, scale, log2_scale, tokens,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ in projected_grad [T, H, 3, D], and delta [H, T], for one head of one tile of queries."""
    head = tl.program_id(1)
    sample_start, sample_length, context_length, first_query = load_tile(tiles, tl.program_id(0))
    stride: tl.constexpr = HEADS * 3 * HEAD_DIM
    query_base = projected + head * 3 * HEAD_DIM
    key_base, value_base = query_base + HEAD_DIM, query_base + 2 * HEAD_DIM
    query_index = first_query + tl.arange(0, TILE)
    query = load_tokens(query_base, sample_start, query_index, sample_length, stride, HEAD_DIM)  # [TILE, D]
    out_stride: tl.constexpr = HEADS * HEAD_DIM
    out_grad_base = output_grad + head * HEAD_DIM
    out_grad = load_tokens(out_grad_base, sample_start, query_index, sample_length, out_stride, HEAD_DIM)  # [TILE, D]
    out_base = output + head * HEAD_DIM
    out = load_tokens(out_base, sample_start, query_index, sample_length, out_stride, HEAD_DIM)  # [TILE, D]
    delta_of_query = tl.sum(out.to(tl.float32) * out_grad.to(tl.float32), 1)  # [TILE]
    statistics_offsets = head * tokens + sample_start + query_index
    tl.store(delta + statistics_offsets, delta_of_query, mask=query_index < sample_length)  # [TILE]
    lse_of_query = tl.load(lse + statistics_offsets, mask=query_index < sample_length, other=0.0)  # [TILE]
    acc = tl.zeros([TILE, HEAD_DIM], tl.float32)
    # The same keys as in forward_kernel.
    key_end = tl.maximum(context_length, tl.minimum(first_query + TILE, sample_length))
    for first_key in range(0, key_end, BLOCK_N):
        key_index = first_key + tl.arange(0, BLOCK_N)
        key = load_tokens(key_base, sample_start, key_index, sample_length, stride, HEAD_DIM)  # [BLOCK_N, D]
        value = load_tokens(value_base, sample_start, key_index, sample_length, stride, HEAD_DIM)  # [BLOCK_N, D]
        scores = tl.dot(query, tl.trans(key)) * log2_scale  # [TILE, BLOCK_N]
        visible = prefix_lm_mask(query_index, key_index, sample_length, context_length)
        probabilities = tl.where(visible, tl.exp2(scores - lse_of_query[:, None]), 0.0)
        probabilities_grad = tl.dot(out_grad, tl.trans(value))  # [TILE, BLOCK_N]
        scores_grad = probabilities * (probabilities_grad - delta_of_query[:, None])
        acc += tl.dot(scores_grad.to(key.dtype), key)  # [TILE, D]
    query_grad_base = projected_grad + head * 3 * HEAD_DIM
    store_tokens(query_grad_base, acc * scale, sample_start, query_index, sample_length, stride, HEAD_DIM)  # [TILE, D]


@triton.jit(do_not_specialize=["tokens"])
def key_value_grad_kernel(
    projected, output_grad, lse, delta, projected_grad, tiles, scale, log2_scale, tokens,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dK and dV in projected_grad [T, H, 3, D], for one head of one tile of keys; delta is from query_grad_kernel."""
    head = tl.program_id(1)
    sample_start, sample_length, context_length, first_key = load_tile(tiles, tl.program_id(0))
    stride: tl.constexpr = HEADS * 3 * HEAD_DIM
    out_stride: tl.constexpr = HEADS * HEAD_DIM
    query_base = projected + head * 3 * HEAD_DIM
    key_base, value_base = query_base + HEAD_DIM, query_base + 2 * HEAD_DIM
    key_index = first_key + tl.arange(0, TILE)
    key = load_tokens(key_base, sample_start, key_index, sample_length, stride, HEAD_DIM)  # [TILE, D]
    value = load_tokens(value_base, sample_start, key_index, sample_length, stride, HEAD_DIM)  # [TILE, D]
    key_grad = tl.zeros([TILE, HEAD_DIM], tl.float32)
    value_grad = tl.zeros([TILE, HEAD_DIM], tl.float32)
    # If the tile has keys of the context, all queries of the sample see those; if not, only queries from first_key on.
    for first_query in range(tl.where(first_key < context_length, 0, first_key), sample_length, BLOCK_M):
        query_index = first_query + tl.arange(0, BLOCK_M)
        query = load_tokens(query_base, sample_start, query_index, sample_length, stride, HEAD_DIM)  # [BLOCK_M, D]
        out_grad_base = output_grad + head * HEAD_DIM
        # [BLOCK_M, D]
        out_grad = load_tokens(out_grad_base, sample_start, query_index, sample_length, out_stride, HEAD_DIM)
        statistics_offsets = head * tokens + sample_start + query_index
        in_range = query_index < sample_length
        lse_of_query = tl.load(lse + statistics_offsets, mask=in_range, other=0.0)  # [BLOCK_M]
        delta_of_query = tl.load(delta + statistics_offsets, mask=in_range, other=0.0)  # [BLOCK_M]
        scores = tl.dot(query, tl.trans(key)) * log2_scale  # [BLOCK_M, TILE]
        # prefix_lm_mask bounds the keys only. Queries beyond the sample, and their out_grad, are loaded as zeros.
        visible = prefix_lm_mask(query_index, key_index, sample_length, context_length)
        probabilities = tl.where(visible, tl.exp2(scores - lse_of_query[:, None]), 0.0)
        value_grad += tl.dot(tl.trans(probabilities.to(out_grad.dtype)), out_grad)  # [TILE, D]
        probabilities_grad = tl.dot(out_grad, tl.trans(value))  # [BLOCK_M, TILE]
        scores_grad = probabilities * (probabilities_grad - delta_of_query[:, None])
        key_grad += tl.dot(tl.trans(scores_grad.to(query.dtype)), query)  # [TILE, D]
    grad_base = projected_grad + head * 3 * HEAD_DIM  # query, key and value gradient are D apart
    key_grad_base = grad_base + HEAD_DIM
    key_grad *= scale
    store_tokens(key_grad_base, key_grad, sample_start, key_index, sample_length, stride, HEAD_DIM)  # [TILE, D]
    value_grad_base = grad_base + 2 * HEAD_DIM
    store_tokens(value_grad_base, value_grad, sample_start, key_index, sample_length, stride, HEAD_DIM)  # [TILE, D]


class PackedAttention(torch.autograd.Function):
    """Rotary positions, then prefix-LM attention within each sample of a row."""

    @staticmethod
    def forward(ctx, projected, cos, sin, tiles, head_dim):
        """Output of the attention.

        Args:
            projected: [T, 3C], bf16 or fp16, contiguous. Its queries and keys are rotated in place, and it is saved
                for the backward pass: no other operation may need it as it was.
            cos: [T, D], contiguous.
            sin: [T, D], contiguous.
            tiles: [number of tiles, 4], int32, contiguous; see the top of this file.
            head_dim: D, a power of 2.
        Returns:
            [T, C], in the dtype of `projected`.
        """
        heads = projected.shape[-1] // (3 * head_dim)
        constants = {"HEADS": heads, "HEAD_DIM": head_dim, "TILE": TILE}
        rotate_in_place(projected, cos, sin, head_dim)
        output = projected.new_empty(len(projected), heads * head_dim)
        lse = torch.empty(heads, len(projected), dtype=torch.float32, device=projected.device)
        launch(
            forward_kernel, (len(tiles), heads), projected, output, lse, tiles, head_dim**-0.5 * LOG2_E,
            len(projected), **constants, BLOCK_N=BLOCK_N, num_stages=3,
        )  # fmt: skip
        ctx.save_for_backward(projected, cos, sin, tiles, output, lse)
        ctx.constants = constants
        return output

    @staticmethod
    def backward(ctx, output_grad):
        """[T, C] -> [T, 3C], the gradient of the fused projection before its rotation."""
        projected, cos, sin, tiles, output, lse = ctx.saved_tensors
        output_grad = output_grad.contiguous()
        grad, delta = torch.empty_like(projected), torch.empty_like(lse)
        head_dim, grid = ctx.constants["HEAD_DIM"], (len(tiles), ctx.constants["HEADS"])
        scales = (head_dim**-0.5, head_dim**-0.5 * LOG2_E, len(projected))
        # In this order: the first kernel stores delta, the second loads it.
        launch(
            query_grad_kernel, grid, projected, output, output_grad, lse, delta, grad, tiles, *scales,
            **ctx.constants, BLOCK_N=BLOCK_N, num_stages=2,
        )  # fmt: skip
        launch(
            key_value_grad_kernel, grid, projected, output_grad, lse, delta, grad, tiles, *scales,
            **ctx.constants, BLOCK_M=BLOCK_M, num_stages=2,
        )  # fmt: skip
        rotate_in_place(grad, cos, sin, head_dim, inverse=True)
        return grad, None, None, None, None
