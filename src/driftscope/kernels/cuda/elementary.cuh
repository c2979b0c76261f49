// exp and tanh in f64: the fixed operations of driftscope/kernels/elementary.py, in the same order.
#pragma once

#include "numerics.cuh"

struct Reduced {
    double q, scale;  // exp(x) = (1 + q) * scale * 2
};

__device__ inline Reduced reduced(double x) {
    constexpr double log2_e = 0x1.71547652b82fep+0, integer = 6755399441055744.0;
    constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
    x = x > 710.0 ? 710.0 : x;
    x = x < -708.0 ? -708.0 : x;
    const double shifted = x * log2_e + integer;
    const double k = shifted - integer;
    const double r = (x - k * ln2_high) - k * ln2_low;
    const double square = r * r;
    // Reciprocals of the factorials of 2 to 13.
    const double low = (1.0 / 2.0 + 1.0 / 6.0 * r) + square * (1.0 / 24.0 + 1.0 / 120.0 * r);
    const double middle = (1.0 / 720.0 + 1.0 / 5040.0 * r) + square * (1.0 / 40320.0 + 1.0 / 362880.0 * r);
    const double high =
        (1.0 / 3628800.0 + 1.0 / 39916800.0 * r) + square * (1.0 / 479001600.0 + 1.0 / 6227020800.0 * r);
    const double fourth = square * square;
    const u64 exponent = static_cast<u64>(__double_as_longlong(shifted - 1.0)) + 1023u;
    return {r + square * (low + fourth * (middle + fourth * high)),
            __longlong_as_double(static_cast<i64>(exponent << 52))};
}

__device__ inline double exp_of(double x) {
    const Reduced part = reduced(x);
    return (part.scale + part.q * part.scale) * 2.0;
}

__device__ inline double tanh_of(double x) {
    const Reduced part = reduced(-2.0 * fabs(x));
    const double m = (part.q * part.scale + (part.scale - 0.5)) * 2.0;
    return copysign(m / (m + 2.0), x);
}
