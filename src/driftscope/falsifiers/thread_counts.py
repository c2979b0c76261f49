"""Products on several threads: are their bits those of one thread?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import Resampling, generator, parameter, share_with_interval
from driftscope.falsifiers.super_block import F32, Rows, random_rows
from driftscope.kernels.matmul import matmul_f32, matmul_f32_quantized, matmul_quantized
from driftscope.kernels.reference import published

_PRODUCTS = ("f32", "dequantized", "int8-dot")
_CONTROL_ROWS = 256

Product = Callable[[int], F32]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, factors are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Multiply with one thread and with several, and compare the bits.

    Args:
        parameters: `rows` and `blocks` of 256 columns of the weight, `threads` (a list of the numbers that
            are compared with one), `resamples` (not used), `confidence`.
        regimes: name to `product` (``f32``, ``dequantized`` or ``int8-dot``) and `tokens`.
        seeds: each draws weight and activations.
        evidence: not read.

    Returns:
        In each regime: `equal`, the share of outputs with the same bits; `unequal`, how many differ;
        `outputs`, how many were compared.
    """
    n_rows = parameter(parameters, "rows", int, least=1)
    blocks = parameter(parameters, "blocks", int, least=1)
    threads = _threads(parameters)
    resampling = Resampling.of(parameters)

    def compare(products: Sequence[Product], counts: Sequence[int]) -> dict[str, Any]:
        unequal = outputs = 0
        for product in products:
            alone = product(1).view(np.uint32)
            for count in counts:
                unequal += int((product(count).view(np.uint32) != alone).sum())
                outputs += alone.size
        share = share_with_interval(outputs - unequal, outputs, resampling)
        return {"equal": share, "unequal": unequal, "outputs": outputs}

    split = [_split_sum(seed) for seed in seeds]
    found = {
        name: compare([_product(seed, n_rows, blocks, regime) for seed in seeds], threads)
        for name, regime in regimes.items()
    }
    return {
        "samples": sum(regime["outputs"] for regime in found.values()),
        "threads": list(threads),
        "published": {"large": _repeated(large=True), "small": _repeated(large=False)},
        "regimes": found,
        "controls": {"one-thread-twice": compare(split, [1]), "split-sum": compare(split, threads)},
        "domain": [compare(split, [count]) for count in (1, 2, 4, 8)],
    }


def _threads(parameters: Mapping[str, Any]) -> list[int]:
    threads = parameters.get("threads")
    valid = isinstance(threads, list) and all(
        isinstance(count, int) and not isinstance(count, bool) and 2 <= count <= 64 for count in threads
    )
    if not isinstance(threads, list) or not valid or not threads:
        raise InputError(f"measurement parameter `threads` is {threads!r}; expected numbers from 2 to 64")
    return list(threads)


def _draw(seed: int, n_rows: int, blocks: int, tokens: int) -> tuple[F32, Rows]:
    random = generator(seed)
    x = random.standard_normal((tokens, 256 * blocks)).astype(np.float32)
    return x, np.concatenate([random_rows(random, n_rows) for _ in range(blocks)], axis=1)


def _product(seed: int, n_rows: int, blocks: int, regime: Mapping[str, Any]) -> Product:
    kind = parameter(regime, "product", str)
    if kind not in _PRODUCTS:
        raise InputError(f"regime parameter `product` is {kind!r}; expected one of {', '.join(_PRODUCTS)}")
    x, rows = _draw(seed, n_rows, blocks, parameter(regime, "tokens", int, least=1))
    if kind == "f32":
        w = generator(seed, 1).standard_normal((n_rows, x.shape[1])).astype(np.float32)
        return lambda threads: matmul_f32(x, w, threads=threads)
    if kind == "dequantized":
        return lambda threads: matmul_f32_quantized(x, rows, "Q4_K", threads=threads)
    return lambda threads: matmul_quantized(x, rows, "Q4_K", threads=threads)


def _split_sum(seed: int) -> Product:
    """A product whose columns are dealt out to the threads; their sums are added at the end."""
    random = generator(seed, 2)
    x = random.standard_normal((1, 256)).astype(np.float32)
    w = random.standard_normal((_CONTROL_ROWS, 256)).astype(np.float32)

    def product(threads: int) -> F32:
        parts = np.array_split(np.arange(256), threads)
        sums = [
            published.scalar_dot(w[:, part], np.broadcast_to(x[0, part], (len(w), len(part))))
            for part in parts
        ]
        total = sums[0]
        for each in sums[1:]:
            total = total + each
        return total

    return product


def _repeated(large: bool) -> dict[str, int]:
    """Run the published product twice, the second time with two threads."""
    x, w = published.matmul_fixture(large)
    first, again, threaded = matmul_f32(x, w), matmul_f32(x, w), matmul_f32(x, w, threads=2)
    bits = first.view(np.uint32)
    return {
        "outputs": int(first.size),
        "unequal": int((bits != again.view(np.uint32)).sum()),
        "unequal_on_two_threads": int((bits != threaded.view(np.uint32)).sum()),
    }
