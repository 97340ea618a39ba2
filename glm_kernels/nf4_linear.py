"""Triton kernel: the product of a few tokens with an NF4 weight, which is decoded in registers.

Formula, for token t and row n of the weight; block b of a row is its columns 64 b to 64 b + 63, and shares a scale:
    scale[n, b]  = scale_table[scale_codes[n, b]] * scales_of_scales[(n * K + b) // 256] + offset
    output[t, n] = sum over b of scale[n, b] * (sum over k in b of x[t, k] * nf4[code of weight n, k]) + bias[n]
The table `nf4` is rounded to the dtype of x, as tensor cores need it; products are added in fp32, and the scale is
applied to the sum of a block. The packed weight is read once, and no dequantized copy of it is written and read.

A byte holds the codes of two neighbouring columns. The even columns and the odd ones are two products, each with the
elements of x in these columns, which an int32 of x holds side by side. Each warp adds up blocks of its own, and the
sums of the warps are added at the end, always in the same order.

Shapes: T tokens, N rows of K blocks of 64 columns (`blocks_of_row`); a program computes a tile of TOKENS x ROWS,
BLOCKS blocks of each row at a time. x_pairs is [T, 32 K] in int32, packed [N, 32 K] in uint8, output [T, N]; the
others are as in `glm_kernels.nf4`.
Reference: `torch.nn.functional.linear` with the weight of `glm_kernels.nf4.dequantize`.
"""

import functools

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState, get_4bit_type

# Tokens of a tile -> the rest of it, from measurements; STAGES is the number of iterations whose loads are in flight.
TILES = {
    8: {"ROWS": 32, "BLOCKS": 4, "STAGES": 4, "num_warps": 4},
    16: {"ROWS": 32, "BLOCKS": 4, "STAGES": 4, "num_warps": 4},
    32: {"ROWS": 32, "BLOCKS": 4, "STAGES": 4, "num_warps": 4},
    64: {"ROWS": 32, "BLOCKS": 4, "STAGES": 3, "num_warps": 4},
}


@functools.cache
def lookup_ptx(dtype: torch.dtype) -> str:
    """PTX that looks up eight 4-bit codes in the table of NF4.

    The instruction `prmt` selects four bytes out of eight, by the lower three bits of four codes; a third one selects
    between the two halves of the table by their highest bit. The low and the high bytes of the results are looked up
    one after the other and then joined. This takes 21 instructions for eight weights.

    Args:
        dtype: of the results, 16 bits.
    Returns:
        The code, with $4 the four bytes of codes; $0 and $1 the values of their upper codes, $2 and $3 of the lower.
    """
    bits = get_4bit_type("nf4", device="cpu").to(dtype).view(torch.int16).tolist()
    planes = {"low": [value & 255 for value in bits], "high": [value >> 8 & 255 for value in bits]}
    lines = [
        ".reg .b32 index, half, a, b, low, high;",
        "and.b32 index, $4, 0x77777777;",
        "shr.u32 half, $4, 1;",
        "lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA;",  # (half & 0x44444444) | 0x32103210
    ]
    for pair in range(2):  # of bytes
        if pair == 1:
            lines += ["shr.u32 index, index, 16;", "shr.u32 half, half, 16;"]
        for name, plane in planes.items():
            words = [int.from_bytes(plane[i : i + 4], "little") for i in range(0, 16, 4)]
            lines += [f"prmt.b32 a, {words[0]:#x}, {words[1]:#x}, index;"]
            lines += [f"prmt.b32 b, {words[2]:#x}, {words[3]:#x}, index;", f"prmt.b32 {name}, a, b, half;"]
        lines += [f"prmt.b32 ${pair}, low, high, 0x7351;", f"prmt.b32 ${2 + pair}, low, high, 0x6240;"]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.jit
def decode(packed, nf4, dtype: tl.constexpr, PTX: tl.constexpr):
    """The values of the upper and the lower codes, each of the shape of `packed`; by table where there is no PTX."""
    if PTX != "":
        upper, lower = tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r", [packed], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
        )
        return upper.to(dtype, bitcast=True), lower.to(dtype, bitcast=True)
    code = packed.to(tl.int32)
    return tl.load(nf4 + (code >> 4)).to(dtype), tl.load(nf4 + (code & 15)).to(dtype)


