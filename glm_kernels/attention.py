"""Triton kernels: attention within the samples that are concatenated in a row, and its gradient.

Formula, for each sample and head. Q, K, V are its rotated queries, rotated keys and values; key k is visible to query
q if k <= q or k is in the context, which has 0 tokens in a causal model:
    S   = D ** -0.5 * Q @ K.T               -inf where the key is not visible
    P   = softmax(S) = exp2(S * log2(e) - lse)
    O   = P @ V
    lse = log2(sum over keys of exp(S))
Gradient; P is recomputed from lse:
    delta = sum over D of O * dO
    dS  = P * (dO @ V.T - delta)            dV = P.T @ dO
    dQ  = D ** -0.5 * dS @ K                dK = D ** -0.5 * dS.T @ Q
Scores, softmax and sums are in fp32; the operands of products are in the dtype of the activations. The scores are
scaled by log2(e), so that exp2, one GPU instruction, takes the place of exp. With grouped queries K and V of a group
serve H / G heads, and their gradients are sums over these.

Shapes: T tokens of the row, H heads of queries, G heads of keys and values, D head dimension, TILE tokens of a
program, BLOCK_N keys and BLOCK_M queries per iteration. The fused projection [T, (H + 2G) * D] is, see `HeadLayout`,
    by head   [T, H, 3, D]: query, key and value of each head, with G = H;
    by kind   [T, H + G + G, D]: all queries, all keys, all values.
`tiles` [number of tiles, 4] int32: each sample is cut into tiles of TILE tokens, the last with the remainder. Columns:
    0  first token of the sample in the row     2  tokens of the sample's context
    1  tokens of the sample                     3  first token of the tile in the sample
One program a head of a tile. The samples cover the row, so that the programs write every token of the outputs.
Reference: `glm_shared.packed_attention.attention_by_sample`.
Source: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", algorithms 1 and 2.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from glm_kernels import TILE
from glm_kernels.rotary import rotate_in_place, rotate_pairs_in_place

BLOCK_N = 32  # keys per iteration, in the kernels of the output and of the query gradient
BLOCK_M = 64  # queries per iteration, in the kernel of the key and value gradients
LOG2_E = math.log2(math.e)
MOST_SPLITS = 4  # programs that share the heads of a group in the kernel of the key and value gradients


class HeadLayout(NamedTuple):
    """Where queries, keys and values are in the fused projection.

    Attributes:
        heads: H.
        groups: G.
        head_dim: D, a power of 2.
        by_head: whether query, key and value of each head are side by side; otherwise all queries, keys, values.
    """

    heads: int
    groups: int
    head_dim: int
    by_head: bool

    @property
    def splits(self) -> int:
        """Programs that share the heads of a group, each with a sum of its own over a part of them."""
        return math.gcd(self.heads // self.groups, MOST_SPLITS)

    @property
    def constants(self) -> dict[str, int]:
        """The constexpr parameters that all kernels have."""
        sizes = {"HEADS": self.heads, "GROUPS": self.groups, "HEAD_DIM": self.head_dim}
        return sizes | {"BY_HEAD": int(self.by_head), "TILE": TILE}


@triton.jit
def query_offset(head, HEAD_DIM: tl.constexpr, BY_HEAD: tl.constexpr):
    """Where the query of a head begins in the vector of a token."""
    return head * HEAD_DIM * (3 if BY_HEAD else 1)  # scalar


@triton.jit
def key_offset(group, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BY_HEAD: tl.constexpr):
    """Where the key of a group begins in the vector of a token."""
    return (group * 3 + 1 if BY_HEAD else HEADS + group) * HEAD_DIM  # scalar


@triton.jit
def value_offset(group, HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BY_HEAD: tl.constexpr):
    """Where the value of a group begins in the vector of a token."""
    return (group * 3 + 2 if BY_HEAD else HEADS + GROUPS + group) * HEAD_DIM  # scalar


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
def rotate_back(vectors, cos, sin, sample_start, index, sample_length, N: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The inverse rotation of ChatGLM-6B for vectors [N, D] of tokens `index` [N]; see `glm_kernels.rotary`."""
    quarter: tl.constexpr = HEAD_DIM // 4
    # Numbered by half, first or second, frequency.
    pairs = tl.permute(tl.reshape(vectors, (N, 2, 2, quarter)), (0, 1, 3, 2))  # [N, 2, D / 4, 2]
    first, second = tl.split(pairs)  # [N, 2, D / 4] each
    features = tl.arange(0, 2)[:, None] * (HEAD_DIM // 2) + tl.arange(0, quarter)[None, :]  # [2, D / 4]
    offsets = (sample_start + index)[:, None, None] * HEAD_DIM + features[None, :, :]
    in_range = (index < sample_length)[:, None, None]
    c = tl.load(cos + offsets, mask=in_range, other=0.0).to(tl.float32)  # [N, 2, D / 4]
    s = tl.load(sin + offsets, mask=in_range, other=0.0).to(tl.float32)  # [N, 2, D / 4]
    rotated = tl.join(first * c + second * s, second * c - first * s)  # [N, 2, D / 4, 2]
    return tl.reshape(tl.permute(rotated, (0, 1, 3, 2)), (N, HEAD_DIM))  # [N, D]


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
    projected, output, lse, tiles, log2_scale, tokens, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BY_HEAD: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """output [T, H * D] and lse [H, T] for one head of one tile of queries. `tokens` is T."""
    head = tl.program_id(1)
    group = head // (HEADS // GROUPS)
    sample_start, sample_length, context_length, first_query = load_tile(tiles, tl.program_id(0))
    stride: tl.constexpr = (HEADS + 2 * GROUPS) * HEAD_DIM
    query_base = projected + query_offset(head, HEAD_DIM, BY_HEAD)
    key_base = projected + key_offset(group, HEADS, HEAD_DIM, BY_HEAD)
    value_base = projected + value_offset(group, HEADS, GROUPS, HEAD_DIM, BY_HEAD)
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
    projected, output, output_grad, lse, delta, projected_grad, tiles, cos, sin, scale, log2_scale, tokens,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BY_HEAD: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ in projected_grad, laid out as `projected`, and delta [H, T], for one head of one tile of queries.

    By head, dQ is rotated back.
    """
    head = tl.program_id(1)
    group = head // (HEADS // GROUPS)
    sample_start, sample_length, context_length, first_query = load_tile(tiles, tl.program_id(0))
    stride: tl.constexpr = (HEADS + 2 * GROUPS) * HEAD_DIM
    query_base = projected + query_offset(head, HEAD_DIM, BY_HEAD)
    key_base = projected + key_offset(group, HEADS, HEAD_DIM, BY_HEAD)
    value_base = projected + value_offset(group, HEADS, GROUPS, HEAD_DIM, BY_HEAD)
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
    acc *= scale
    if BY_HEAD:
        acc = rotate_back(acc, cos, sin, sample_start, query_index, sample_length, TILE, HEAD_DIM)  # [TILE, D]
    query_grad_base = projected_grad + query_offset(head, HEAD_DIM, BY_HEAD)
    store_tokens(query_grad_base, acc, sample_start, query_index, sample_length, stride, HEAD_DIM)  # [TILE, D]


@triton.jit(do_not_specialize=["tokens"])
def key_value_grad_kernel(
    projected, output_grad, lse, delta, key_value_grad, tiles, cos, sin, scale, log2_scale, tokens,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BY_HEAD: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dK and dV for one group of one tile of keys, summed over a part of its heads; delta is from query_grad_kernel.

    key_value_grad is the gradient of `projected` by head, which has one head a group, with dK rotated back; or
    [SPLITS, T, 2, G, D] fp32.
    """
    group, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    sample_start, sample_length, context_length, first_key = load_tile(tiles, tl.program_id(0))
    stride: tl.constexpr = (HEADS + 2 * GROUPS) * HEAD_DIM
    out_stride: tl.constexpr = HEADS * HEAD_DIM
    key_base = projected + key_offset(group, HEADS, HEAD_DIM, BY_HEAD)
    value_base = projected + value_offset(group, HEADS, GROUPS, HEAD_DIM, BY_HEAD)
    key_index = first_key + tl.arange(0, TILE)
    key = load_tokens(key_base, sample_start, key_index, sample_length, stride, HEAD_DIM)  # [TILE, D]
    value = load_tokens(value_base, sample_start, key_index, sample_length, stride, HEAD_DIM)  # [TILE, D]
    key_grad = tl.zeros([TILE, HEAD_DIM], tl.float32)
    value_grad = tl.zeros([TILE, HEAD_DIM], tl.float32)
    heads_here: tl.constexpr = HEADS // GROUPS // SPLITS
    for index in range(heads_here):
        head = (group * SPLITS + split) * heads_here + index
        query_base = projected + query_offset(head, HEAD_DIM, BY_HEAD)
        out_grad_base = output_grad + head * HEAD_DIM
        # If the tile has keys of the context, all queries of the sample see those; if not, those from first_key on.
        for first_query in range(tl.where(first_key < context_length, 0, first_key), sample_length, BLOCK_M):
            query_index = first_query + tl.arange(0, BLOCK_M)
            query = load_tokens(query_base, sample_start, query_index, sample_length, stride, HEAD_DIM)  # [BLOCK_M, D]
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
    key_grad *= scale
    grad_stride: tl.constexpr = stride if BY_HEAD else 2 * GROUPS * HEAD_DIM
    if BY_HEAD:
        key_grad = rotate_back(key_grad, cos, sin, sample_start, key_index, sample_length, TILE, HEAD_DIM)  # [TILE, D]
        key_grad_base = key_value_grad + key_offset(group, HEADS, HEAD_DIM, BY_HEAD)
        value_grad_base = key_value_grad + value_offset(group, HEADS, GROUPS, HEAD_DIM, BY_HEAD)
    else:
        key_grad_base = key_value_grad + split.to(tl.int64) * tokens * grad_stride + group * HEAD_DIM
        value_grad_base = key_grad_base + GROUPS * HEAD_DIM
    store_tokens(key_grad_base, key_grad, sample_start, key_index, sample_length, grad_stride, HEAD_DIM)  # [TILE, D]
    # [TILE, D]
    store_tokens(value_grad_base, value_grad, sample_start, key_index, sample_length, grad_stride, HEAD_DIM)


def attend(projected: torch.Tensor, tiles: torch.Tensor, layout: HeadLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a rotated projection [T, (H + 2G) * D]: output [T, H * D], and lse [H, T], fp32."""
    heads, head_dim = layout.heads, layout.head_dim
    output = projected.new_empty(len(projected), heads * head_dim)
    lse = torch.empty(heads, len(projected), dtype=torch.float32, device=projected.device)
    forward_kernel[(len(tiles), heads)](
        projected, output, lse, tiles, head_dim**-0.5 * LOG2_E,
        len(projected), **layout.constants, BLOCK_N=BLOCK_N, num_stages=3,
    )  # fmt: skip
    return output, lse


def attend_grad(
    projected: torch.Tensor,
    tiles: torch.Tensor,
    layout: HeadLayout,
    output: torch.Tensor,
    lse: torch.Tensor,
    output_grad: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Gradient of a rotated projection, laid out as it; `output` and `lse` are those of `attend`.

    By head the gradient is that of the projection before its rotation, cos and sin [T, D].
    """
    output_grad = output_grad.contiguous()
    grad, delta = torch.empty_like(projected), torch.empty_like(lse)
    T, splits = len(projected), layout.splits
    key_value_grad = grad
    if not layout.by_head:
        width = 2 * layout.groups * layout.head_dim
        key_value_grad = torch.empty(splits, T, width, dtype=torch.float32, device=grad.device)
    cos, sin = rotation or (lse, lse)  # not read by kind
    values = (tiles, cos, sin, layout.head_dim**-0.5, layout.head_dim**-0.5 * LOG2_E, T)
    # In this order: the first kernel stores delta, the second loads it.
    query_grad_kernel[(len(tiles), layout.heads)](
        projected, output, output_grad, lse, delta, grad,
        *values, **layout.constants, BLOCK_N=BLOCK_N, num_stages=2,
    )  # fmt: skip
    key_value_grad_kernel[(len(tiles), layout.groups * splits)](
        projected, output_grad, lse, delta,
        key_value_grad, *values, **layout.constants, SPLITS=splits, BLOCK_M=BLOCK_M, num_stages=2,
    )  # fmt: skip
    if not layout.by_head:
        grad[:, layout.heads * layout.head_dim :] = key_value_grad.sum(0)
    return grad


class PackedAttention(torch.autograd.Function):
    """Rotary positions of both halves of a head, then attention within each sample of a row; laid out by head."""

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
            [T, C], in the dtype of `projected`; C = H * D.
        """
        heads = projected.shape[-1] // (3 * head_dim)
        ctx.layout = HeadLayout(heads, heads, head_dim, by_head=True)
        rotate_in_place(projected, cos, sin, head_dim)
        output, lse = attend(projected, tiles, ctx.layout)
        ctx.save_for_backward(projected, cos, sin, tiles, output, lse)
        return output

    @staticmethod
    def backward(ctx, output_grad):
        """[T, C] -> [T, 3C], the gradient of the fused projection before its rotation."""
        projected, cos, sin, tiles, output, lse = ctx.saved_tensors
        return attend_grad(projected, tiles, ctx.layout, output, lse, output_grad, (cos, sin)), None, None, None, None


class GroupedPackedAttention(torch.autograd.Function):
    """Rotary positions of the first half of a head, then attention within each sample of a row; laid out by kind."""

    @staticmethod
    def forward(ctx, projected, cos, sin, tiles, heads, groups):
        """Output of the attention.

        Args:
            projected: [T, (H + 2G) * D], bf16 or fp16, contiguous; see `PackedAttention`.
            cos: [T, D / 4], contiguous.
            sin: [T, D / 4], contiguous.
            tiles: [number of tiles, 4], int32, contiguous; see the top of this file.
            heads: H.
            groups: G.
        Returns:
            [T, H * D], in the dtype of `projected`.
        """
        ctx.layout = HeadLayout(heads, groups, projected.shape[-1] // (heads + 2 * groups), by_head=False)
        rotate_pairs_in_place(projected, cos, sin, heads, groups)
        output, lse = attend(projected, tiles, ctx.layout)
        ctx.save_for_backward(projected, cos, sin, tiles, output, lse)
        return output

    @staticmethod
    def backward(ctx, output_grad):
        """[T, H * D] -> [T, (H + 2G) * D], the gradient of the fused projection before its rotation."""
        projected, cos, sin, tiles, output, lse = ctx.saved_tensors
        grad = attend_grad(projected, tiles, ctx.layout, output, lse, output_grad)
        rotate_pairs_in_place(grad, cos, sin, ctx.layout.heads, ctx.layout.groups, inverse=True)
        return grad, None, None, None, None, None
