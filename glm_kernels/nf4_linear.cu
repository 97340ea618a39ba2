// The product of a few tokens with an NF4 weight, whose codes are looked up in shared memory.
//
// Formula, for token t and row n of the weight; block b of a row is its columns 64 b to 64 b + 63, and shares a scale:
//     scale[n, b]  = scale_table[scale_codes[n, b]] * scales_of_scales[(n * K + b) / 256] + offset
//     output[t, n] = sum over b of scale[n, b] * (sum over k in b of x[t, k] * nf4[code of weight n, k]) + bias[n]
// The table nf4 is rounded to the 16-bit type of x, as tensor cores need it; products are added in fp32, and the scale
// is applied to the sum of a block. The packed weight is read once, and no dequantized copy of it is written and read.
//
// A byte holds the codes of two neighbouring columns, the first one in its upper half. The values of the two, side by
// side, are one register of an operand of the tensor cores: the byte is looked up in a table of 256 such pairs. Each of
// the 32 lanes of a warp has a copy of this table in a bank of its own, so that all of them read at once.
//
// A program computes ROWS rows, and then those of another tile, if there are more tiles than programs. Its warps share
// the blocks of a row, each BLOCKS neighbouring ones at a time; what they multiply next is on its way meanwhile. Their
// sums are added at the end of a tile, always in the same order.
//
// Lane 4 group + member of a warp has 16 columns of each block, from 16 member on: those of the rows group and
// group + 8 of each 16 rows, and those of the tokens group, group + 8, ... Which columns are multiplied at once is free
// as long as weight and x agree: four products, each with four of the columns of each of four lanes, make a block.
// Source: mma.m16n8k16 under "Warp Level Matrix Multiply-Accumulate Instructions" of NVIDIA's manual of PTX.
//
// Shapes: x [tokens, 64 blocks], packed [rows, 32 blocks], scale_codes [rows, blocks], bias [rows],
// output [tokens, rows]; nf4 [16], scale_table [256]. At least BLOCKS blocks, at most TOKENS tokens.
// TYPE is "bf16" or "f16".

typedef unsigned char byte;
typedef unsigned short half_t;
typedef unsigned int word;

constexpr int LANES = 32, WARPS = 8, THREADS = LANES * WARPS;

#ifndef EMULATED  // by a test that has no GPU
// Two numbers, rounded to 16 bits, side by side: the first one in the lower half.
__device__ word round_pair(float first, float second) {
    word pair;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ float to_float(half_t number) {
    float result;
    if constexpr (TYPE[0] == 'b')
        result = __uint_as_float(word(number) << 16);
    else
        asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(number));
    return result;
}

// sums += a @ b, of [16, 16] and [16, 8], by all lanes of a warp.
__device__ void multiply_add(float (&sums)[4], const word (&a)[4], word b_low, word b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}
#endif

template <int TOKENS, int ROWS, int BLOCKS, int PROGRAMS>  // PROGRAMS that a multiprocessor has registers for
__global__ void __launch_bounds__(THREADS, PROGRAMS) nf4_linear(
    const half_t *__restrict__ x, const byte *__restrict__ packed, const float *__restrict__ nf4,
    const byte *__restrict__ scale_codes, const float *__restrict__ scale_table,
    const float *__restrict__ scales_of_scales, const float *__restrict__ offset, const half_t *__restrict__ bias,
    half_t *__restrict__ output, int tokens, int rows, int blocks, int has_bias) {
    constexpr int M = ROWS / 16, N = TOKENS / 8, SLOTS = LANES / 4;
    __shared__ uint4 pairs[256][SLOTS];  // of a byte, in each bank
    __shared__ float scale_values[256];
    __shared__ float parts[WARPS][8][ROWS];  // of the sums, for 8 tokens
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, group = lane / 4, member = lane % 4;
    const int tiles = (rows + ROWS - 1) / ROWS, rounds = (blocks + WARPS * BLOCKS - 1) / (WARPS * BLOCKS);

    // What is multiplied next: where it is, and in registers the codes, x, and what the scales are made of.
    const uint2 *code_rows[M][2];
    const uint4 *x_rows[N];
    uint2 codes[M][2][BLOCKS];
    uint4 x_columns[N][BLOCKS][2];
    byte scale_code[M][2];
    float scale_of_scale[M][2];
    bool counts;  // the block whose scale this lane has; not if another round has counted it

    auto move_to = [&](int tile, int round) {
        const int wanted = (round * WARPS + warp) * BLOCKS, block = min(wanted, blocks - BLOCKS);
        counts = block + member % BLOCKS >= wanted;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = min(tile * ROWS + 16 * m + 8 * half + group, rows - 1), index = row * blocks + block;
                code_rows[m][half] = reinterpret_cast<const uint2 *>(packed) + index * 4 + member;
                scale_code[m][half] = __ldg(scale_codes + index + member % BLOCKS);
                scale_of_scale[m][half] = __ldg(scales_of_scales + (index + member % BLOCKS) / 256);
            }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int token = min(8 * n + group, tokens - 1);
            x_rows[n] = reinterpret_cast<const uint4 *>(x) + (token * blocks + block) * 8 + member * 2;
        }
    };
    auto load_codes = [&](int b) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) codes[m][half][b] = __ldg(code_rows[m][half] + 4 * b);
    };
    auto load_x = [&](int b) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) x_columns[n][b][i] = __ldg(x_rows[n] + 8 * b + i);
    };

    move_to(blockIdx.x, 0);
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        load_codes(b);
        load_x(b);
    }
    const float scale_offset = *offset;
