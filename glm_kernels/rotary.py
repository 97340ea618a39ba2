"""Triton kernel: rotary positions on the queries and keys of a fused projection, in place."""

import torch
import triton
import triton.language as tl

from glm_kernels.launch import launch


@triton.jit
def rotate_kernel(projected, cos, sin, sign, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """Turns the query and the key of every head of one token by the angles of its position, in place."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    per_head: tl.constexpr = HEAD_DIM // 2
    there = pair < HEADS * 2 * per_head
    head, within = pair // (2 * per_head), pair % (2 * per_head)  # within: query or key, half of the head, frequency
    part, angle = within // per_head, within % per_head
    half, frequency = angle // (HEAD_DIM // 4), angle % (HEAD_DIM // 4)
    first_at = projected + token * HEADS * 3 * HEAD_DIM + head * 3 * HEAD_DIM + part * HEAD_DIM
    first_at += half * (HEAD_DIM // 2) + frequency
    angle_at = token * HEAD_DIM + half * (HEAD_DIM // 2) + frequency
    c = tl.load(cos + angle_at, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + angle_at, mask=there, other=0.0).to(tl.float32) * sign
    first = tl.load(first_at, mask=there, other=0.0).to(tl.float32)
    second = tl.load(first_at + HEAD_DIM // 4, mask=there, other=0.0).to(tl.float32)
    tl.store(first_at, (first * c - second * s).to(projected.dtype.element_ty), mask=there)
    tl.store(first_at + HEAD_DIM // 4, (second * c + first * s).to(projected.dtype.element_ty), mask=there)


def rotate_in_place(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int, inverse: bool = False
):
    """Rotates queries and keys of `projected` [T, 3C] by cos, sin [T, D]; `inverse` undoes it."""
    heads = projected.shape[-1] // (3 * head_dim)
    pairs = triton.next_power_of_2(heads * head_dim)
    sign = -1.0 if inverse else 1.0
    shape = {"HEADS": heads, "HEAD_DIM": head_dim, "PAIRS": pairs}
    launch(rotate_kernel, (len(projected),), projected, cos, sin, sign, **shape, num_warps=8)
