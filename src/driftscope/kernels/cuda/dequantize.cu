// Stored rows to f32.
#include "formats.cuh"

// COUNT neighbouring values a thread; rows follow each other without a gap, so their borders do not matter.
template <class F, int COUNT>
__global__ void dequantize(const u8* raw, i64 count, float* out) {
    const i64 at = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * COUNT;
    if (at >= count) return;
    float values[COUNT];
    decode<F, COUNT>(raw, at, values);
    if constexpr (COUNT == 4)
        *reinterpret_cast<float4*>(out + at) = float4{values[0], values[1], values[2], values[3]};
    else
        out[at] = values[0];
}
