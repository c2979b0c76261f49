// Numbers: fixed widths, bit casts, half precision, and NaNs as x86 makes them.
//
// Compiled with -fmad=false: a product is rounded before it is added, as on the CPU.
#pragma once

using i8 = signed char;
using i16 = short;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xFFFFFFFFu;

__device__ inline u32 bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(u32 bits) { return __uint_as_float(bits); }
__device__ inline bool is_nan(float value) { return value != value; }
__device__ inline bool is_finite(float value) { return (bits_of(value) & 0x7F800000u) != 0x7F800000u; }

// A result that is NaN has the bits that x86 gives it: those of the first operand that is a NaN, made quiet;
// else the NaN with the sign set. A GPU gives 0x7FFFFFFF for all.
__device__ inline float as_on_x86(float result, float a, float b) {
    if (!is_nan(result)) return result;
    return float_of(is_nan(a) ? bits_of(a) | 0x400000u : is_nan(b) ? bits_of(b) | 0x400000u : 0xFFC00000u);
}
__device__ inline float times(float a, float b) { return as_on_x86(a * b, a, b); }
__device__ inline float plus(float a, float b) { return as_on_x86(a + b, a, b); }
__device__ inline float minus(float a, float b) { return as_on_x86(a - b, a, b); }

// x86's maxps: the second operand where either is NaN.
__device__ inline float larger(float a, float b) { return a > b ? a : b; }

// An f16 as f32: its bits, shifted, are the value times 2^-112, subnormals included.
__device__ inline float half_value(u16 half) {
    u32 magnitude = (half & 0x7FFFu) << 13;
    if ((half & 0x7C00u) == 0x7C00u)
        magnitude |= 0x7F800000u;
    else
        magnitude = bits_of(float_of(magnitude) * 0x1p112f);
    return float_of(magnitude | (half & 0x8000u) << 16);
}

// Rounded to f16, half to even; from 65520 on infinite. Below 2^-14 f16 has a fixed step of 2^-24, the step
// of f32 just under 1; above it 13 bits of the significand go.
__device__ inline float round_to_f16(float value) {
    const u32 sign = bits_of(value) & 0x80000000u;
    u32 magnitude = bits_of(value) & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u)
        magnitude = (magnitude | 0x400000u) & 0xFFFFE000u;
    else if (magnitude >= 0x477FF000u)
        magnitude = 0x7F800000u;
    else if (magnitude < 0x38800000u)
        magnitude = bits_of((float_of(magnitude) + 0.75f) - 0.75f);
    else
        magnitude = (magnitude + 0xFFFu + (magnitude >> 13 & 1u)) & 0xFFFFE000u;
    return float_of(sign | magnitude);
}

// Rounded to bf16, half to even; a NaN keeps its sign and is made quiet (ggml_compute_fp32_to_bf16).
__device__ inline float round_to_bf16(float value) {
    const u32 bits = bits_of(value);
    const u32 nearest = is_nan(value) ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1u);
    return float_of(nearest & 0xFFFF0000u);
}

// The sum over a warp, exact in integers (modulo 2^32).
__device__ inline u32 warp_sum(u32 value) {
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}
