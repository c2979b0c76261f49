// Path B: integer dot products of stored rows with quantized activations.
//
// For each block of the product (SIZE values, the smaller of the two formats'), in order and in f32:
//     total += (d_w * d_x) * f32(sum of scale * q_w * q_x) - (dmin_w * d_x) * f32(sum of least * sum of q_x)
// as driftscope/kernels/matmul.py says. The sums are exact, so lanes may share them; the chain of a total belongs
// to one thread, or to all lanes of a warp alike.
#include "formats.cuh"
#include "tensor_cores.cuh"

// 32 values are the unit of work: at most two sub-blocks.
constexpr int UNIT = 32, WORDS = UNIT / 4, HALVES = UNIT / 16;

// A quantized activation of n rows of k values: quants, their sums by 16, and for each `block` values the factor
// of the products and that of the minima. The latter is d again; with SUMMED, q8_1's s, which is d * sum already.
struct Activation {
    const i8* quants;
    const i16* sums;
    const float* d;
    const float* s;
    int n, k, block;
};

template <class F>
struct Unit {
    static constexpr int SUBS = UNIT / F::sub;
    u32 quants[WORDS];
    int scales[SUBS];
    int mins[SUBS];
};

template <class F>
__device__ inline Unit<F> read_unit(const u8* block, int first) {
    Unit<F> unit;
#pragma unroll
    for (int word = 0; word < WORDS; word++) unit.quants[word] = F::four(block, first + 4 * word);
#pragma unroll
    for (int sub = 0; sub < Unit<F>::SUBS; sub++) {
        unit.scales[sub] = F::scale(block, first / F::sub + sub);
        unit.mins[sub] = F::least(block, first / F::sub + sub);
    }
    return unit;
}

// Sum of scale * q_w * q_x over a unit.
template <int SUBS>
__device__ inline int scaled_dot(const u32 (&w)[WORDS], const u32 (&x)[WORDS], const int (&scales)[SUBS]) {
    int total = 0;
#pragma unroll
    for (int sub = 0; sub < SUBS; sub++) {
        int part = 0;
#pragma unroll
        for (int word = sub * WORDS / SUBS; word < (sub + 1) * WORDS / SUBS; word++)
            part = __dp4a(static_cast<int>(w[word]), static_cast<int>(x[word]), part);
        total += part * scales[sub];
    }
    return total;
}

// Sum of least * sum of q_x over a unit; `sums` are those of its two halves.
template <int SUBS>
__device__ inline int scaled_sums(const int (&mins)[SUBS], int first_half, int second_half) {
    if constexpr (SUBS == 1)
        return mins[0] * (first_half + second_half);
    else
        return mins[0] * first_half + mins[1] * second_half;
}

// What a block adds to a total; s_x is d_x or, with SUMMED, s. The minima of ADD formats are added, so negated
// here, as on the CPU.
template <class F>
__device__ inline float term_of(int dot, int minima, float d_w, float dmin_w, float d_x, float s_x) {
    float term = (d_w * d_x) * static_cast<float>(dot);
    if constexpr (F::offset != NONE)
        term = term - ((F::offset == ADD ? -dmin_w : dmin_w) * s_x) * static_cast<float>(minima);
    return term;
}

template <class F>
__device__ inline const u8* block_of(const u8* row, int column) {
    return row + static_cast<i64>(column / F::block) * F::bytes;
}

