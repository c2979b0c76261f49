// Block formats: how the bytes of a block become integers and scales.
//
// A format says, for a block at `p`: `four(p, i)`, the quants i to i + 3 as four int8 in one word (i a multiple
// of 4); `scale(p, s)` and `least(p, s)`, the integer scale and minimum of sub-block s; `d(p)` and `dmin(p)`, the
// f32 factors of both. A value is (d * scale) * quant, then - dmin * least or + dmin * least as `offset` says,
// each operation rounded. The layouts are those of ggml-common.h.
#pragma once

#include "numerics.cuh"

enum Offset { NONE, SUBTRACT, ADD };

// The word at `p`. Blocks of 18, 34 or 210 bytes put it at even addresses, those of 17 bytes anywhere.
template <int BYTES>
__device__ inline u32 word_at(const u8* p) {
    if constexpr (BYTES % 4 == 0) {
        return *reinterpret_cast<const u32*>(p);
    } else if constexpr (BYTES % 2 == 0) {
        const u16* halves = reinterpret_cast<const u16*>(p);
        return halves[0] | static_cast<u32>(halves[1]) << 16;
    } else {
        return p[0] | static_cast<u32>(p[1]) << 8 | static_cast<u32>(p[2]) << 16 | static_cast<u32>(p[3]) << 24;
    }
}

__device__ inline float half_at(const u8* p) { return half_value(*reinterpret_cast<const u16*>(p)); }

// Four values in a word, one a byte.
__device__ inline u32 nibbles(u32 word, bool high) { return (high ? word >> 4 : word) & 0x0F0F0F0Fu; }
__device__ inline u32 pairs(u32 word, int which) { return word >> 2 * which & 0x03030303u; }
__device__ inline u32 bit_of_each(u32 word, int which) { return word >> which & 0x01010101u; }
__device__ inline u32 bits_apart(u32 four_bits) { return (four_bits & 15u) * 0x00204081u & 0x01010101u; }
// Each byte, 0 to 127, less `amount`: no borrow crosses a byte while its top bit is set.
__device__ inline u32 less(u32 word, u32 amount) {
    return ((word | 0x80808080u) - amount * 0x01010101u) ^ 0x80808080u;
}
// Each byte, 0 to 15, through a table of 16 int8.
__device__ inline u32 through(u32 word, u64 low, u64 high) {
    u32 result = 0;
    for (int byte = 0; byte < 32; byte += 8) {
        const u32 index = word >> byte & 15u;
        const u32 level = static_cast<u32>((index < 8 ? low : high) >> 8 * (index & 7u)) & 0xFFu;
        result |= level << byte;
    }
    return result;
}
// -127 -104 -83 -65 -49 -35 -22 -10, 1 13 25 38 53 69 89 113
__device__ inline u32 iq4_levels(u32 word) { return through(word, 0xF6EADDCFBFAD9881ull, 0x7159453526190D01ull); }
// Twice the values of E2M1: 0 1 2 3 4 6 8 12, and their negatives.
__device__ inline u32 e2m1_doubled(u32 word) { return through(word, 0x0C08060403020100ull, 0xF4F8FAFCFDFEFF00ull); }

// A format without a minimum, or without integer scales.
struct Plain {
    static constexpr Offset offset = NONE;
    static constexpr bool plain = false;
    __device__ static float d(const u8* p) { return half_at(p); }
    __device__ static float dmin(const u8*) { return 0.0f; }
    __device__ static int scale(const u8*, int) { return 1; }
    __device__ static int least(const u8*, int) { return 0; }
};

template <int BYTES>
struct Block32 : Plain {
    static constexpr int block = 32, sub = 32, bytes = BYTES;
    __device__ static u32 packed(const u8* quants, int i) {
        return nibbles(word_at<BYTES>(quants + (i & 15)), i >= 16);
    }
};

template <int BYTES>
struct Block32WithMinimum : Block32<BYTES> {
    static constexpr Offset offset = ADD;
    __device__ static float dmin(const u8* p) { return half_at(p + 2); }
    __device__ static int least(const u8*, int) { return 1; }
};

