// What a layer does between its matmuls, in the order of driftscope/kernels/forward.py.
#include "elementary.cuh"
#include "ordered.cuh"

// A thread block a row of `channels` values.
__global__ void __launch_bounds__(THREADS)
    rms_norm(const float* x, const float* weight, int channels, double eps, float* out) {
    const float* row = x + static_cast<i64>(blockIdx.x) * channels;
    const double total = sum_in_order(channels, [&](i64 c) { return static_cast<double>(row[c]) * row[c]; });
    const float scale = static_cast<float>(1.0 / sqrt(total / channels + eps));
    for (int c = threadIdx.x; c < channels; c += THREADS)
        out[static_cast<i64>(blockIdx.x) * channels + c] = (row[c] * scale) * weight[c];
}

// A thread a channel of x f32[n, width], in heads of `channels`, of which the leading 2 * `half` are turned: the
// channels of a pair are `half` apart, or adjacent where it is interleaved. positions i64[n] are rows of the tables.
__global__ void rope(const float* x, const float* cosine, const float* sine, const i64* positions, i64 n, int width,
                     int channels, int half, int interleaved, float* out) {
    const i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= n * width) return;
    const i64 token = at / width;
    const int c = static_cast<int>(at % width) % channels;
    if (c >= 2 * half) {
        out[at] = x[at];
        return;
    }
    const int pair = interleaved ? c / 2 : c % half;
    const bool second = interleaved ? c % 2 : c >= half;
    const i64 step = interleaved ? 1 : half;
    const float cos_c = cosine[positions[token] * half + pair], sin_c = sine[positions[token] * half + pair];
    out[at] = second ? x[at] * cos_c + x[at - step] * sin_c : x[at] * cos_c - x[at + step] * sin_c;
}

__global__ void silu(const float* x, i64 count, float* out) {
    const i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    const double value = x[at];
    out[at] = static_cast<float>(value / (1.0 + exp_of(-value)));
}

// With the tanh approximation, as x / (1 + exp(-2 u)).
__global__ void gelu(const float* x, i64 count, float* out) {
    constexpr double minus_two_roots = -0x1.9884533d43651p+0;  // -2 sqrt(2 / pi)
    const i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    const double value = x[at];
    const double inner = minus_two_roots * (value + 0.044715 * value * value * value);
    out[at] = static_cast<float>(value / (1.0 + exp_of(inner)));
}

__global__ void soft_cap(const float* x, i64 count, double cap, float* out) {
    const i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) out[at] = static_cast<float>(cap * tanh_of(static_cast<double>(x[at]) / cap));
}

// Shapes of the heads, the scale of the scores, and the cap (0 for none).
struct Heads {
    int count, kv_count, channels;
    float scale;
    double cap;
};

__device__ inline float score(const float* q, const float* k, const Heads& heads) {
    float total = 0.0f;
    for (int c = 0; c < heads.channels; c++) total = total + q[c] * k[c];
    total = total * heads.scale;
    return heads.cap > 0.0 ? static_cast<float>(heads.cap * tanh_of(static_cast<double>(total) / heads.cap)) : total;
}

__device__ inline i64 first_key(i64 query, i64 window) {
    return window > 0 && query + 1 > window ? query + 1 - window : 0;
}

// Softmax of scores[first, stop) to out[first, stop), by all threads of the block; in place if need be. A NaN is
// never the maximum but makes the sum NaN, and so the whole row.
__device__ inline void softmax_row(const float* scores, i64 first, i64 stop, float* out) {
    __shared__ float largest_of[THREADS];
    const int thread = threadIdx.x;
    float largest = float_of(0xFF800000u);
    for (i64 j = first + thread; j < stop; j += THREADS) largest = larger(scores[j], largest);
    largest_of[thread] = largest;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (thread < step) largest_of[thread] = larger(largest_of[thread + step], largest_of[thread]);
    }
    __syncthreads();
    largest = largest_of[0];
    __syncthreads();
    for (i64 j = first + thread; j < stop; j += THREADS)
        out[j] = static_cast<float>(exp_of(static_cast<double>(scores[j]) - static_cast<double>(largest)));
    __syncthreads();
    const double total = sum_in_order(stop - first, [&](i64 j) { return static_cast<double>(out[first + j]); });
    for (i64 j = first + thread; j < stop; j += THREADS)
        out[j] = static_cast<float>(static_cast<double>(out[j]) / total);
    __syncthreads();
}

// Causal attention: a thread block a query head of a token, one after the other; each has room for `longest`
// weights in `scratch`. starts i64[sequences + 1], sequence_of i64[n]. F16 rounds the softmax before it meets the
// values; the caller has rounded q, k and v.
template <bool HALF>
__global__ void __launch_bounds__(THREADS)
    attention(const float* q, const float* k, const float* v, const i64* starts, const i64* sequence_of, i64 n,
              int n_heads, int n_kv_heads, int channels, float scale, double cap, i64 window, i64 longest,
              float* scratch, float* out) {
    const Heads heads = {n_heads, n_kv_heads, channels, scale, cap};
    float* weights = scratch + blockIdx.x * longest;
    const i64 kv_width = static_cast<i64>(heads.kv_count) * heads.channels;
    for (i64 unit = blockIdx.x; unit < n * heads.count; unit += gridDim.x) {
        const i64 token = unit / heads.count;
        const int head = static_cast<int>(unit % heads.count);
        const i64 kv_column = static_cast<i64>(head / (heads.count / heads.kv_count)) * heads.channels;
        const i64 begin = starts[sequence_of[token]], stop = token - begin + 1;
        const i64 first = first_key(token - begin, window);
        const float* query = q + unit * heads.channels;
        const float* keys = k + begin * kv_width + kv_column;
        const float* values = v + begin * kv_width + kv_column;
        __syncthreads();
        for (i64 j = first + threadIdx.x; j < stop; j += THREADS)
            weights[j] = score(query, keys + j * kv_width, heads);
        __syncthreads();
        softmax_row(weights, first, stop, weights);
        if (HALF) {
            for (i64 j = first + threadIdx.x; j < stop; j += THREADS) weights[j] = round_to_f16(weights[j]);
            __syncthreads();
        }
        for (int c = threadIdx.x; c < heads.channels; c += THREADS) {
            float total = 0.0f;
            for (i64 j = first; j < stop; j++) total = total + weights[j] * values[j * kv_width + c];
            out[unit * heads.channels + c] = total;
        }
    }
}

// Scores of one sequence before the mask: out f32[length, heads * length]; a thread a score.
__global__ void attention_scores(const float* q, const float* k, i64 length, int n_heads, int n_kv_heads, int channels,
                                 float scale, double cap, float* out) {
    const Heads heads = {n_heads, n_kv_heads, channels, scale, cap};
    const i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= length * heads.count * length) return;
    const i64 unit = at / length, key = at % length;
    const int kv_head = static_cast<int>(unit % heads.count) / (heads.count / heads.kv_count);
    out[at] = score(q + unit * heads.channels, k + (key * heads.kv_count + kv_head) * heads.channels, heads);
}

// Softmax of those scores under the causal mask; `out` is zero before. A thread block a query head of a token.
__global__ void __launch_bounds__(THREADS)
    attention_softmax(const float* scores, i64 length, int n_heads, i64 window, float* out) {
    const i64 query = blockIdx.x / n_heads;
    const i64 row = static_cast<i64>(blockIdx.x) * length;
    softmax_row(scores + row, first_key(query, window), query + 1, out + row);
}