// For few tokens: a warp a row of the weight, a lane a unit of it. The row is decoded once for TOKENS tokens.
template <class F, int SIZE, bool SUMMED, int TOKENS>
__global__ void dot_rows(const u8* raw, const i8* quants, const i16* sums, const float* d, const float* s, int n, int k,
                         int x_block, int rows, float* out) {
    const Activation x = {quants, sums, d, s, n, k, x_block};
    constexpr int LANES = SIZE / UNIT;  // that share a block
    const int row = static_cast<int>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    const int first_token = blockIdx.y * TOKENS;
    if (row >= rows) return;
    const u8* stored = raw + row * row_bytes<F>(x.k);
    const int units = x.k / UNIT;
    float totals[TOKENS] = {};
    for (int start = 0; start < units; start += WARP) {
        // A lane beyond the end repeats the last unit; its sums are not read.
        const int column = min(start + lane, units - 1) * UNIT;
        const int blocks = min(WARP, units - start) / LANES;
        const u8* block = block_of<F>(stored, column);
        const Unit<F> unit = read_unit<F>(block, column % F::block);
        const float d_w = F::d(block), dmin_w = F::dmin(block);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const i64 token = min(first_token + t, x.n - 1);
            const uint4* words = reinterpret_cast<const uint4*>(x.quants + token * x.k + column);
            const uint4 low = words[0], high = words[1];
            const u32 x_words[WORDS] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            const i64 at = token * (x.k / x.block) + column / x.block;
            u32 dot = static_cast<u32>(scaled_dot(unit.quants, x_words, unit.scales));
            u32 minima = 1;
            if constexpr (F::offset != NONE && !SUMMED) {
                const i16* halves = x.sums + (token * x.k + column) / 16;
                minima = static_cast<u32>(scaled_sums(unit.mins, halves[0], halves[1]));
            }
            for (int step = 1; step < LANES; step *= 2) {
                dot += __shfl_xor_sync(ALL_LANES, dot, step);
                if constexpr (F::offset != NONE) minima += __shfl_xor_sync(ALL_LANES, minima, step);
            }
            const float term =
                term_of<F>(static_cast<int>(dot), static_cast<int>(minima), d_w, dmin_w, x.d[at], x.s[at]);
            for (int b = 0; b < WARP / LANES; b++) {
                const float next = __shfl_sync(ALL_LANES, term, b * LANES);
                if (b < blocks) totals[t] = totals[t] + next;
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
        if (lane == 0 && first_token + t < x.n) out[static_cast<i64>(first_token + t) * rows + row] = totals[t];
}

// For many tokens, on the tensor cores: a tile of TILE rows and TOKENS tokens, unit after unit through shared memory.
// Warps stand 4 x 2 over the tile, each with 16 rows and PARTS products of 16 x 8. A thread has two rows and, of
// each product, two tokens; the chains of these outputs are its own.
constexpr int THREADS = 256, TILE = 64;
// Twelve words from row to row: the words that a warp reads together fall into different banks.
constexpr int STRIDE = 12;

template <class F, int SIZE, bool SUMMED, int PARTS>
__global__ void __launch_bounds__(THREADS, 2)
    dot_tiles(const u8* raw, const i8* quants, const i16* sums, const float* d, const float* s, int n, int k,
              int x_block, int rows, float* out) {
    constexpr int SUBS = Unit<F>::SUBS, TOKENS = 16 * PARTS;
    constexpr int W_LOADS = TILE * WORDS / THREADS, X_LOADS = (TOKENS * WORDS + THREADS - 1) / THREADS;
    const Activation x = {quants, sums, d, s, n, k, x_block};
    __shared__ u32 w_quants[TILE][STRIDE], x_quants[TOKENS][STRIDE];
    __shared__ int w_scales[TILE][SUBS], w_mins[TILE][SUBS], x_sums[TOKENS][HALVES];
    __shared__ float w_d[TILE], w_dmin[TILE], x_d[TOKENS], x_s[TOKENS];
    const int thread = threadIdx.x, warp = thread / WARP, group = thread % WARP / 4, place = thread % 4;
    const int row_of_warp = warp % 4 * 16, token_of_warp = warp / 4 * 8 * PARTS;
    const int first_row = blockIdx.x * TILE, first_token = blockIdx.y * TOKENS;
    const int units = x.k / UNIT;
    const i64 stride = row_bytes<F>(x.k);

    // The words of the next unit wait in registers while the present one is multiplied. A row or a token
    // beyond the end repeats the last one; its outputs are not written.
    u32 next_w[W_LOADS], next_x[X_LOADS];
    auto fetch = [&](int unit) {
        const int column = unit * UNIT, word = thread % WORDS;
#pragma unroll
        for (int load = 0; load < W_LOADS; load++) {
            const i64 row = min(first_row + (thread + load * THREADS) / WORDS, rows - 1);
            next_w[load] = F::four(block_of<F>(raw + row * stride, column), column % F::block + 4 * word);
        }
#pragma unroll
        for (int load = 0; load < X_LOADS; load++) {
            const i64 token = min(first_token + (thread + load * THREADS) / WORDS, x.n - 1);
            next_x[load] = *reinterpret_cast<const u32*>(x.quants + token * x.k + column + 4 * word);
        }
    };

    // Outputs 2 * i + h: row i of the thread's two, token h of its two.
    float totals[PARTS][4] = {};
    int dots[PARTS][4] = {}, minima[PARTS][4] = {};
    fetch(0);
    for (int unit = 0; unit < units; unit++) {
        const int column = unit * UNIT;
        __syncthreads();
#pragma unroll
        for (int load = 0; load < W_LOADS; load++)
            w_quants[(thread + load * THREADS) / WORDS][thread % WORDS] = next_w[load];
#pragma unroll
        for (int load = 0; load < X_LOADS; load++)
            if (thread + load * THREADS < TOKENS * WORDS)
                x_quants[(thread + load * THREADS) / WORDS][thread % WORDS] = next_x[load];
        if (thread < TILE) {
            const i64 row = min(first_row + thread, rows - 1);
            const u8* block = block_of<F>(raw + row * stride, column);
            for (int sub = 0; sub < SUBS; sub++) {
                w_scales[thread][sub] = F::scale(block, column % F::block / F::sub + sub);
                w_mins[thread][sub] = F::least(block, column % F::block / F::sub + sub);
            }
            w_d[thread] = F::d(block);
            w_dmin[thread] = F::dmin(block);
        } else if (thread < TILE + TOKENS) {
            const i64 token = min(first_token + thread - TILE, x.n - 1);
            const i64 at = token * (x.k / x.block) + column / x.block;
            for (int half = 0; half < HALVES; half++)
                x_sums[thread - TILE][half] = x.sums[(token * x.k + column) / 16 + half];
            x_d[thread - TILE] = x.d[at];
            x_s[thread - TILE] = x.s[at];
        }
        __syncthreads();
        if (unit + 1 < units) fetch(unit + 1);

        const u32* upper = w_quants[row_of_warp + group];
        const u32* lower = w_quants[row_of_warp + group + 8];
        const u32 a[4] = {upper[place], lower[place], upper[place + 4], lower[place + 4]};
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const u32* column_of_b = x_quants[token_of_warp + part * 8 + group];
            const u32 b[2] = {column_of_b[place], column_of_b[place + 4]};
            int products[SUBS][4] = {};
            if constexpr (SUBS == 1) {
                add_product_of_32(products[0], a, b);
            } else {
                add_product_of_16(products[0], a[0], a[1], b[0]);
                add_product_of_16(products[1], a[2], a[3], b[1]);
            }
#pragma unroll
            for (int output = 0; output < 4; output++) {
                const int row = row_of_warp + group + output / 2 * 8;
                const int token = token_of_warp + part * 8 + place * 2 + output % 2;
                for (int sub = 0; sub < SUBS; sub++)
                    dots[part][output] += products[sub][output] * w_scales[row][sub];
                if constexpr (F::offset != NONE)
                    minima[part][output] +=
                        SUMMED ? 1 : scaled_sums(w_mins[row], x_sums[token][0], x_sums[token][1]);
                if ((unit + 1) % (SIZE / UNIT) == 0) {
                    totals[part][output] =
                        totals[part][output] + term_of<F>(dots[part][output], minima[part][output], w_d[row],
                                                          w_dmin[row], x_d[token], x_s[token]);
                    dots[part][output] = 0;
                    minima[part][output] = 0;
                }
            }
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int output = 0; output < 4; output++) {
            const int row = first_row + row_of_warp + group + output / 2 * 8;
            const int token = first_token + token_of_warp + part * 8 + place * 2 + output % 2;
            if (row < rows && token < x.n) out[static_cast<i64>(token) * rows + row] = totals[part][output];
        }
}