struct Q4_0 : Block32<18> {
    __device__ static u32 four(const u8* p, int i) { return less(packed(p + 2, i), 8); }
};

struct Q4_1 : Block32WithMinimum<20> {
    __device__ static u32 four(const u8* p, int i) { return packed(p + 4, i); }
};

struct Q5_0 : Block32<22> {
    __device__ static u32 four(const u8* p, int i) {
        return less(packed(p + 6, i) | bits_apart(word_at<22>(p + 2) >> i) << 4, 16);
    }
};

struct Q5_1 : Block32WithMinimum<24> {
    __device__ static u32 four(const u8* p, int i) {
        return packed(p + 8, i) | bits_apart(word_at<24>(p + 4) >> i) << 4;
    }
};

struct Q8_0 : Block32<34> {
    __device__ static u32 four(const u8* p, int i) { return word_at<34>(p + 2 + i); }
};

struct IQ4_NL : Block32<18> {
    __device__ static u32 four(const u8* p, int i) { return iq4_levels(packed(p + 2, i)); }
};

struct MXFP4 : Block32<17> {
    // Half of the power of two that the byte stands for, since the levels are doubled.
    __device__ static float d(const u8* p) {
        return float_of(p[0] < 2 ? 0x00200000u << p[0] : static_cast<u32>(p[0] - 1) << 23);
    }
    __device__ static u32 four(const u8* p, int i) { return e2m1_doubled(packed(p + 1, i)); }
};

template <int BYTES, int SUB>
struct Block256 : Plain {
    static constexpr int block = 256, sub = SUB, bytes = BYTES;
};

struct Q2_K : Block256<84, 16> {
    static constexpr Offset offset = SUBTRACT;
    __device__ static float d(const u8* p) { return half_at(p + 80); }
    __device__ static float dmin(const u8* p) { return half_at(p + 82); }
    __device__ static int scale(const u8* p, int s) { return p[s] & 15; }
    __device__ static int least(const u8* p, int s) { return p[s] >> 4; }
    __device__ static u32 four(const u8* p, int i) {
        return pairs(word_at<84>(p + 16 + i / 128 * 32 + i % 32), i % 128 / 32);
    }
};

struct Q3_K : Block256<110, 16> {
    __device__ static float d(const u8* p) { return half_at(p + 108); }
    __device__ static int scale(const u8* p, int s) {
        const int low = p[96 + s % 8] >> s / 8 * 4 & 15;
        return (low | (p[104 + s % 4] >> s / 4 * 2 & 3) << 4) - 32;
    }
    __device__ static u32 four(const u8* p, int i) {
        const u32 low = pairs(word_at<110>(p + 32 + i / 128 * 32 + i % 32), i % 128 / 32);
        return less(low | bit_of_each(word_at<110>(p + i % 32), i / 32) << 2, 4);
    }
};

// Eight scales and eight minima of six bits in the 12 bytes at offset 4 (get_scale_min_k4).
template <int BYTES>
struct SixBits : Block256<BYTES, 32> {
    static constexpr Offset offset = SUBTRACT;
    __device__ static float dmin(const u8* p) { return half_at(p + 2); }
    __device__ static int scale(const u8* p, int s) {
        return s < 4 ? p[4 + s] & 63 : (p[8 + s] & 15) | p[s] >> 6 << 4;
    }
    __device__ static int least(const u8* p, int s) {
        return s < 4 ? p[8 + s] & 63 : p[8 + s] >> 4 | p[4 + s] >> 6 << 4;
    }
};

struct Q4_K : SixBits<144> {
    __device__ static u32 four(const u8* p, int i) {
        return nibbles(word_at<144>(p + 16 + i / 64 * 32 + i % 32), i % 64 >= 32);
    }
};

struct Q5_K : SixBits<176> {
    __device__ static u32 four(const u8* p, int i) {
        const u32 low = nibbles(word_at<176>(p + 48 + i / 64 * 32 + i % 32), i % 64 >= 32);
        return low | bit_of_each(word_at<176>(p + 16 + i % 32), i / 32) << 4;
    }
};

