"""Path B's matrix products against llama.cpp's on the same bytes with the same threads, as one JSON line.

Products at the shapes of a 7B layer. Both are run in turn in one process and the best of each counts;
quantizing the activation is part of both. For every format, shape, number of tokens and number of threads:

- ``ratio``: llama.cpp's time over ours, above 1 where ours is faster;
- ``gmacs``, ``llama_gmacs``: 10^9 multiply-adds a second of each, for orientation;
- ``nmse``: of our result against llama.cpp's; ``route_nmse``: of llama.cpp's default route for the format and
  this many tokens against its plain one (one token, memory as stored), on the same input.

``buffer`` says where llama.cpp puts the weight by default: ``CPU_REPACK`` (a repacked layout) or ``CPU``.

    python benchmarks/bench_matmul.py [--formats Q4_K,Q6_K] [--tokens 1,8] [--threads 1,2] [--shapes up,k]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import ggml_graph
import numpy as np
from numpy.typing import NDArray

from driftscope.kernels import instructions
from driftscope.kernels.formats import FORMATS
from driftscope.kernels.matmul import matmul_quantized

SHAPES = {"up": (18944, 3584), "down": (3584, 18944), "q": (3584, 3584), "k": (512, 3584)}
FORMAT_NAMES = "Q4_K,Q6_K,Q8_0,Q4_1"
# Multiply-adds above which a shape is left out: the larger ones take the same kernels for longer.
LIMIT = 36e9
SECONDS = 0.25

# Where the f16 scales of a block are, two of them where there are minima.
_SCALES = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}


def random_rows(name: str, n_rows: int, n_columns: int) -> NDArray[np.uint8]:
    """Random quants and ordinary scales; 64 rows, repeated."""
    layout, generator = FORMATS[name], np.random.Generator(np.random.Philox(7))
    blocks = generator.integers(
        0, 256, (64 * n_columns // layout.block_size, layout.block_bytes), dtype=np.uint8
    )
    count = 2 if layout.offset != "none" else 1
    scales = generator.uniform(0.001, 0.02, (blocks.shape[0], count)).astype(np.float16).view(np.uint8)
    at = _SCALES.get(name, 0)
    if name == "MXFP4":
        blocks[:, 0] = generator.integers(115, 125, blocks.shape[0])
    else:
        blocks[:, at : at + 2 * count] = scales
    return np.tile(blocks.reshape(64, -1), (-(-n_rows // 64), 1))[:n_rows]


def nmse(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Squared error over squared size."""
    a, b = expected.astype(np.float64), found.astype(np.float64)
    return float(f"{np.square(a - b).sum() / np.square(a).sum():.2e}")


def both(theirs: Callable[[], object], ours: Callable[[], object]) -> tuple[float, float]:
    """Best times of two, run in turn after once each to warm."""
    theirs()
    ours()
    best, end = [float("inf"), float("inf")], time.perf_counter() + SECONDS
    rounds = 0
    while rounds < 2 or time.perf_counter() < end:
        for i, work in enumerate((theirs, ours)):
            # OpenMP's threads spin for a while after their work.
            time.sleep(0.002)
            start = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best[0], best[1]


def measure(name: str, shape: str, tokens: list[int], threads: list[int]) -> dict[str, Any]:
    """All numbers of tokens and threads for one format and shape."""
    n_rows, n_columns = SHAPES[shape]
    raw = random_rows(name, n_rows, n_columns)
    generator = np.random.Generator(np.random.Philox(8))
    cases: dict[str, Any] = {}
    with (
        ggml_graph.Weight(raw, FORMATS[name].ggml_type, n_columns) as weight,
        ggml_graph.Weight(raw[:512], FORMATS[name].ggml_type, n_columns, repack=False) as plain,
    ):
        for n in tokens:
            work = n * n_rows * n_columns
            if work > LIMIT:
                continue
            x = generator.standard_normal((n, n_columns)).astype(np.float32)
            product, plain_product = weight.product(x), plain.product(x[:1])
            for count in threads:
                theirs, ours = both(
                    lambda: product.run(count),  # noqa: B023
                    lambda: matmul_quantized(x, raw, name, threads=count),  # noqa: B023
                )
                cases[f"n={n} threads={count}"] = {
                    "ratio": round(theirs / ours, 2),
                    "gmacs": round(work / ours / 1e9, 1),
                    "llama_gmacs": round(work / theirs / 1e9, 1),
                }
            plain_product.run(1)
            case = cases[f"n={n} threads={threads[-1]}"]
            case["nmse"] = nmse(matmul_quantized(x, raw, name, threads=2), product.values())
            case["route_nmse"] = nmse(product.values()[:1, :512], plain_product.values())
            product.close()
            plain_product.close()
        return {"buffer": weight.buffer, **cases}


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default=FORMAT_NAMES)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,32,128,512")
    parser.add_argument("--threads", default="1,2")
    options = parser.parse_args()
    tokens, threads = ([int(item) for item in text.split(",")] for text in (options.tokens, options.threads))
    results = {
        f"{name} {shape}": measure(name, shape, tokens, threads)
        for name in options.formats.split(",")
        for shape in options.shapes.split(",")
    }
    print(
        json.dumps({"benchmark": "matmul", "instructions": instructions.integer_dots(), "results": results})
    )


if __name__ == "__main__":
    main()
