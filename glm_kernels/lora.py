"""Triton kernels: the products with LoRA's low-rank matrices, with the dropout before them.

Formula; weight [r, N] is A [r, in] or B.T [r, out], p is the dropout probability:
    lora_down:         low_rank [T, r]    = scale * dropout(x) @ weight.T
    lora_up_add:       output [T, N]      = output + scale * dropout(low_rank @ weight)
    lora_weight_grad:  weight_grad [r, N] = scale * low_rank.T @ dropout(x)
    dropout(x) = x * mask / (1 - p)         mask[i] = hash(i, seed + layer) >= p * 2**32, i = token * N + feature
The hash makes the mask a function of the seed: the backward pass recomputes it, and no mask is stored. The seed is in
GPU memory, so that a CUDA graph takes another one in each replay. r is small, so that each product takes about as long
as reading or writing the matrix [T, N] once.

Shapes: T tokens, N features, r rank. A tile is TOKENS x FEATURES, of R rows of A or B.T: r rounded up to a power of 2,
at least the 16 that `tl.dot` takes, and at most MOST_R; a larger rank takes several tiles. SPLITS programs share the
sum over the features of lora_down, or over the tokens of lora_weight_grad: there would be too few programs for a GPU
otherwise. Each stores its part, and another kernel adds the parts in a fixed order: results are the same in every run.
Reference: `glm_kernels.lora_reference`.
Source: "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; the hash is MurmurHash3's 32-bit finalizer.
"""

import torch
import triton
import triton.language as tl

from glm_kernels.lora_reference import Dropout

TOKENS = 32  # tokens of a tile, in every kernel
MOST_SPLITS = 8  # programs that share a sum, in lora_down and lora_weight_grad; fewer where a rank takes several tiles
SUM_BLOCK = 1024  # elements of a program that adds the parts of a sum
UP_FEATURES, GRAD_FEATURES = 128, 64  # features of a tile, in lora_up_add and in lora_weight_grad
DOWN_TILE = 4096  # elements of a tile of the weight in lora_down: more exceed the shared memory of consumer GPUs
MOST_R = 64  # rows of a tile of the weight, for the same reason


@triton.jit
def keep_mask(index, seed, threshold):
    """Whether dropout keeps the elements `index`: their hash is at least `threshold`, p * 2**32. Shape of `index`."""
    h = index.to(tl.uint32) * 0x9E3779B1 ^ seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return (h ^ (h >> 16)) >= threshold.to(tl.uint32)


@triton.jit
def load_seed(seed, layer, DROPOUT: tl.constexpr):
    """The seed of a layer's mask, a scalar; 0 without dropout, when `seed` points to something else."""
    return tl.load(seed) + layer if DROPOUT else 0


@triton.jit
def load_with_dropout(x, token, feature, tokens, features, seed, threshold, DROPOUT: tl.constexpr):
    """A tile [TOKENS, FEATURES] of x [T, N]; zero where dropped or out of range. `scale` includes 1 / (1 - p)."""
    index = token.to(tl.int64)[:, None] * features + feature[None, :]
    mask = (token < tokens)[:, None] & (feature < features)[None, :]
    if DROPOUT:
        mask = mask & keep_mask(index, seed, threshold)
    return tl.load(x + index, mask=mask, other=0.0)  # [TOKENS, FEATURES]