#pragma unroll
    for (int i = 0; i < 256 * SLOTS; i += THREADS) {
        const int code_pair = (i + threadIdx.x) % 256;
        const int slot = (i / 256 + code_pair) % SLOTS;  // another one for each of 8 threads: their banks differ
        const word pair = round_pair(nf4[code_pair / 16], nf4[code_pair % 16]);
        pairs[code_pair][slot] = make_uint4(pair, pair, pair, pair);
    }
    scale_values[threadIdx.x] = scale_table[threadIdx.x];
    __syncthreads();

    const char *table = reinterpret_cast<const char *>(pairs) + 4 * lane;
    auto look_up = [&](word bytes, int number) {
        const word scaled = number ? bytes >> (8 * number - 7) : bytes << 7;  // 128 times the byte, and other bits
        return *reinterpret_cast<const word *>(table + (scaled & 255 << 7));
    };

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float sums[M][N][4] = {};
        for (int round = 0; round < rounds; ++round) {
            float scale[M][2];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    scale[m][half] = scale_values[scale_code[m][half]] * scale_of_scale[m][half] + scale_offset;
                    if (!counts) scale[m][half] = 0;
                }
            const bool is_last = round + 1 == rounds, has_next = !is_last || tile + gridDim.x < tiles;
            if (has_next) move_to(is_last ? tile + gridDim.x : tile, is_last ? 0 : round + 1);
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                word weight[M][4][4];
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const uint2 bytes = codes[m][j % 2][b];
                            weight[m][i][j] = look_up(i < 2 ? bytes.x : bytes.y, i % 2 * 2 + j / 2);
                        }
                if (has_next) load_codes(b);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const float upper_scale = __shfl_sync(~0u, scale[m][0], b, 4);
                    const float lower_scale = __shfl_sync(~0u, scale[m][1], b, 4);
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        float even[4] = {}, odd[4] = {};  // two sums, of which neither waits for the other
                        const uint4(&columns)[2] = x_columns[n][b];
                        multiply_add(even, weight[m][0], columns[0].x, columns[0].y);
                        multiply_add(odd, weight[m][1], columns[0].z, columns[0].w);
                        multiply_add(even, weight[m][2], columns[1].x, columns[1].y);
                        multiply_add(odd, weight[m][3], columns[1].z, columns[1].w);
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            sums[m][n][i] += (i < 2 ? upper_scale : lower_scale) * (even[i] + odd[i]);
                    }
                }
                if (has_next) load_x(b);
            }
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    parts[warp][2 * member + i % 2][16 * m + i / 2 * 8 + group] = sums[m][n][i];
            __syncthreads();
            const int place = threadIdx.x / ROWS, token = 8 * n + place;
            const int row_of_tile = threadIdx.x % ROWS, row = tile * ROWS + row_of_tile;
            if (place < 8 && token < tokens && row < rows) {
                float total = has_bias ? to_float(bias[row]) : 0;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) total += parts[w][place][row_of_tile];
                output[token * rows + row] = round_pair(total, 0);
            }
            __syncthreads();
        }
    }
}
