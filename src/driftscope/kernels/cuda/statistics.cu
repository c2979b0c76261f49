// Moments of every token of a tap: a thread block a token.
#include "numerics.cuh"

constexpr int THREADS = 256, LANES = 16;

// What some channels of a token hold.
struct Found {
    i64 finite, nans, zeros;
    float low, high;
};

__device__ inline void join(Found& into, const Found& from) {
    into.finite += from.finite;
    into.nans += from.nans;
    into.zeros += from.zeros;
    into.low = fminf(into.low, from.low);
    into.high = fmaxf(into.high, from.high);
}

// Sixteen sums in f64, each of every sixteenth term in order, then added half to half, as on the CPU. All threads
// make terms; every thread gets the sum.
template <class Term>
__device__ inline double sum_in_lanes(i64 count, Term term) {
    __shared__ double terms[THREADS], lanes[LANES];
    const int thread = threadIdx.x;
    double total = 0.0;
    for (i64 start = 0; start < count; start += THREADS) {
        // Adding 0 changes no sum.
        terms[thread] = start + thread < count ? term(start + thread) : 0.0;
        __syncthreads();
        if (thread < LANES)
            for (int i = thread; i < THREADS; i += LANES) total += terms[i];
        __syncthreads();
    }
    if (thread < LANES) lanes[thread] = total;
    for (int half = LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) lanes[thread] += lanes[thread + half];
    }
    __syncthreads();
    total = lanes[0];
    __syncthreads();
    return total;
}

// x f32[n, channels]; counts i64[n, 5], extremes f32[n, 2] and moments f64[n, 2] as `driftscope.kernels.statistics`
// has them, set beforehand to what a token without a finite value has.
__global__ void __launch_bounds__(THREADS)
    tap_statistics(const float* x, i64 channels, i64* counts, float* extremes, double* moments) {
    __shared__ Found all[THREADS];
    __shared__ u32 peak;
    const int thread = threadIdx.x;
    const float* row = x + blockIdx.x * channels;
    const float infinity = float_of(0x7F800000u);
    Found mine = {0, 0, 0, infinity, -infinity};
    for (i64 c = thread; c < channels; c += THREADS) {
        const float value = row[c];
        if (is_finite(value))
            join(mine, {1, 0, value == 0, value, value});
        else
            mine.nans += is_nan(value);
    }
    all[thread] = mine;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (thread < step) join(all[thread], all[thread + step]);
    }
    if (thread == 0) peak = 0xFFFFFFFFu;
    __syncthreads();
    const Found found = all[0];
    if (found.finite > 0) {
        const float largest = fmaxf(fabsf(found.low), fabsf(found.high));
        i64 c = thread;
        while (c < channels && fabsf(row[c]) != largest) c += THREADS;
        if (c < channels) atomicMin(&peak, static_cast<u32>(c));
    }
    const double n = static_cast<double>(found.finite);
    const double total =
        sum_in_lanes(channels, [&](i64 c) { return is_finite(row[c]) ? static_cast<double>(row[c]) : 0.0; });
    const double mean = total / n;
    const double squares = sum_in_lanes(channels, [&](i64 c) {
        const double away = row[c] - mean;
        return is_finite(row[c]) ? away * away : 0.0;
    });
    const double residue = sum_in_lanes(channels, [&](i64 c) { return is_finite(row[c]) ? row[c] - mean : 0.0; });
    if (thread != 0) return;
    i64* count = counts + blockIdx.x * 5;
    count[0] = found.finite;
    count[1] = found.nans;
    count[2] = channels - found.finite - found.nans;
    count[3] = found.zeros;
    count[4] = found.finite > 0 ? static_cast<i64>(peak) : -1;
    if (found.finite == 0) return;
    // Plus zero, so that a zero has one sign.
    extremes[blockIdx.x * 2] = found.low + 0.0f;
    extremes[blockIdx.x * 2 + 1] = found.high + 0.0f;
    moments[blockIdx.x * 2] = mean;
    // The residue is the rounding of the mean (Chan, Golub and LeVeque 1983, equation 1.7).
    moments[blockIdx.x * 2 + 1] = fmax(squares - residue * residue / n, 0.0);
}
