"""Triton kernel: adds the adapter's product to a layer's output for a few tokens, in one launch.

Formula; down [r, C_in] is A and up [r, C_out] is scaling * B.T, of several adapters one below the other:
    low_rank [T, r] = x [T, C_in] @ down.T      zero where the adapter of the column is not that of the row
    output [T, C_out] += low_rank @ up
Each program computes low_rank anew: r is so small that this takes less time than another launch.

Shapes: T tokens, r rank; a program computes a tile of TOKENS x FEATURES, with R = r rounded up to a power of 2, at
least the 16 that `tl.dot` takes. Each of SLICES warps adds up COLUMNS columns of x at a time.
Reference: `qlora.layers.linear.InferenceLoRANF4Linear`, where the kernel does not run.
Source: "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

import torch
import triton
import triton.language as tl

SLICES, FEATURES, STAGES = 8, 128, 3  # STAGES iterations have their loads in flight
TILE = 512  # elements of the larger one of a warp's tiles of x and `down`


@triton.jit(do_not_specialize=["tokens", "tokens_of_row"])
def lora_add_kernel(
    x, down, up, output, adapter_of_row, adapter_of_column, tokens, tokens_of_row, in_features, out_features, rank,
    SELECT: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr,
    SLICES: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """output += low_rank @ up, for one tile of the output; SELECT if rows have adapters of their own."""
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, R)
    is_token, is_r, is_feature = token < tokens, r < rank, feature < out_features
    acc = tl.zeros([SLICES, TOKENS, R], tl.float32)
    for first_column in tl.range(0, in_features, SLICES * COLUMNS, num_stages=STAGES):
        column = first_column + tl.arange(0, SLICES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        is_column = column < in_features  # [SLICES, COLUMNS]
        x_offsets = token[None, :, None] * in_features + column[:, None, :]
        x_tile = tl.load(x + x_offsets, mask=is_token[None, :, None] & is_column[:, None, :], other=0.0)
        down_offsets = r[None, None, :] * in_features + column[:, :, None]
        # Loaded transposed, as the product needs it: [SLICES, COLUMNS, R]
        down_tile = tl.load(down + down_offsets, mask=is_r[None, None, :] & is_column[:, :, None], other=0.0)
        acc = tl.dot(x_tile, down_tile, acc)
    low_rank = tl.sum(acc, 0)  # [TOKENS, R]
    if SELECT:
        adapter = tl.load(adapter_of_row + token // tokens_of_row, mask=is_token, other=-1)  # [TOKENS]
        is_own = adapter[:, None] == tl.load(adapter_of_column + r, mask=is_r, other=-1)[None, :]
        low_rank = tl.where(is_own, low_rank, 0.0)
    up_offsets = r[:, None] * out_features + feature[None, :]
    up_tile = tl.load(up + up_offsets, mask=is_r[:, None] & is_feature[None, :], other=0.0)  # [R, FEATURES]
    offsets, mask = token[:, None] * out_features + feature[None, :], is_token[:, None] & is_feature[None, :]
    before = tl.load(output + offsets, mask=mask, other=0.0).to(tl.float32)  # [TOKENS, FEATURES]
    updated = tl.dot(low_rank.to(up_tile.dtype), up_tile, before)
    tl.store(output + offsets, updated.to(output.dtype.element_ty), mask=mask)


def constants_of(tokens: int, rank: int) -> dict[str, int]:
    """The constexpr parameters of a launch but SELECT, and its number of warps."""
    tile_tokens, R = 16 if tokens <= 16 else 32, max(16, triton.next_power_of_2(rank))
    tile = {"TOKENS": tile_tokens, "R": R, "COLUMNS": max(16, TILE // max(tile_tokens, R))}
    return tile | {"SLICES": SLICES, "FEATURES": FEATURES, "STAGES": STAGES, "num_warps": SLICES}


def lora_add(
    output: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    adapter_of_row: torch.Tensor | None,
    adapter_of_column: torch.Tensor,
):
    """output += (x @ down.T) @ up, in place.

    Args:
        output: [T, C_out], contiguous, bf16 or fp16.
        x: [T, C_in], contiguous, in the dtype of `output`.
        down: [r, C_in], contiguous, in the dtype of `output`; r is at most 64.
        up: [r, C_out], contiguous, in the dtype of `output`.
        adapter_of_row: [B], the adapter of each row, which has T / B tokens; None if all of r counts for every row.
        adapter_of_column: [r], the adapter of each row of `down`.
    """
    tokens, constants = len(x), constants_of(len(x), len(down))
    grid = (triton.cdiv(output.shape[1], FEATURES), triton.cdiv(tokens, constants["TOKENS"]))
    rows = adapter_of_column if adapter_of_row is None else adapter_of_row
    lora_add_kernel[grid](
        x, down, up, output, rows, adapter_of_column,
        tokens, tokens // len(rows) or 1, x.shape[1], output.shape[1], len(down),
        SELECT=adapter_of_row is not None, **constants,
    )  # fmt: skip