@triton.jit(do_not_specialize=["tokens", "blocks_of_row"])
def nf4_linear_kernel(
    x_pairs, packed, nf4, scale_codes, scale_table, scales_of_scales, offset, bias, output,
    tokens, rows, blocks_of_row,
    PTX: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of the output."""
    dtype: tl.constexpr = output.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_token, is_row = token < tokens, row < rows
    pair = tl.arange(0, 32)  # of columns, within a block
    scale_offset = tl.load(offset)
    acc = tl.zeros([BLOCKS, ROWS, TOKENS], tl.float32)
    for first_block in tl.range(0, blocks_of_row, BLOCKS, num_stages=STAGES):
        block = first_block + tl.arange(0, BLOCKS)
        is_block = block < blocks_of_row
        in_range = is_block[:, None] & is_row[None, :]  # [BLOCKS, ROWS]
        index = row[None, :] * blocks_of_row + block[:, None]  # [BLOCKS, ROWS]
        codes = tl.load(packed + index[:, :, None] * 32 + pair[None, None, :], mask=in_range[:, :, None], other=0)
        even, odd = decode(codes, nf4, dtype, PTX)  # [BLOCKS, ROWS, 32] each
        x_offsets = (token[None, :] * blocks_of_row + block[:, None])[:, None, :] * 32 + pair[None, :, None]
        x_mask = (is_block[:, None] & is_token[None, :])[:, None, :]
        x_pair = tl.load(x_pairs + x_offsets, mask=x_mask, other=0)  # [BLOCKS, 32, TOKENS]
        x_even = x_pair.to(tl.int16).to(dtype, bitcast=True)  # [BLOCKS, 32, TOKENS]
        x_odd = (x_pair >> 16).to(tl.int16).to(dtype, bitcast=True)  # [BLOCKS, 32, TOKENS]
        sums = tl.dot(odd, x_odd, tl.dot(even, x_even))  # [BLOCKS, ROWS, TOKENS]
        scale = tl.load(scale_table + tl.load(scale_codes + index, mask=in_range, other=0).to(tl.int32))
        scale = scale * tl.load(scales_of_scales + index // 256, mask=in_range, other=0.0) + scale_offset
        acc += sums * scale[:, :, None]
    result = tl.sum(acc, 0)  # [ROWS, TOKENS]
    if BIAS:
        result += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    offsets = token[None, :] * rows + row[:, None]
    tl.store(output + offsets, result.to(dtype), mask=is_row[:, None] & is_token[None, :])  # [ROWS, TOKENS]


def constants_of(tokens: int, dtype: torch.dtype, ptx: bool = True) -> dict:
    """The constexpr parameters of a launch but BIAS, and its number of warps."""
    tile = min((size for size in TILES if size >= tokens), default=max(TILES))
    return {"TOKENS": tile, "PTX": lookup_ptx(dtype) if ptx else "", **TILES[tile]}


def nf4_linear(x: torch.Tensor, packed: torch.Tensor, state: QuantState, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias

    Args:
        x: [T, C_in], contiguous, bf16 or fp16; C_in is a multiple of 64.
        packed: uint8, the weight [C_out, C_in], as for `glm_kernels.nf4.dequantize`.
        state: of the weight.
        bias: [C_out], or None.
    Returns:
        [T, C_out], in the dtype of `x`.
    """
    (rows, columns), tokens = state.shape, len(x)
    output = x.new_empty(tokens, rows)
    constants = constants_of(tokens, x.dtype, ptx=x.is_cuda and torch.version.hip is None)
    grid = (triton.cdiv(rows, constants["ROWS"]), triton.cdiv(tokens, constants["TOKENS"]))
    scales = (state.absmax, state.state2.code, state.state2.absmax, state.offset)
    nf4_linear_kernel[grid](
        x.view(torch.int32), packed, state.code, *scales, x if bias is None else bias, output,
        tokens, rows, columns // 64, BIAS=bias is not None, **constants,
    )  # fmt: skip
    return output
