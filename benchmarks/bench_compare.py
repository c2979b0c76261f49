"""How fast two tensors are compared, as ratios within one run; prints one JSON line.

The pair is a BF16 matrix and its Q4_K quantization, as in a 7B model's sweep. It is set against the same
work with NumPy and the gguf package's dequantize (on a part of the rows, scaled), and against only reading
the same bytes from memory. Each time is the best of a few.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import gguf
import libgguf
import numpy as np
from numpy.typing import NDArray

from driftscope.kernels.compare import compare

ROWS, COLUMNS, PART = 12288, 7168, 768


def best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def with_numpy(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[float, ...]:
    """The same figures with NumPy and the gguf package."""
    x = gguf.dequantize(a, gguf.GGMLQuantizationType.BF16).astype(np.float64)
    y = gguf.dequantize(b, gguf.GGMLQuantizationType.Q4_K).astype(np.float64)
    d = np.abs(x - y)
    counts = [np.count_nonzero(d < bound) for bound in (1e-3, 1e-2)] + [np.count_nonzero(d == 0)]
    both = np.isfinite(x) & np.isfinite(y)
    sums = [(x * x).sum(), (y * y).sum(), (x * y).sum(), d.sum(), (d * d).sum(), both.sum()]
    return (*counts, *sums, d.max(), d.argmax(), x.std(), y.std())


def main() -> None:
    """Print the ratios."""
    generator = np.random.Generator(np.random.Philox(1))
    part = generator.standard_normal((PART, COLUMNS), dtype=np.float32) * np.float32(0.02)
    bf16 = np.ascontiguousarray(part.view(np.uint16)[:, 1::2])
    quantized = libgguf.quantize_rows(part, libgguf.GGMLQuantizationType.Q4_K)
    times = ROWS // PART
    a = np.tile(bf16.view(np.uint8).reshape(PART, -1), (times, 1))
    b = np.tile(quantized.view(np.uint8).reshape(PART, -1), (times, 1))
    compare(a[:4], "BF16", b[:4], "Q4_K")
    one = best(lambda: compare(a, "BF16", b, "Q4_K", threads=1), 3)
    two = best(lambda: compare(a, "BF16", b, "Q4_K", threads=2), 3)
    numpy_and_gguf = best(lambda: with_numpy(a[:PART], b[:PART]), 2) * times
    reading = best(lambda: (a.view(np.uint64).max(), b.view(np.uint64).max()), 3)
    print(
        json.dumps(
            {
                "benchmark": "compare",
                "megabytes": round((a.nbytes + b.nbytes) / 1e6, 1),
                "values": ROWS * COLUMNS,
                "ns_per_value": round(one / (ROWS * COLUMNS) * 1e9, 3),
                "times_faster_than_numpy_and_gguf": round(numpy_and_gguf / one, 2),
                "times_faster_than_numpy_and_gguf_2_threads": round(numpy_and_gguf / two, 2),
                "share_of_speed_of_reading": round(reading / one, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