struct Q6_K : Block256<210, 16> {
    __device__ static float d(const u8* p) { return half_at(p + 208); }
    __device__ static int scale(const u8* p, int s) { return static_cast<i8>(p[192 + s]); }
    __device__ static u32 four(const u8* p, int i) {
        const u32 low = nibbles(word_at<210>(p + i / 128 * 64 + i % 64), i % 128 >= 64);
        return less(low | pairs(word_at<210>(p + 128 + i / 128 * 32 + i % 32), i % 128 / 32) << 4, 32);
    }
};

struct Q8_K : Block256<292, 32> {
    __device__ static float d(const u8* p) { return float_of(word_at<292>(p)); }
    __device__ static u32 four(const u8* p, int i) { return word_at<292>(p + 4 + i); }
};

struct IQ4_XS : Block256<136, 32> {
    __device__ static int scale(const u8* p, int s) {
        return ((p[4 + s / 2] >> s % 2 * 4 & 15) | (p[2 + s / 4] >> s % 4 * 2 & 3) << 4) - 32;
    }
    __device__ static u32 four(const u8* p, int i) {
        return iq4_levels(nibbles(word_at<136>(p + 8 + i / 32 * 16 + i % 16), i % 32 >= 16));
    }
};

// Formats that are not blocks of integers.
struct F32 {
    static constexpr bool plain = true;
    static constexpr int bytes = 4;
    __device__ static float one(const u8* p) { return *reinterpret_cast<const float*>(p); }
};

struct F16 {
    static constexpr bool plain = true;
    static constexpr int bytes = 2;
    __device__ static float one(const u8* p) { return half_at(p); }
};

struct BF16 {
    static constexpr bool plain = true;
    static constexpr int bytes = 2;
    __device__ static float one(const u8* p) {
        return float_of(static_cast<u32>(*reinterpret_cast<const u16*>(p)) << 16);
    }
};

// Byte `which` of a word as int8.
__device__ inline int quant_of(u32 four, int which) { return static_cast<i8>(four >> 8 * which & 0xFFu); }

template <class F>
__device__ inline float step_of(const u8* block, int i) {
    return times(F::d(block), static_cast<float>(F::scale(block, i / F::sub)));
}

// The values of columns `column` to `column + COUNT - 1` of a row. COUNT is 4, and then `column` a multiple
// of 4 and a plain row a whole number of fours; or 1.
template <class F, int COUNT>
__device__ inline void decode(const u8* row, i64 column, float (&out)[COUNT]) {
    if constexpr (F::plain && COUNT == 1) {
        out[0] = F::one(row + column * F::bytes);
    } else if constexpr (COUNT == 1) {
        float four[4];
        decode<F, 4>(row, column / 4 * 4, four);
        for (int i = 0; i < 4; i++)
            if (i == column % 4) out[0] = four[i];
    } else if constexpr (F::plain) {
        // One load for the four.
        struct alignas(4 * F::bytes) Four {
            u8 bytes[4 * F::bytes];
        };
        const Four four = *reinterpret_cast<const Four*>(row + column * F::bytes);
        for (int i = 0; i < COUNT; i++) out[i] = F::one(four.bytes + i * F::bytes);
    } else {
        const u8* block = row + column / F::block * F::bytes;
        const int i = static_cast<int>(column % F::block);
        const u32 four = F::four(block, i);
        const float step = step_of<F>(block, i);
        float shift = 0.0f;
        if constexpr (F::offset != NONE)
            shift = times(F::dmin(block), static_cast<float>(F::least(block, i / F::sub)));
        for (int j = 0; j < COUNT; j++) {
            const float value = times(step, static_cast<float>(quant_of(four, j)));
            out[j] = F::offset == NONE ? value : F::offset == SUBTRACT ? minus(value, shift) : plus(value, shift);
        }
    }
}

// Bytes of a row of `columns` values.
template <class F>
__device__ inline i64 row_bytes(i64 columns) {
    if constexpr (F::plain)
        return columns * F::bytes;
    else
        return columns / F::block * F::bytes;
}
