// Enough of CUDA C++ to run the kernels on the host, one thread of a block after the other.
//
// A thread is a fiber that runs until it waits for its block or its warp. A barrier or a shuffle that not all of
// them reach ends the program, as does every access outside of an array and undefined behaviour, since the
// whole is compiled with the sanitizers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

void wait_for_block();
// Give a value to the warp and get all 32 of them.
const uint64_t* exchange(unsigned mask, uint64_t value);

inline void __syncthreads() { wait_for_block(); }

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    const uint64_t* all = exchange(mask, bits);
    std::memcpy(&value, &all[lane & 31], sizeof value);
    return value;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int step) {
    return __shfl_sync(mask, value, static_cast<int>(threadIdx.x & 31u) ^ step);
}
// Lanes whose source is beyond the warp keep their own value.
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int step) {
    const int lane = threadIdx.x & 31, source = lane + step;
    return __shfl_sync(mask, value, source < 32 ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool holds) {
    const uint64_t* all = exchange(mask, holds);
    unsigned result = 0;
    for (int lane = 0; lane < 32; lane++) result |= static_cast<unsigned>(all[lane] & 1) << lane;
    return result;
}

inline int byte_of(uint32_t word, int i) { return static_cast<signed char>(word >> 8 * i & 255u); }

// The tensor cores' products, from the words that all threads of the warp hold (PTX ISA, "Matrix Fragments for
// mma.m16n8k32" and "... m16n8k16").
template <int SIXTEENS>
inline void add_product(int (&c)[4], const uint32_t (&a)[2 * SIXTEENS], const uint32_t (&b)[SIXTEENS]) {
    uint32_t all[3 * SIXTEENS][32];
    for (int word = 0; word < 3 * SIXTEENS; word++) {
        const uint64_t* row = exchange(0xFFFFFFFFu, word < 2 * SIXTEENS ? a[word] : b[word - 2 * SIXTEENS]);
        for (int lane = 0; lane < 32; lane++) all[word][lane] = static_cast<uint32_t>(row[lane]);
    }
    const int group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
    for (int output = 0; output < 4; output++) {
        const int column = 2 * place + output % 2;
        int total = c[output];
        for (int k = 0; k < 16 * SIXTEENS; k++) {
            // Words of a: for each 16 of the depth, that of the upper row, then that of the lower.
            const int word = k / 16 * 2 + output / 2, lane = k % 16 / 4;
            total += byte_of(all[word][4 * group + lane], k % 4) *
                     byte_of(all[2 * SIXTEENS + k / 16][4 * column + lane], k % 4);
        }
        c[output] = total;
    }
}
inline void add_product_of_32(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    add_product<2>(c, a, b);
}
inline void add_product_of_16(int (&c)[4], uint32_t upper, uint32_t lower, uint32_t b) {
    const uint32_t a[2] = {upper, lower}, only[1] = {b};
    add_product<1>(c, a, only);
}

inline int __dp4a(int a, int b, int sum) {
    unsigned total = static_cast<unsigned>(sum);
    for (int shift = 0; shift < 32; shift += 8) {
        const int x = static_cast<signed char>(static_cast<unsigned>(a) >> shift & 255u);
        const int y = static_cast<signed char>(static_cast<unsigned>(b) >> shift & 255u);
        total += static_cast<unsigned>(x * y);
    }
    return static_cast<int>(total);
}
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
inline unsigned atomicMin(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at = std::min(before, value);
    return before;
}

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
inline long long __double_as_longlong(double value) { return bits_as<long long>(value); }
inline double __longlong_as_double(long long bits) { return bits_as<double>(bits); }

// Kernels by the name that a launch gives, with the arguments behind pointers.
using Call = std::function<void(char**)>;
void add_kernel(const char* name, std::vector<bool> arrays, Call call);

template <class... A, size_t... I>
void invoke(void (*kernel)(A...), char** arguments, std::index_sequence<I...>) {
    kernel(*reinterpret_cast<A*>(arguments[I])...);
}
template <class... A>
void add(const char* name, void (*kernel)(A...)) {
    add_kernel(name, {std::is_pointer_v<A>...},
               [kernel](char** arguments) { invoke(kernel, arguments, std::index_sequence_for<A...>{}); });
}
