// glm_kernels/nf4_linear.cu on a CPU: the programs one after the other, each with a thread of the CPU for every thread.
//
// What lanes of a warp do together, they do here by leaving their values for each other. KERNEL is the kernel
// with the arguments of its template, TYPE as there.
#include <algorithm>
#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::min;

struct Place {
    unsigned x;
};
static thread_local Place threadIdx, blockIdx, gridDim;

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T>
static T __ldg(const T *place) {
    return *place;
}

struct Warp {
    std::barrier<> all{32};
    unsigned words[32][6];
    float numbers[32];
};
static std::vector<std::unique_ptr<Warp>> warps;
static std::unique_ptr<std::barrier<>> program;

static void __syncthreads() { program->arrive_and_wait(); }

static float __shfl_sync(unsigned, float number, int source, int width) {
    Warp &warp = *warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    warp.numbers[lane] = number;
    warp.all.arrive_and_wait();
    const float result = warp.numbers[lane / width * width + source % width];
    warp.all.arrive_and_wait();
    return result;
}

// Rounded as GPUs do it: to the nearest number, and to the even one of two.
struct BFloat16 {
    unsigned short bits;
    BFloat16() = default;
    explicit BFloat16(float number) {
        unsigned word;
        std::memcpy(&word, &number, 4);
        bits = word + 0x7fff + (word >> 16 & 1) >> 16;
    }
    operator float() const {
        const unsigned word = bits << 16;
        float number;
        std::memcpy(&number, &word, 4);
        return number;
    }
};
using Half = std::conditional_t<TYPE[0] == 'b', BFloat16, _Float16>;

static float to_float(unsigned short number) {
    Half half;
    std::memcpy(&half, &number, 2);
    return half;
}

static unsigned round_pair(float first, float second) {
    const Half halves[2] = {Half(first), Half(second)};
    unsigned pair;
    std::memcpy(&pair, halves, 4);
    return pair;
}

// [16, 8] += [16, 16] @ [16, 8], spread over the lanes as the PTX manual has it for m16n8k16.
static void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
    Warp &warp = *warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b_low, b_high};
    std::memcpy(warp.words[lane], mine, sizeof mine);
    warp.all.arrive_and_wait();
    auto number = [&](int owner, int word, int half) { return to_float(warp.words[owner][word] >> 16 * half); };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k)
            sums[i] += number(row % 8 * 4 + k % 8 / 2, k / 8 * 2 + row / 8, k % 2) *
                       number(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
    warp.all.arrive_and_wait();
}

#include "nf4_linear.cu"

extern "C" void launch(
    int programs, const half_t *x, const byte *packed, const float *nf4, const byte *scale_codes,
    const float *scale_table, const float *scales_of_scales, const float *offset, const half_t *bias, half_t *output,
    int tokens, int rows, int blocks, int has_bias) {
    for (int number = 0; number < programs; ++number) {
        warps.clear();
        for (int w = 0; w < WARPS; ++w) warps.push_back(std::make_unique<Warp>());
        program = std::make_unique<std::barrier<>>(THREADS);
        std::vector<std::thread> threads;
        for (unsigned thread = 0; thread < THREADS; ++thread)
            threads.emplace_back([=] {
                threadIdx.x = thread, blockIdx.x = number, gridDim.x = programs;
                KERNEL(
                    x, packed, nf4, scale_codes, scale_table, scales_of_scales, offset, bias, output, tokens, rows,
                    blocks, has_bias);
            });
        for (auto &thread : threads) thread.join();
    }
}
