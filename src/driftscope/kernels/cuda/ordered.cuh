// A sum in f64 from the first term to the last, whatever the number of threads.
#pragma once

#include "numerics.cuh"

constexpr int THREADS = 256;

// All threads of the block make terms, the first one adds them; every thread gets the sum.
template <class Term>
__device__ inline double sum_in_order(i64 count, Term term) {
    __shared__ double terms[THREADS];
    const int thread = threadIdx.x;
    double total = 0.0;
    for (i64 start = 0; start < count; start += THREADS) {
        const int present = static_cast<int>(min(static_cast<i64>(THREADS), count - start));
        if (thread < present) terms[thread] = term(start + thread);
        __syncthreads();
        if (thread == 0) {
#pragma unroll 8
            for (int i = 0; i < present; i++) total += terms[i];
        }
        __syncthreads();
    }
    if (thread == 0) terms[0] = total;
    __syncthreads();
    total = terms[0];
    __syncthreads();
    return total;
}
