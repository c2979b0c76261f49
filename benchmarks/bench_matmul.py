"""Ratios of matmul speeds on one thread, measured in one run, as one JSON line.

- ``f32_over_blas``: path A (dequantize and multiply, fixed order) against dequantize and numpy's BLAS.
- ``int8_over_f32``: path B against path A.
- ``f32_gmacs``, ``int8_gmacs``: 10^9 multiply-adds a second on this machine, for orientation.
"""

from __future__ import annotations

import os

os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import json
import time
from collections.abc import Callable

import numpy as np

from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import row_bytes
from driftscope.kernels.matmul import matmul_f32_quantized, matmul_quantized

FORMATS = ("Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")
TOKENS = (1, 8, 64, 256)
ROWS, COLUMNS = 1536, 768
REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """The best of a few runs, after one that compiles and warms."""
    work()
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def measure(name: str, n: int) -> dict[str, float]:
    """Rates and ratios for one format and number of tokens."""
    generator = np.random.Generator(np.random.Philox(n))
    # Bytes under 64 keep every f16 scale finite.
    raw = generator.integers(0, 64, (ROWS, row_bytes(name, COLUMNS)), dtype=np.uint8)
    x = generator.standard_normal((n, COLUMNS)).astype(np.float32)
    f32 = seconds(lambda: matmul_f32_quantized(x, raw, name))
    int8 = seconds(lambda: matmul_quantized(x, raw, name))
    blas = seconds(lambda: x @ dequantize(raw, name).T)
    work = n * ROWS * COLUMNS / 1e9
    return {
        "f32_over_blas": round(blas / f32, 3),
        "int8_over_f32": round(f32 / int8, 3),
        "f32_gmacs": round(work / f32, 2),
        "int8_gmacs": round(work / int8, 2),
    }


def main() -> None:
    """Print the line."""
    cases = {f"{name} n={n}": measure(name, n) for name in FORMATS for n in TOKENS}
    print(json.dumps({"benchmark": "matmul", "rows": ROWS, "columns": COLUMNS, "threads": 1, "cases": cases}))


if __name__ == "__main__":
    main()
