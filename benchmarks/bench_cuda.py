"""Speeds of the CUDA kernels on the card at hand, in one run, as one JSON line.

- ``copy_gbs``: bytes read and written a second by a plain copy on the device: the card's measured bandwidth.
- ``dequantize``, ``compare``: bytes that the operation must read and write a second, over ``copy_gbs``.
- ``int8_over_f32``: path B against path A.
- ``gmacs``: 10^9 multiply-adds a second of path B; ``bandwidth``: its bytes of weights a second likewise.

Weights and activations lie on the device. Without one, a line says so and the exit code is 2.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from driftscope.kernels.cuda.kernels import CudaKernels
from driftscope.kernels.device import why_not_cuda
from driftscope.kernels.formats import row_bytes

ROWS, COLUMNS = 18944, 3584
FORMATS = ("Q4_K", "Q6_K", "Q8_0", "Q4_1")
TOKENS = (1, 8, 32, 128, 512)
REPEATS = 10


def seconds(work: Callable[[], object]) -> float:
    """The best of a few runs, after one that compiles and warms."""
    import cupy

    best = float("inf")
    for i in range(REPEATS + 1):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        work()
        cupy.cuda.Device().synchronize()
        if i:
            best = min(best, time.perf_counter() - start)
    return best


def copy_rate() -> float:
    """Bytes a second, those read and those written."""
    import cupy

    source = cupy.zeros(1 << 28, cupy.float32)
    target = cupy.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: cupy.copyto(target, source))


def random_rows(dtype: str) -> np.ndarray:
    """Rows of random bytes under 64, which keep every f16 scale finite."""
    generator = np.random.Generator(np.random.Philox(1))
    return generator.integers(0, 64, (ROWS, row_bytes(dtype, COLUMNS)), dtype=np.uint8)


def measure_rows(kernels: CudaKernels, dtype: str, copy: float) -> dict[str, float]:
    """Shares of the card's bandwidth for one format."""
    raw, teacher = (kernels.to_device(random_rows(name)) for name in (dtype, "BF16"))
    dequantize = seconds(lambda: kernels.dequantize(raw, dtype))
    compare = seconds(lambda: kernels.compare(teacher, "BF16", raw, dtype))
    return {
        "dequantize": round((raw.nbytes + 4 * ROWS * COLUMNS) / dequantize / copy, 3),
        "compare": round((raw.nbytes + teacher.nbytes) / compare / copy, 3),
    }


def measure_products(kernels: CudaKernels, dtype: str, n: int, copy: float) -> dict[str, float]:
    """Rates of both paths for one format and number of tokens."""
    raw = kernels.to_device(random_rows(dtype))
    generator = np.random.Generator(np.random.Philox(n))
    x = kernels.to_device(generator.standard_normal((n, COLUMNS)).astype(np.float32))
    f32 = seconds(lambda: kernels.matmul_f32_quantized(x, raw, dtype))
    int8 = seconds(lambda: kernels.matmul_quantized(x, raw, dtype))
    return {
        "int8_over_f32": round(f32 / int8, 3),
        "gmacs": round(n * ROWS * COLUMNS / int8 / 1e9, 1),
        "bandwidth": round(raw.nbytes / int8 / copy, 3),
    }


def main() -> int:
    """Print the line."""
    reason = why_not_cuda()
    if reason:
        print(f"bench_cuda: {reason}")
        return 2
    from driftscope.kernels.cuda.module import CupyCard

    kernels = CudaKernels(CupyCard())
    copy = copy_rate()
    result: dict[str, Any] = {
        "benchmark": "cuda",
        "card": kernels.device_name,
        "rows": ROWS,
        "columns": COLUMNS,
        "copy_gbs": round(copy / 1e9, 1),
        "formats": {dtype: measure_rows(kernels, dtype, copy) for dtype in FORMATS},
        "products": {
            f"{dtype} n={n}": measure_products(kernels, dtype, n, copy) for dtype in FORMATS for n in TOKENS
        },
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
