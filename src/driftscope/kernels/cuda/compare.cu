// Two stored tensors, value by value, slab after slab: a thread block a slab of rows.
//
// Order of the f64 sums of a slab: thread t of 256 adds the groups t, t + 256, ... of COUNT neighbouring pairs, each
// group from its first pair; then the threads are added in a tree (neighbours at a distance of 1, 2, 4, ...). Slabs
// are added up by the caller. The slabs depend on the shape alone: one order on every card. COUNT is 4, or 1 where the
// columns are not a multiple of 4 or a side is stored transposed.
#include "formats.cuh"

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr double MAX_DOUBLE = 0x1.fffffffffffffp+1023, SMALL = 1e-3, MEDIUM = 1e-2;
// Sums: a - shift_a, b - shift_b, their squares, their product, |a - b|, (a - b)^2, the expected energy.
constexpr int SUMS = 8;
// Counts: finite, equal, below SMALL, below MEDIUM, NaNs of a and b, infinities of a and b.
constexpr int COUNTS = 8;

// Where the cell of a value comes from (driftscope/kernels/expected_error.py).
enum Cells { NOWHERE, EVEN, LEVELS, EXPONENT };

struct Partial {
    double sums[SUMS];
    double largest;
    u32 counts[COUNTS];
    u32 unequal_bits;
};

__device__ inline void add_pair(Partial& partial, float a, float b, double shift_a, double shift_b) {
    const double a64 = a, b64 = b;
    const double difference = fabs(a64 - b64);
    partial.unequal_bits |= bits_of(a) ^ bits_of(b);
    // A difference of two f32 is finite in f64 if and only if both are finite.
    if (!(difference <= MAX_DOUBLE)) {
        partial.counts[4] += is_nan(a);
        partial.counts[5] += is_nan(b);
        partial.counts[6] += !is_nan(a) && !is_finite(a);
        partial.counts[7] += !is_nan(b) && !is_finite(b);
        return;
    }
    const double x = a64 - shift_a, y = b64 - shift_b;
    partial.sums[0] += x;
    partial.sums[1] += y;
    partial.sums[2] += x * x;
    partial.sums[3] += y * y;
    partial.sums[4] += x * y;
    partial.sums[5] += difference;
    partial.sums[6] += difference * difference;
    partial.largest = difference > partial.largest ? difference : partial.largest;
    partial.counts[0] += 1;
    partial.counts[1] += difference == 0.0;
    partial.counts[2] += difference < SMALL;
    partial.counts[3] += difference < MEDIUM;
}

// One of the two tensors: stored rows, and which of them each canonical row is, or each canonical column.
template <class F, bool TRANSPOSED>
struct Side {
    const u8* raw;
    const i64* rows;
    i64 bytes;

    __device__ Side(const u8* raw, const i64* rows, i64 n_rows, u32 columns)
        : raw(raw), rows(rows), bytes(row_bytes<F>(TRANSPOSED ? n_rows : static_cast<i64>(columns))) {}
    __device__ const u8* stored_row(i64 row, i64 column) const { return raw + rows[TRANSPOSED ? column : row] * bytes; }
    __device__ static i64 stored_column(i64 row, i64 column) { return TRANSPOSED ? row : column; }
};

// What the format of b is expected to leave in COUNT values from stored `column` on; parts that are not finite add
// nothing.
template <class F, int KIND, int COUNT>
__device__ inline double expected_energy(const u8* row, i64 column, const float (&values)[COUNT], const double* cells) {
    double energy = 0.0;
    if constexpr (KIND == EXPONENT) {
        for (int i = 0; i < COUNT; i++) energy += cells[bits_of(values[i]) >> 23 & 255u];
    } else if constexpr (KIND != NOWHERE) {
        const u8* block = row + column / F::block * F::bytes;
        const int i = static_cast<int>(column % F::block);
        const double step = static_cast<double>(F::d(block)) * F::scale(block, i / F::sub);
        const u32 four = F::four(block, i / 4 * 4);
        double within = 0.0;
        for (int j = 0; j < 4; j++)
            if (COUNT == 4 || j == i % 4) within += cells[quant_of(four, j) + 128];
        energy = step * step * within;
    }
    return energy <= MAX_DOUBLE ? energy : 0.0;
}

