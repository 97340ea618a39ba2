"""Triton kernels: rotary positions of the queries and keys in a fused projection, in place.

Formula of ChatGLM-6B, for each query and each key x [D] of a token. Half h of x is rotated by the position (h = 0) or
the block position (h = 1); i < D/4 is the frequency:
    first  = x[h * D/2 + i]             c = cos[h * D/2 + i]
    second = x[h * D/2 + D/4 + i]       s = sin[h * D/2 + i]
    x[h * D/2 + i]       = first * c - second * s
    x[h * D/2 + D/4 + i] = second * c + first * s
Formula of ChatGLM2-6B, in which the second half of x stays as it is; i < D/4:
    first  = x[2 * i]           second = x[2 * i + 1]           c = cos[i]          s = sin[i] * sign
    x[2 * i]     = first * c - second * s
    x[2 * i + 1] = second * c + first * s
sign is 1, or -1 for the inverse rotation; that of ChatGLM-6B is `rotate_back` in glm_kernels/attention.py. Computed in
fp32.

Shapes: T tokens, H heads of queries, G heads of keys and values, D head dimension, C = H * D, PAIRS = pairs (first,
second) of a token, rounded up to a power of 2. In ChatGLM-6B the fused projection is [T, H, 3, D], query, key and
value of each head; in ChatGLM2-6B it is [T, H + G + G, D], all queries, all keys, all values.
Reference: `chatglm.rotary.apply_rotary`, `chatglm2.rotary.apply_rotary`.
Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2; for two positions of a token,
"GLM: General Language Model Pretraining with Autoregressive Blank Infilling".
"""

import torch
import triton
import triton.language as tl


@triton.jit
def rotate_kernel(projected, cos, sin, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """Rotates the query and the key of every head of one token of projected [T, H, 3, D]; cos and sin are [T, D]."""
    token = tl.program_id(0).to(tl.int64)  # int64, because token * 3C may pass 2**31
    pair = tl.arange(0, PAIRS)  # [PAIRS]
    pairs_per_part: tl.constexpr = HEAD_DIM // 2
    in_range = pair < HEADS * 2 * pairs_per_part  # PAIRS is rounded up
    # A pair is numbered by (head, part, half, frequency), the last fastest; part 0 is the query, part 1 the key.
    head, pair_of_head = pair // (2 * pairs_per_part), pair % (2 * pairs_per_part)
    part, pair_of_part = pair_of_head // pairs_per_part, pair_of_head % pairs_per_part
    half, frequency = pair_of_part // (HEAD_DIM // 4), pair_of_part % (HEAD_DIM // 4)
    first_pointers = projected + token * HEADS * 3 * HEAD_DIM + head * 3 * HEAD_DIM + part * HEAD_DIM
    first_pointers += half * (HEAD_DIM // 2) + frequency
    table_offsets = token * HEAD_DIM + half * (HEAD_DIM // 2) + frequency
    c = tl.load(cos + table_offsets, mask=in_range, other=0.0).to(tl.float32)  # [PAIRS]
    s = tl.load(sin + table_offsets, mask=in_range, other=0.0).to(tl.float32)  # [PAIRS]
    first = tl.load(first_pointers, mask=in_range, other=0.0).to(tl.float32)  # [PAIRS]
    second = tl.load(first_pointers + HEAD_DIM // 4, mask=in_range, other=0.0).to(tl.float32)  # [PAIRS]
    dtype: tl.constexpr = projected.dtype.element_ty
    tl.store(first_pointers, (first * c - second * s).to(dtype), mask=in_range)  # [PAIRS]
    tl.store(first_pointers + HEAD_DIM // 4, (second * c + first * s).to(dtype), mask=in_range)  # [PAIRS]


def rotate_in_place(projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int):
    """Rotates the queries and keys of a fused projection, in place.

    Args:
        projected: [T, 3C], contiguous; overwritten, except for the values.
        cos: [T, D], contiguous; `chatglm.rotary.ChatGLMRotaryEmbedding` makes it.
        sin: [T, D], contiguous.
        head_dim: D.
    """
    heads = projected.shape[-1] // (3 * head_dim)
    pairs = triton.next_power_of_2(heads * head_dim)
    constants = {"HEADS": heads, "HEAD_DIM": head_dim, "PAIRS": pairs}
    rotate_kernel[(len(projected),)](projected, cos, sin, **constants, num_warps=8)


@triton.jit
def rotate_pairs_kernel(
    projected, cos, sin, sign, WIDTH: tl.constexpr, ROTATED: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """Rotates the first ROTATED vectors [D] of one token of projected [T, WIDTH]; cos and sin are [T, D/4]."""
    token = tl.program_id(0).to(tl.int64)  # int64, because token * WIDTH may pass 2**31
    pair = tl.arange(0, PAIRS)  # [PAIRS]
    frequencies: tl.constexpr = HEAD_DIM // 4
    in_range = pair < ROTATED * frequencies  # PAIRS is rounded up
    vector, frequency = pair // frequencies, pair % frequencies
    first_pointers = projected + token * WIDTH + vector * HEAD_DIM + 2 * frequency
    table_offsets = token * frequencies + frequency
    c = tl.load(cos + table_offsets, mask=in_range, other=0.0).to(tl.float32)  # [PAIRS]
    s = tl.load(sin + table_offsets, mask=in_range, other=0.0).to(tl.float32) * sign  # [PAIRS]
    first = tl.load(first_pointers, mask=in_range, other=0.0).to(tl.float32)  # [PAIRS]
    second = tl.load(first_pointers + 1, mask=in_range, other=0.0).to(tl.float32)  # [PAIRS]
    dtype: tl.constexpr = projected.dtype.element_ty
    tl.store(first_pointers, (first * c - second * s).to(dtype), mask=in_range)  # [PAIRS]
    tl.store(first_pointers + 1, (second * c + first * s).to(dtype), mask=in_range)  # [PAIRS]


def rotate_pairs_in_place(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, groups: int, inverse: bool = False
):
    """Rotates the queries and keys of a fused projection of grouped queries, in place.

    Args:
        projected: [T, (H + 2G) * D], contiguous; overwritten, except for the values.
        cos: [T, D / 4], contiguous; `chatglm2.rotary.ChatGLM2RotaryEmbedding` makes it.
        sin: [T, D / 4], contiguous.
        heads: H.
        groups: G.
        inverse: rotate by the negative angles, which undoes the rotation and also is its gradient.
    """
    width, rotated = projected.shape[-1], heads + groups
    head_dim = width // (heads + 2 * groups)
    pairs = triton.next_power_of_2(rotated * head_dim // 4)
    constants = {"WIDTH": width, "ROTATED": rotated, "HEAD_DIM": head_dim, "PAIRS": pairs}
    sign = -1.0 if inverse else 1.0
    rotate_pairs_kernel[(len(projected),)](projected, cos, sin, sign, **constants, num_warps=4)
