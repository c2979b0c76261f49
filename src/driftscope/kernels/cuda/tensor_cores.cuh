// Products of int8 matrices on the tensor cores, by a whole warp: c[16, 8] += a[16, depth] b[depth, 8], exact in int32.
//
// Thread 4 g + p of the warp holds, of c, rows g (0, 1) and g + 8 (2, 3) at columns 2 p and 2 p + 1; of a, for each
// 16 of the depth, a word of values 4 p to 4 p + 3 of row g and one of row g + 8; of b likewise a word of column g.
#pragma once

#include "numerics.cuh"

// Elsewhere these functions come from what stands for CUDA.
#ifdef __CUDACC__

__device__ inline void add_product_of_32(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void add_product_of_16(int (&c)[4], u32 upper, u32 lower, u32 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32"
        " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(upper), "r"(lower), "r"(b));
}

#endif
