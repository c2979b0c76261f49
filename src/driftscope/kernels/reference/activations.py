"""Activation formats in plain NumPy, for finite values: ``(quants int[n, k], d f32[n, b], s f32[n, b])``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Parts = tuple[NDArray[np.int64], F32, F32]


def quantize_activation(x: F32, fmt: str) -> Parts:
    """Quantize ``f32[n, k]``; `fmt` as in `driftscope.kernels.activations`."""
    size = 256 if fmt in ("q8_K", "apr_q8k") else 32
    blocks = x.reshape(x.shape[0], -1, size)
    rule = {"q8_K": _signed, "apr_q8k": _apr}.get(fmt, _portable if fmt.endswith("_ref") else _simd)
    with np.errstate(all="ignore"):
        quants, d = rule(blocks)
        s = d * quants.sum(axis=2).astype(np.float32)
        if size == 32:
            d, s = (value.astype(np.float16).astype(np.float32) for value in (d, s))
    return quants.reshape(x.shape).astype(np.int64), d, s


def _largest(blocks: F32) -> F32:
    return np.asarray(np.abs(blocks).max(axis=2), np.float32)


def _away(values: F32) -> F32:
    whole = np.trunc(values)
    up = np.abs(values - whole) >= np.float32(0.5)
    return np.asarray(whole + np.where(up, np.copysign(np.float32(1), values), np.float32(0)), np.float32)


def _simd(blocks: F32) -> tuple[F32, F32]:
    largest = _largest(blocks)
    inverse = np.where(largest != 0, np.float32(127) / largest, np.float32(0))
    return np.rint(blocks * inverse[..., None]), largest / np.float32(127)


def _portable(blocks: F32) -> tuple[F32, F32]:
    d = _largest(blocks) / np.float32(127)
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    return _away(np.asarray(blocks * inverse[..., None], np.float32)), d


def _signed(blocks: F32) -> tuple[F32, F32]:
    at = np.abs(blocks).argmax(axis=2)[..., None]
    signed = np.take_along_axis(blocks, at, axis=2)[..., 0]
    inverse = np.float32(-127) / signed
    quants = np.minimum(127, np.rint(blocks * inverse[..., None]))
    zero = signed == 0
    d = np.where(zero, np.float32(0), np.float32(1) / inverse)
    return np.where(zero[..., None], np.float32(0), quants), d


def _apr(blocks: F32) -> tuple[F32, F32]:
    largest = _largest(blocks)
    one = np.float32(1) / np.float32(127)
    scale = np.where(largest > np.float32(1e-10), largest / np.float32(127), one)
    ratio = np.asarray(blocks * (np.float32(1) / scale)[..., None], np.float32)
    return np.asarray(np.clip(_away(ratio), -128, 127), np.float32), scale.astype(np.float32)
