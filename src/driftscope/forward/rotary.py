"""The rotary frequencies of a model, with the scalings that long-context models use."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import ModelConfig
from driftscope.errors import InputError


def rope_frequencies(config: ModelConfig, factors: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Radians a position of each pair of channels: ``theta^(-2i / head_dim)``, scaled.

    Every step is rounded to float32, as transformers does (``modeling_rope_utils.py``): the exponent,
    the power, its reciprocal, the scaling.

    Args:
        config: gives theta, head_dim and the scaling (none, ``linear``, ``llama3``, ``stored_factors``).
        factors: ``float32[head_dim / 2]`` divisors from GGUF's ``rope_freqs.weight``, which hold the
            ``llama3`` scaling already computed and then stand in for the one in `config`; or None.

    Returns:
        ``float32[head_dim / 2]``.

    Raises:
        InputError: a scaling that is not implemented, or factors of another length.
    """
    half = config.head_dim // 2
    exponents = (np.arange(half, dtype=np.float32) * np.float32(2)) / np.float32(config.head_dim)
    powers = np.power(float(config.rope_theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    if factors is not None:
        if factors.shape != (half,):
            raise InputError(f"rope_freqs.weight: {factors.size} values, expected {half} (half of head_dim)")
        frequencies = frequencies / factors
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind in ("llama3", "stored_factors") and factors is not None:
        return frequencies
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / np.float32(scaling["factor"])
    if kind == "llama3":
        return _llama3(
            frequencies,
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            float(scaling["original_max_position_embeddings"]),
        )
    if kind == "stored_factors":
        raise InputError(
            "tensor rope_freqs.weight is missing, which the RoPE scaling of the model is stored in"
        )
    raise InputError(f"RoPE scaling {kind!r} has no forward pass; expected default, linear or llama3")


def _llama3(
    frequencies: NDArray[np.float32], factor: float, low: float, high: float, original_length: float
) -> NDArray[np.float32]:
    """Llama 3.1: leave short wavelengths, divide long ones by `factor`, interpolate between."""
    wavelengths = 2.0 * math.pi / frequencies.astype(np.float64)
    smooth = (original_length / wavelengths - low) / (high - low)
    wide = frequencies.astype(np.float64)
    between = (1.0 - smooth) * wide / factor + smooth * wide
    scaled = np.where(wavelengths > original_length / low, wide / factor, between)
    return np.where(wavelengths < original_length / high, wide, scaled).astype(np.float32)
