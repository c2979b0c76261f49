// Activations to the formats that ggml multiplies weights with. A warp quantizes a block.
//
// NaNs are lost and kept as the C code on x86 loses and keeps them; driftscope/kernels/activations.py says how.
#include "numerics.cuh"

enum Rule { SIMD, PORTABLE, SIGNED, APR };

// 1.5 * 2^23: added and taken off again, it leaves the nearest integer, half to even.
constexpr float INTEGER = 12582912.0f;

// C's roundf of a moderate value: half away from zero.
__device__ inline float rounded_away(float value) {
    const float whole = truncf(value);
    return fabsf(value - whole) >= 0.5f ? whole + (value > 0 ? 1.0f : -1.0f) : whole;
}

// The maximum over 32 magnitudes in the order of the AVX2 code, eight lanes at a time.
__device__ inline float largest_simd(float magnitude, int lane) {
    float part = __shfl_sync(ALL_LANES, magnitude, lane % 8);
    for (int group = 8; group < WARP; group += 8)
        part = larger(part, __shfl_sync(ALL_LANES, magnitude, group + lane % 8));
    part = larger(__shfl_sync(ALL_LANES, part, lane % 4 + 4), __shfl_sync(ALL_LANES, part, lane % 4));
    const float even = larger(__shfl_sync(ALL_LANES, part, 0), __shfl_sync(ALL_LANES, part, 2));
    return larger(even, larger(__shfl_sync(ALL_LANES, part, 1), __shfl_sync(ALL_LANES, part, 3)));
}

__device__ inline float warp_largest(float value) {
    for (int step = WARP / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// The maximum taken one value after the other: a NaN displaces what came before it and is itself displaced.
__device__ inline float largest_portable(float magnitude, int lane) {
    const u32 nans = __ballot_sync(ALL_LANES, is_nan(magnitude));
    const int last = nans ? WARP - 1 - __clz(static_cast<int>(nans)) : -1;
    const float largest = warp_largest(lane > last ? magnitude : 0.0f);
    return last == WARP - 1 ? __shfl_sync(ALL_LANES, magnitude, last) : largest;
}

__device__ inline int quant_simd(float value) {
    // NaN and infinity: cvtps2dq gives the smallest integer.
    return fabsf(value) <= 4194304.0f ? static_cast<int>((value + INTEGER) - INTEGER) : -2147483647 - 1;
}

// x is f32[n, k]; blocks of 32: quants i8[n, k], d and s f32[n, k / 32]; a warp a block.
// sums i16[n, k / 16] are those of the quants.
template <Rule RULE>
__global__ void quantize_32(const float* x, i64 blocks, i8* quants, float* d, float* s, i16* sums) {
    const i64 block = static_cast<i64>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (block >= blocks) return;
    const float value = x[block * WARP + lane];
    const float magnitude = fabsf(value);
    float scale, sum;
    int quant;
    if constexpr (RULE == SIMD) {
        const float largest = largest_simd(magnitude, lane);
        scale = largest / 127.0f;
        const int whole = quant_simd(value * (largest != 0 ? 127.0f / largest : 0.0f));
        quant = min(127, max(-128, whole));
        sum = scale * static_cast<float>(static_cast<int>(warp_sum(static_cast<u32>(whole))));
    } else {
        scale = largest_portable(magnitude, lane) / 127.0f;
        const float ratio = value * (scale != 0 ? 1.0f / scale : 0.0f);
        quant = static_cast<i8>(fabsf(ratio) <= 1e6f ? static_cast<int>(rounded_away(ratio)) : 0);
        sum = static_cast<float>(static_cast<int>(warp_sum(static_cast<u32>(quant)))) * scale;
    }
    u32 part = static_cast<u32>(quant);
    for (int step = 8; step > 0; step /= 2) part += __shfl_xor_sync(ALL_LANES, part, step);
    quants[block * WARP + lane] = static_cast<i8>(quant);
    if (lane % 16 == 0) sums[block * 2 + lane / 16] = static_cast<i16>(static_cast<int>(part));
    if (lane == 0) {
        d[block] = round_to_f16(scale);
        s[block] = round_to_f16(sum);
    }
}

// The same for blocks of 256, eight neighbouring values a lane.
template <Rule RULE>
__global__ void quantize_256(const float* x, i64 blocks, i8* quants, float* d, i16* sums) {
    constexpr int EACH = 256 / WARP;
    const i64 block = static_cast<i64>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (block >= blocks) return;
    float values[EACH];
    // The first value that is largest in magnitude; a NaN never is.
    float largest = 0.0f, signed_largest = 0.0f;
    for (int i = 0; i < EACH; i++) {
        values[i] = x[block * 256 + lane * EACH + i];
        if (fabsf(values[i]) > largest) {
            largest = fabsf(values[i]);
            signed_largest = values[i];
        }
    }
    for (int step = 1; step < WARP; step *= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, largest, step);
        const float other_signed = __shfl_xor_sync(ALL_LANES, signed_largest, step);
        // Lanes hold ascending values, so on a tie the lower lane has the first.
        if (other > largest || (other == largest && (lane & step))) {
            largest = other;
            signed_largest = other_signed;
        }
    }
    float scale;
    int result[EACH];
    if constexpr (RULE == SIGNED) {
        const float inverse = -127.0f / signed_largest;
        scale = largest == 0 ? 0.0f : 1.0f / inverse;
        for (int i = 0; i < EACH; i++) {
            // ggml's nearest_int: the low bits of the sum are the integer.
            const u32 shifted = bits_of(plus(times(inverse, values[i]), INTEGER));
            result[i] = largest == 0 ? 0 : min(127, static_cast<int>(shifted & 0x7FFFFFu) - 0x400000);
        }
    } else {
        scale = largest > 1e-10f ? largest / 127.0f : 1.0f / 127.0f;
        for (int i = 0; i < EACH; i++) {
            const float ratio = times(values[i], 1.0f / scale);
            result[i] = is_nan(ratio) ? 0 : static_cast<int>(fminf(127.0f, fmaxf(-128.0f, rounded_away(ratio))));
        }
    }
    int part = 0;
    for (int i = 0; i < EACH; i++) {
        const i8 quant = static_cast<i8>(result[i]);
        quants[block * 256 + lane * EACH + i] = quant;
        part += quant;
    }
    part += __shfl_xor_sync(ALL_LANES, part, 1);
    if (lane % 2 == 0) sums[block * 16 + lane / 2] = static_cast<i16>(part);
    if (lane == 0) d[block] = scale;
}

template <bool BRAIN>
__global__ void round_to_float16(const float* x, i64 count, float* out) {
    const i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) out[at] = BRAIN ? round_to_bf16(x[at]) : round_to_f16(x[at]);
}
