// Path A: out[t, r] = sum over k of w[r, k] * x[t, k] in f32, k = 0 first, each operation rounded.
//
// The chain of an output belongs to one thread; rows are decoded into shared memory a few columns at a time.
#include "formats.cuh"

constexpr int THREADS = 256, DEPTH = 32;

// DOWN threads side by side have rows, THREADS / DOWN have tokens; each has EACH x EACH outputs. COUNT is 4, or
// 1 where k is not a multiple of 4 (`decode`).
template <class F, int COUNT, int DOWN, int EACH>
__global__ void __launch_bounds__(THREADS) multiply(const u8* raw, const float* x, int n, int k, int rows, float* out) {
    constexpr int ACROSS = THREADS / DOWN, ROWS = DOWN * EACH, TOKENS = ACROSS * EACH;
    // An odd stride: the rows that a warp reads side by side fall into different banks.
    __shared__ float weights[ROWS][DEPTH + 1];
    __shared__ float values[TOKENS][DEPTH + 1];
    const int thread = threadIdx.x, down = thread % DOWN, across = thread / DOWN;
    const int first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
    const i64 stride = row_bytes<F>(k);
    float totals[EACH][EACH] = {};
    for (int start = 0; start < k; start += DEPTH) {
        const int depth = min(DEPTH, k - start);
        __syncthreads();
        for (int i = thread * COUNT; i < ROWS * DEPTH; i += THREADS * COUNT) {
            const int row = i / DEPTH, c = i % DEPTH;
            if (first_row + row >= rows || c >= depth) continue;
            float part[COUNT];
            decode<F, COUNT>(raw + (first_row + row) * stride, start + c, part);
            for (int j = 0; j < COUNT; j++) weights[row][c + j] = part[j];
        }
        for (int i = thread; i < TOKENS * DEPTH; i += THREADS) {
            const int token = i / DEPTH, c = i % DEPTH;
            if (first_token + token >= n || c >= depth) continue;
            values[token][c] = x[static_cast<i64>(first_token + token) * k + start + c];
        }
        __syncthreads();
        for (int c = 0; c < depth; c++) {
            float w[EACH], v[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                w[i] = weights[down + i * DOWN][c];
                v[i] = values[across + i * ACROSS][c];
            }
#pragma unroll
            for (int j = 0; j < EACH; j++)
#pragma unroll
                for (int i = 0; i < EACH; i++) totals[j][i] = totals[j][i] + w[i] * v[j];
        }
    }
#pragma unroll
    for (int j = 0; j < EACH; j++)
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int row = first_row + down + i * DOWN, token = first_token + across + j * ACROSS;
            if (row < rows && token < n) out[static_cast<i64>(token) * rows + row] = totals[j][i];
        }
}