@triton.jit(do_not_specialize=["layer", "tokens"])
def lora_down_kernel(
    x, weight, parts, seed, layer, threshold, tokens, features, rank,
    DROPOUT: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """parts [SPLITS, T, r]: dropout(x [T, N]) @ weight [r, N].T over a share of N, for TOKENS tokens and R rows."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r = tl.program_id(1) * R + tl.arange(0, R)
    split = tl.program_id(2).to(tl.int64)
    layer_seed = load_seed(seed, layer, DROPOUT)
    acc = tl.zeros([R, TOKENS], tl.float32)
    # Program s of SPLITS takes the tiles s, s + SPLITS, s + 2 * SPLITS and so on of the features.
    for first_feature in range(tl.program_id(2) * FEATURES, features, SPLITS * FEATURES):
        feature = first_feature + tl.arange(0, FEATURES)
        # [TOKENS, FEATURES]
        x_tile = load_with_dropout(x, token, feature, tokens, features, layer_seed, threshold, DROPOUT)
        mask = (r < rank)[:, None] & (feature < features)[None, :]
        weight_tile = tl.load(weight + r[:, None] * features + feature[None, :], mask=mask, other=0.0)  # [R, FEATURES]
        acc += tl.dot(weight_tile, tl.trans(x_tile))  # [R, TOKENS]
    offsets = (split * tokens + token)[None, :] * rank + r[:, None]
    mask = (token < tokens)[None, :] & (r < rank)[:, None]
    tl.store(parts + offsets, acc, mask=mask)  # [R, TOKENS]


@triton.jit(do_not_specialize=["layer", "tokens"])
def lora_up_add_kernel(
    low_rank, weight, output, rank_stride, feature_stride, scale, seed, layer, threshold, tokens, features, rank,
    DROPOUT: tl.constexpr, R: tl.constexpr, TILES_R: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """output [T, N] += scale * dropout(low_rank [T, r] @ weight [r, N]), for one tile of the output."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    update = tl.zeros([TOKENS, FEATURES], tl.float32)
    for tile in tl.static_range(TILES_R):
        r = tile * R + tl.arange(0, R)
        mask = (token < tokens)[:, None] & (r < rank)[None, :]
        low_rank_tile = tl.load(low_rank + token[:, None] * rank + r[None, :], mask=mask, other=0.0)  # [TOKENS, R]
        mask = (r < rank)[:, None] & (feature < features)[None, :]
        weight_offsets = r[:, None] * rank_stride + feature[None, :] * feature_stride
        weight_tile = tl.load(weight + weight_offsets, mask=mask, other=0.0)  # [R, FEATURES]
        update += tl.dot(low_rank_tile, weight_tile.to(low_rank_tile.dtype))  # [TOKENS, FEATURES]
    update *= scale
    index = token.to(tl.int64)[:, None] * features + feature[None, :]
    mask = (token < tokens)[:, None] & (feature < features)[None, :]
    if DROPOUT:
        update = tl.where(keep_mask(index, load_seed(seed, layer, DROPOUT), threshold), update, 0.0)
    updated = tl.load(output + index, mask=mask, other=0.0).to(tl.float32) + update  # [TOKENS, FEATURES]
    tl.store(output + index, updated.to(output.dtype.element_ty), mask=mask)  # [TOKENS, FEATURES]


@triton.jit(do_not_specialize=["layer", "tokens"])
def lora_weight_grad_kernel(
    low_rank, x, parts, seed, layer, threshold, tokens, features, rank,
    DROPOUT: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """parts [SPLITS, r, N]: low_rank [T, r].T @ dropout(x [T, N]) over a share of T, for a tile R x FEATURES."""
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    r = tl.program_id(2) * R + tl.arange(0, R)
    split = tl.program_id(1).to(tl.int64)
    layer_seed = load_seed(seed, layer, DROPOUT)
    acc = tl.zeros([R, FEATURES], tl.float32)
    # Program s of SPLITS takes the tiles s, s + SPLITS, s + 2 * SPLITS and so on of the tokens.
    for first_token in range(tl.program_id(1) * TOKENS, tokens, SPLITS * TOKENS):
        token = first_token + tl.arange(0, TOKENS)
        mask = (token < tokens)[None, :] & (r < rank)[:, None]
        # Loaded transposed, as the product needs it.
        low_rank_tile = tl.load(low_rank + token[None, :] * rank + r[:, None], mask=mask, other=0.0)  # [R, TOKENS]
        # [TOKENS, FEATURES]
        x_tile = load_with_dropout(x, token, feature, tokens, features, layer_seed, threshold, DROPOUT)
        acc += tl.dot(low_rank_tile, x_tile)  # [R, FEATURES]
    offsets = (split * rank + r)[:, None] * features + feature[None, :]
    mask = (r < rank)[:, None] & (feature < features)[None, :]
    tl.store(parts + offsets, acc, mask=mask)  # [R, FEATURES]


@triton.jit(do_not_specialize=["numbers"])
def sum_kernel(parts, total, scale, numbers, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """total = scale * the sum over the parts [SPLITS, numbers], for BLOCK numbers."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts + index + split * numbers.to(tl.int64), mask=index < numbers, other=0.0)  # [BLOCK]
    tl.store(total + index, (acc * scale).to(total.dtype.element_ty), mask=index < numbers)  # [BLOCK]


def sum_parts(parts: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """scale * parts.sum(0) in `dtype`, added in fp32 from the first part to the last."""
    total = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    grid = (triton.cdiv(total.numel(), SUM_BLOCK),)
    sum_kernel[grid](parts, total, scale, total.numel(), SPLITS=len(parts), BLOCK=SUM_BLOCK)
    return total


def kernel_arguments(x: torch.Tensor, rank: int, scale: float, dropout: Dropout | None) -> tuple[float, tuple, dict]:
    """The arguments that all kernels share.

    Args:
        x: the matrix [T, N] that dropout applies to.
        rank: r.
        scale, dropout: those of the public functions.
    Returns:
        The scale with dropout's 1 / (1 - p); the run-time arguments from `seed` to `rank`, with the probability as a
        threshold of 32 bits; and the constexpr parameters.
    """
    probability, seed, layer = dropout or (0.0, x, 0)
    rows = min(max(16, triton.next_power_of_2(rank)), MOST_R)
    constants = {"DROPOUT": probability > 0, "R": rows, "TOKENS": TOKENS}
    return scale / (1 - probability), (seed, layer, int(probability * 2**32), *x.shape, rank), constants


def lora_down(x: torch.Tensor, weight: torch.Tensor, scale: float, dropout: Dropout | None) -> torch.Tensor:
    """scale * dropout(x) @ weight.T

    Args:
        x: [T, N], contiguous, bf16 or fp16.
        weight: [r, N], of any strides; converted to the dtype of `x`.
        scale: factor of the product.
        dropout: of x; None for none.
    Returns:
        [T, r], in the dtype of `x`.
    """
    # Every program reads the weight: rows side by side in 16 bits take half the time.
    weight, rank = x.new_empty(weight.shape).copy_(weight), len(weight)
    scale, values, constants = kernel_arguments(x, rank, scale, dropout)
    tiles = triton.cdiv(rank, constants["R"])
    splits = max(MOST_SPLITS // tiles, 1)
    parts = torch.empty(splits, len(x), rank, dtype=torch.float32, device=x.device)
    constants |= {"FEATURES": DOWN_TILE // constants["R"], "SPLITS": splits, "num_stages": 3}
    grid = (triton.cdiv(len(x), TOKENS), tiles, splits)
    lora_down_kernel[grid](x, weight, parts, *values, **constants)
    return sum_parts(parts, scale, x.dtype)


def lora_up_add(
    output: torch.Tensor, low_rank: torch.Tensor, weight: torch.Tensor, scale: float, dropout: Dropout | None
):
    """output += scale * dropout(low_rank @ weight)

    Args:
        output: [T, N], contiguous, bf16 or fp16; updated in place.
        low_rank: [T, r], contiguous, in the dtype of `output`.
        weight: [r, N], of any strides; converted to the dtype of `low_rank` tile by tile.
        scale: factor of the product.
        dropout: of the product, with the mask that `lora_down` has for a matrix [T, N]; None for none.
    """
    scale, values, constants = kernel_arguments(output, len(weight), scale, dropout)
    grid = (triton.cdiv(len(output), TOKENS), triton.cdiv(output.shape[1], UP_FEATURES))
    constants |= {"TILES_R": triton.cdiv(len(weight), constants["R"]), "FEATURES": UP_FEATURES}
    lora_up_add_kernel[grid](low_rank, weight, output, *weight.stride(), scale, *values, **constants)


def lora_weight_grad(low_rank: torch.Tensor, x: torch.Tensor, scale: float, dropout: Dropout | None) -> torch.Tensor:
    """scale * low_rank.T @ dropout(x)

    Args:
        low_rank: [T, r], contiguous, in the dtype of `x`.
        x: [T, N], contiguous, bf16 or fp16.
        scale: factor of the product.
        dropout: of x, with the mask of `lora_down`; None for none.
    Returns:
        [r, N], fp32.
    """
    rank, features = low_rank.shape[1], x.shape[1]
    scale, values, constants = kernel_arguments(x, rank, scale, dropout)
    tiles = triton.cdiv(rank, constants["R"])
    splits = max(MOST_SPLITS // tiles, 1)
    parts = torch.empty(splits, rank, features, dtype=torch.float32, device=x.device)
    constants |= {"FEATURES": GRAD_FEATURES, "SPLITS": splits, "num_stages": 4}
    grid = (triton.cdiv(features, GRAD_FEATURES), splits, tiles)
    lora_weight_grad_kernel[grid](low_rank, x, parts, *values, **constants)
    return sum_parts(parts, scale, torch.float32)
