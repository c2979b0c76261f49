"""Path A against dequantize + BLAS and against torch, measured in one run, as one JSON line.

``python benchmarks/bench_f32.py [threads] [rows] [columns]``; a matrix of the 7B shape where no size is
given. For every format and number of tokens:

- ``over_blas``, ``over_torch``: time of `dequantize` of the whole tensor and NumPy's product (OpenBLAS), or
  torch's ``linear``, with as many threads, over the time of `matmul_f32_quantized`; above 1 we are faster;
- ``over_dense_blas``, ``over_dense_torch``: the same without the time to dequantize, as if the weights were
  kept as f32, at two to eight times the memory;
- ``gmacs``: 10^9 multiply-adds a second of path A on this machine, for orientation.

Times are the processor's with one thread, which a busy machine changes less, and the clock's with more.
"""

from __future__ import annotations

import os
import sys

os.environ.update(
    dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), (sys.argv[1:] or ["1"])[0])
)

import json
import time
from collections.abc import Callable

import numpy as np
import torch

from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import row_bytes
from driftscope.kernels.matmul import matmul_f32_quantized

FORMATS = ("F32", "BF16", "F16", "Q4_K", "Q6_K", "Q8_0", "Q4_1")
TOKENS = (1, 8, 32, 128, 512)
THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
ROWS, COLUMNS = (int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 3 else (3584, 3584)
CLOCK = time.process_time if THREADS == 1 else time.perf_counter
ROUNDS = 5
LONGEST = 0.8  # seconds of one case, after which no further round is begun


def best_of(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The shortest time of each, taken in turns so that a disturbance meets all of them."""
    best = {name: float("inf") for name in works}
    for work in works.values():
        work()
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        for name, work in works.items():
            start = CLOCK()
            work()
            best[name] = min(best[name], CLOCK() - start)
        if time.perf_counter() - begun > LONGEST:
            break
    return best


def stored(name: str) -> np.ndarray:
    """Seeded random rows of a format, finite."""
    generator = np.random.Generator(np.random.Philox(1))
    if name in ("F32", "BF16", "F16"):
        values = generator.standard_normal((ROWS, COLUMNS), np.float32)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return (values.astype(np.float16) if name == "F16" else values).view(np.uint8)
    # Bytes under 60 keep every scale finite.
    return generator.integers(0, 60, (ROWS, row_bytes(name, COLUMNS)), dtype=np.uint8)


def measure(name: str, n: int) -> dict[str, float]:
    """Rates and ratios for one format and number of tokens."""
    raw = stored(name)
    x = np.random.Generator(np.random.Philox(n)).standard_normal((n, COLUMNS), np.float32)
    dense = dequantize(raw, name, threads=THREADS)
    x_torch, dense_torch = torch.from_numpy(x), torch.from_numpy(dense.copy())
    linear = torch.nn.functional.linear
    times = best_of(
        {
            "ours": lambda: matmul_f32_quantized(x, raw, name, threads=THREADS),
            "blas": lambda: x @ dequantize(raw, name, threads=THREADS).T,
            "torch": lambda: linear(x_torch, torch.from_numpy(dequantize(raw, name, threads=THREADS))),
            "dense_blas": lambda: x @ dense.T,
            "dense_torch": lambda: linear(x_torch, dense_torch),
        }
    )
    ratios = {f"over_{other}": round(times[other] / times["ours"], 2) for other in times if other != "ours"}
    return {**ratios, "gmacs": round(n * ROWS * COLUMNS / times["ours"] / 1e9, 2)}


def main() -> None:
    """Print the line."""
    torch.set_num_threads(THREADS)
    cases = {f"{name} n={n}": measure(name, n) for name in FORMATS for n in TOKENS}
    print(
        json.dumps({"benchmark": "f32", "rows": ROWS, "columns": COLUMNS, "threads": THREADS, "cases": cases})
    )


if __name__ == "__main__":
    main()
