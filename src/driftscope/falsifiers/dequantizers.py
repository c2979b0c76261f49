"""Three dequantizers: do the kernel, the NumPy reference and the gguf package give the same bits?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import Resampling, generator, parameter, share_with_interval
from driftscope.falsifiers.super_block import F32, Rows
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import format_of
from driftscope.kernels.reference import published
from driftscope.kernels.reference.dequantize import dequantize as reference_dequantize
from driftscope.kernels.reference.dequantize import unpack

_HALF_SHARES = (0.0, 0.01, 0.1, 1.0)

Dequantizer = Callable[[Rows, str], F32]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, blocks are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Dequantize drawn blocks, every byte uniform, in three ways and compare the bits.

    Args:
        parameters: `values` of each format drawn for each seed, `resamples` (not used), `confidence`.
        regimes: name to `formats`, a list of names.
        seeds: each draws blocks; those that hold a value that is not finite are left out.
        evidence: not read.

    Returns:
        In each regime: `equal`, the share of values whose bits are the same in all three; `unequal`, how
        many are not; `values`, how many were compared. `fused`
        is Q4_K with a fused multiply-add: nothing but the last operation rounds, so it is the same too.
    """
    values = parameter(parameters, "values", int, least=1)
    resampling = Resampling.of(parameters)

    def compare(formats: Sequence[str], dequantizers: Sequence[Dequantizer]) -> dict[str, Any]:
        counts = [_compare(seed, values, name, dequantizers) for seed in seeds for name in formats]
        unequal, compared = (sum(column) for column in zip(*counts, strict=True))
        if not compared:
            raise InputError("no drawn block has finite values only")
        share = share_with_interval(compared - unequal, compared, resampling)
        return {"equal": share, "unequal": unequal, "values": compared}

    found = {
        name: compare(_formats(name, regime), (_kernel, _reference, _gguf))
        for name, regime in regimes.items()
    }
    return {
        "samples": sum(regime["values"] for regime in found.values()),
        "published": _published(),
        "fused": compare(["Q4_K"], (_reference, _fused)),
        "regimes": found,
        "controls": {
            "reference-twice": compare(["Q4_K"], (_reference, _reference)),
            "half-precision-scales": compare(["Q4_K"], (_reference, _half(1.0))),
        },
        "domain": [compare(["Q4_K"], (_reference, _half(share))) for share in _HALF_SHARES],
    }


def _formats(name: str, regime: Mapping[str, Any]) -> list[str]:
    formats = regime.get("formats")
    if not isinstance(formats, list) or not formats or not all(isinstance(each, str) for each in formats):
        raise InputError(f"regime {name}: `formats` is {formats!r}; expected a list of format names")
    return formats


def _kernel(rows: Rows, dtype: str) -> F32:
    return dequantize(rows, dtype)


def _reference(rows: Rows, dtype: str) -> F32:
    return reference_dequantize(rows, dtype)


def _gguf(rows: Rows, dtype: str) -> F32:
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):
        values = quants.dequantize(
            np.ascontiguousarray(rows), GGMLQuantizationType(format_of(dtype).ggml_type)
        )
    return np.asarray(values, np.float32).reshape(len(rows), -1)


def _fused(rows: Rows, dtype: str) -> F32:
    """Q4_K with ``d sc q - dmin m`` rounded once, as a fused multiply-add does."""
    quants, scale, shift = _parts(rows, dtype)
    return published.fused_multiply_add(scale, quants, -shift).reshape(len(rows), -1)


def _half(share: float) -> Dequantizer:
    """Q4_K with ``d sc`` and ``dmin m`` rounded to f16, in the first `share` of the blocks."""

    def dequantizer(rows: Rows, dtype: str) -> F32:
        values = reference_dequantize(rows, dtype).copy()
        count = int(np.ceil(share * len(rows)))
        quants, scale, shift = _parts(rows[:count], dtype)
        with np.errstate(over="ignore"):
            scale, shift = (part.astype(np.float16).astype(np.float32) for part in (scale, shift))
        with np.errstate(invalid="ignore"):
            values[:count] = (scale * quants - shift).reshape(count, 256)
        return values

    return dequantizer


def _parts(rows: Rows, dtype: str) -> tuple[F32, F32, F32]:
    """Quants ``f32[n, 8, 32]``, and ``d sc`` and ``dmin m``, ``f32[n, 8, 1]``, of Q4_K."""
    n = len(rows)
    quants, scales, mins, d, dmin = unpack(rows, dtype)
    scale = (d.reshape(n, 1) * scales.reshape(n, 8).astype(np.float32))[:, :, None]
    shift = (dmin.reshape(n, 1) * mins.reshape(n, 8).astype(np.float32))[:, :, None]
    return quants.reshape(n, 8, 32).astype(np.float32), scale, shift


def _compare(seed: int, values: int, dtype: str, dequantizers: Sequence[Dequantizer]) -> tuple[int, int]:
    """Return how many values differ, and how many there are."""
    layout = format_of(dtype)
    blocks = -(-values // layout.block_size)
    rows = generator(seed, layout.ggml_type).integers(0, 256, (blocks, layout.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        finite = np.isfinite(reference_dequantize(rows, dtype)).all(axis=1)
        results = [dequantizer(rows[finite], dtype).view(np.uint32) for dequantizer in dequantizers]
    same = np.logical_and.reduce([results[0] == other for other in results[1:]])
    return int((~same).sum()), int(same.size)


def _published() -> dict[str, Any]:
    """Return how many values of the published block differ between any two of the three."""
    rows = published.block_bytes()[None]
    first, *others = (each(rows, "Q4_K").view(np.uint32) for each in (_kernel, _reference, _gguf))
    same = np.logical_and.reduce([first == other for other in others])
    values = first.view(np.float32)[0]
    return {
        "values": int(same.size),
        "equal": int(same.sum()),
        "element_0": float(values[0]),
        "element_255": float(values[255]),
    }