// figures f64[slabs, 11]: sums of a, b, a^2, b^2, ab, |a - b|, (a - b)^2, (a - mean a)^2, (b - mean b)^2, the largest
// |a - b|, the expected energy. tallies i64[slabs, 9]: the counts, and whether any bits differ.
template <class A, bool A_TRANSPOSED, class B, bool B_TRANSPOSED, int KIND, int COUNT>
__global__ void __launch_bounds__(THREADS)
    compare(const u8* raw_a, const i64* rows_a, const u8* raw_b, const i64* rows_b, const double* cells, i64 n_rows,
            u32 columns, u32 slab, double* figures, i64* tallies) {
    static_assert(COUNT == 1 || !(A_TRANSPOSED || B_TRANSPOSED), "neighbours lie in other rows");
    __shared__ u32 first_finite;
    __shared__ double shifts[2];
    __shared__ Partial partials[WARPS];
    const Side<A, A_TRANSPOSED> a(raw_a, rows_a, n_rows, columns);
    const Side<B, B_TRANSPOSED> b(raw_b, rows_b, n_rows, columns);
    const int thread = threadIdx.x;
    const i64 first_row = static_cast<i64>(blockIdx.x) * slab;
    const u32 pairs = static_cast<u32>(min(static_cast<i64>(slab), n_rows - first_row)) * columns;

    auto read = [&](u32 pair, float(&x)[COUNT], float(&y)[COUNT]) {
        const i64 row = first_row + pair / columns, column = pair % columns;
        decode<A, COUNT>(a.stored_row(row, column), a.stored_column(row, column), x);
        decode<B, COUNT>(b.stored_row(row, column), b.stored_column(row, column), y);
    };

    // Moments are taken about the first finite pair of the slab, as on the CPU.
    if (thread == 0) first_finite = pairs;
    __syncthreads();
    for (u32 start = 0; start < pairs; start += THREADS * COUNT) {
        const u32 pair = start + thread * COUNT;
        float x[COUNT], y[COUNT];
        if (pair < pairs) {
            read(pair, x, y);
            for (int i = COUNT - 1; i >= 0; i--)
                if (is_finite(x[i]) && is_finite(y[i])) atomicMin(&first_finite, pair + i);
        }
        __syncthreads();
        const bool found = first_finite < pairs;
        __syncthreads();
        if (found) break;
    }
    if (thread == 0) {
        shifts[0] = shifts[1] = 0.0;
        if (first_finite < pairs) {
            const u32 inside = first_finite % COUNT;
            float x[COUNT], y[COUNT];
            read(first_finite - inside, x, y);
            for (u32 i = 0; i < COUNT; i++)
                if (i == inside) shifts[0] = x[i], shifts[1] = y[i];
        }
    }
    __syncthreads();
    const double shift_a = shifts[0], shift_b = shifts[1];

    Partial partial = {};
    for (u32 pair = thread * COUNT; pair < pairs; pair += THREADS * COUNT) {
        float x[COUNT], y[COUNT];
        read(pair, x, y);
        for (int i = 0; i < COUNT; i++) add_pair(partial, x[i], y[i], shift_a, shift_b);
        const i64 row = first_row + pair / columns, column = pair % columns;
        partial.sums[7] += expected_energy<B, KIND, COUNT>(b.stored_row(row, column), b.stored_column(row, column), y,
                                                           cells);
    }

    for (int step = 1; step < WARP; step *= 2) {
        for (int i = 0; i < SUMS; i++) partial.sums[i] += __shfl_down_sync(ALL_LANES, partial.sums[i], step);
        for (int i = 0; i < COUNTS; i++) partial.counts[i] += __shfl_down_sync(ALL_LANES, partial.counts[i], step);
        partial.largest = fmax(partial.largest, __shfl_down_sync(ALL_LANES, partial.largest, step));
        partial.unequal_bits |= __shfl_down_sync(ALL_LANES, partial.unequal_bits, step);
    }
    if (thread % WARP == 0) partials[thread / WARP] = partial;
    __syncthreads();
    if (thread != 0) return;
    for (int step = 1; step < WARPS; step *= 2)
        for (int warp = 0; warp < WARPS; warp += 2 * step) {
            Partial& into = partials[warp];
            const Partial& from = partials[warp + step];
            for (int i = 0; i < SUMS; i++) into.sums[i] += from.sums[i];
            for (int i = 0; i < COUNTS; i++) into.counts[i] += from.counts[i];
            into.largest = fmax(into.largest, from.largest);
            into.unequal_bits |= from.unequal_bits;
        }
    const Partial& total = partials[0];
    const double* s = total.sums;
    double* figure = figures + blockIdx.x * 11;
    i64* tally = tallies + blockIdx.x * 9;
    for (int i = 0; i < COUNTS; i++) tally[i] = total.counts[i];
    tally[8] = total.unequal_bits != 0;
    for (int i = 0; i < 10; i++) figure[i] = 0.0;
    figure[10] = s[7];
    const double n = total.counts[0];
    if (total.counts[0] == 0) return;
    figure[0] = s[0] + n * shift_a;
    figure[1] = s[1] + n * shift_b;
    // One formula for the three: equal tensors give equal sums, and a cosine of exactly 1.
    figure[2] = s[2] + (shift_a * s[0] + shift_a * s[0]) + n * (shift_a * shift_a);
    figure[3] = s[3] + (shift_b * s[1] + shift_b * s[1]) + n * (shift_b * shift_b);
    figure[4] = s[4] + (shift_a * s[1] + shift_b * s[0]) + n * (shift_a * shift_b);
    figure[5] = s[5];
    figure[6] = s[6];
    figure[7] = fmax(s[2] - s[0] * s[0] / n, 0.0);
    figure[8] = fmax(s[3] - s[1] * s[1] / n, 0.0);
    figure[9] = total.largest;
}
