"""Triton kernels for the adapter's thin matrices, with the dropout before them.

A thin matrix has r rows, a few; a matrix product with it is as fast as the other operand can be read, once. Dropout
is a hash of seed and index, so that the backward pass repeats it without a mask in memory.

Shapes: T tokens, N features, R the rank padded to what a matrix instruction needs.
"""

import torch
import triton
import triton.language as tl

from glm_kernels.launch import launch

TOKENS, SPLITS = 32, 8
UP_FEATURES, GRAD_FEATURES = 128, 64
DOWN_TILE = 4096  # numbers of the thin matrix at once: more do not fit the shared memory of consumer GPUs


@triton.jit
def keep(index, seed, threshold):
    """True for an index that dropout keeps: a hash of it (MurmurHash3's mixer) is at least `threshold`."""
    h = index.to(tl.uint32) * 0x9E3779B1 ^ seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return (h ^ (h >> 16)) >= threshold.to(tl.uint32)


@triton.jit
def load_dropped(base, token, feature, tokens, features, seed, threshold, DROPOUT: tl.constexpr):
    """A tile [tokens, features] of a matrix, zero where dropout drops or beyond the end; not scaled up."""
    index = token.to(tl.int64)[:, None] * features + feature[None, :]
    there = (token < tokens)[:, None] & (feature < features)[None, :]
    if DROPOUT:
        there = there & keep(index, seed, threshold)
    return tl.load(base + index, mask=there, other=0.0)


@triton.jit(do_not_specialize=["seed", "tokens"])
def lora_down_kernel(
    rows, thin, output, factor, seed, threshold, tokens, features, rank,
    DROPOUT: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """output [T, r] = factor * dropped(rows) [T, N] @ thin [r, N].T"""
    token, r = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, R)
    accumulated = tl.zeros([TOKENS, R], tl.float32)
    for first in range(0, features, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        tile = load_dropped(rows, token, feature, tokens, features, seed, threshold, DROPOUT)
        mask = (r < rank)[None, :] & (feature < features)[:, None]
        thin_tile = tl.load(thin + r[None, :] * features + feature[:, None], mask=mask, other=0.0)
        accumulated += tl.dot(tile, thin_tile.to(tile.dtype))
    at = token[:, None] * rank + r[None, :]
    mask = (token < tokens)[:, None] & (r < rank)[None, :]
    tl.store(output + at, (accumulated * factor).to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "tokens"])
def lora_up_add_kernel(
    low_rank, thin, rows, factor, seed, threshold, tokens, features, rank,
    DROPOUT: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """rows [T, N] += factor * dropped(low_rank [T, r] @ thin [r, N])"""
    token, r = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, R)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    mask = (token < tokens)[:, None] & (r < rank)[None, :]
    left = tl.load(low_rank + token[:, None] * rank + r[None, :], mask=mask, other=0.0)
    mask = (r < rank)[:, None] & (feature < features)[None, :]
    right = tl.load(thin + r[:, None] * features + feature[None, :], mask=mask, other=0.0)
    change = tl.dot(left, right.to(left.dtype)) * factor
    index = token.to(tl.int64)[:, None] * features + feature[None, :]
    there = (token < tokens)[:, None] & (feature < features)[None, :]
    if DROPOUT:
        change = tl.where(keep(index, seed, threshold), change, 0.0)
    value = tl.load(rows + index, mask=there, other=0.0).to(tl.float32) + change
    tl.store(rows + index, value.to(rows.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["seed", "tokens"])
def lora_weight_grad_kernel(
    low_rank, rows, output, factor, seed, threshold, tokens, features, rank,
    DROPOUT: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """output [r, N], fp32, += factor * low_rank [T, r].T @ dropped(rows) [T, N]; each program a share of the tokens"""
    feature, r = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES), tl.arange(0, R)
    accumulated = tl.zeros([R, FEATURES], tl.float32)
    for first in range(tl.program_id(1) * TOKENS, tokens, SPLITS * TOKENS):
        token = first + tl.arange(0, TOKENS)
        mask = (token < tokens)[None, :] & (r < rank)[:, None]
        left = tl.load(low_rank + token[None, :] * rank + r[:, None], mask=mask, other=0.0)
        tile = load_dropped(rows, token, feature, tokens, features, seed, threshold, DROPOUT)
        accumulated += tl.dot(left, tile)
    at = r[:, None] * features + feature[None, :]
    mask = (r < rank)[:, None] & (feature < features)[None, :]
    tl.atomic_add(output + at, accumulated * factor, mask=mask)


def arguments(rows: torch.Tensor, rank: int, factor: float, dropout: float, seed: int) -> tuple[tuple, dict]:
    """What all kernels take: factor with dropout's scale, seed, threshold, sizes; and their constants."""
    threshold = int(dropout * 2**32)
    constants = {"DROPOUT": dropout > 0, "R": max(16, triton.next_power_of_2(rank)), "TOKENS": TOKENS}
    return (factor / (1 - dropout), seed, threshold, *rows.shape, rank), constants


def lora_down(rows: torch.Tensor, thin: torch.Tensor, factor: float, dropout: float, seed: int) -> torch.Tensor:
    """`factor * dropout(rows) @ thin.T`: [T, N] and [r, N] -> [T, r] in the type of `rows`."""
    output = rows.new_empty(len(rows), len(thin))
    values, constants = arguments(rows, len(thin), factor, dropout, seed)
    features = max(16, DOWN_TILE // constants["R"])
    grid = (triton.cdiv(len(rows), TOKENS),)
    launch(lora_down_kernel, grid, rows, thin, output, *values, **constants, FEATURES=features, num_stages=4)
    return output


def lora_up_add(
    rows: torch.Tensor, low_rank: torch.Tensor, thin: torch.Tensor, factor: float, dropout: float, seed: int
):
    """`rows += factor * dropout(low_rank @ thin)`: [T, r] and [r, N] into [T, N]."""
    values, constants = arguments(rows, len(thin), factor, dropout, seed)
    grid = (triton.cdiv(len(rows), TOKENS), triton.cdiv(rows.shape[1], UP_FEATURES))
    launch(lora_up_add_kernel, grid, low_rank, thin, rows, *values, **constants, FEATURES=UP_FEATURES)


def lora_weight_grad(
    low_rank: torch.Tensor, rows: torch.Tensor, factor: float, dropout: float, seed: int
) -> torch.Tensor:
    """`factor * low_rank.T @ dropout(rows)`: [T, r] and [T, N] -> [r, N] in fp32."""
    rank = low_rank.shape[1]
    output = torch.zeros(rank, rows.shape[1], dtype=torch.float32, device=rows.device)
    values, constants = arguments(rows, rank, factor, dropout, seed)
    grid = (triton.cdiv(rows.shape[1], GRAD_FEATURES), SPLITS)
    constants |= {"FEATURES": GRAD_FEATURES, "SPLITS": SPLITS}
    launch(lora_weight_grad_kernel, grid, low_rank, rows, output, *values, **constants, num_stages=4)
    return output
