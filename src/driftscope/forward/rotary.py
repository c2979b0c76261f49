"""The rotary frequencies of a model, with the scalings that long-context models use."""

from __future__ import annotations

import math
from decimal import Context, Decimal
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import ModelConfig
from driftscope.artifacts.yarn import attention_factor, logarithm
from driftscope.errors import InputError

# Powers to 40 digits, so that they are the same on every host.
_EXACT = Context(prec=40)


def rope_frequencies(config: ModelConfig, factors: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Radians a position of each pair of channels: ``theta^(-2i / head_dim)``, scaled.

    Every step is rounded to float32, as transformers does (``modeling_rope_utils.py``): the exponent,
    the power, its reciprocal, the scaling. `exact_frequencies` is the same without the roundings.

    Args:
        config: gives theta, head_dim and the scaling (none, ``linear``, ``llama3``, ``yarn``,
            ``stored_factors``).
        factors: ``float32[head_dim / 2]`` divisors from GGUF's ``rope_freqs.weight``, which hold the
            ``llama3`` scaling already computed and then stand in for the one in `config`; or None.

    Returns:
        ``float32[head_dim / 2]``.

    Raises:
        InputError: a scaling that is not implemented, or factors of another length.
    """
    found: NDArray[np.float32] = _frequencies(config, factors, np.float32)
    return found


def exact_frequencies(config: ModelConfig, factors: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
    """`rope_frequencies` in float64, ``float64[head_dim / 2]``."""
    found: NDArray[np.float64] = _frequencies(config, factors, np.float64)
    return found


def _frequencies(config: ModelConfig, factors: NDArray[np.float32] | None, real: Any) -> Any:
    half = config.head_dim // 2
    exponents = (np.arange(half, dtype=real) * real(2)) / real(config.head_dim)
    exact = [_power(float(config.rope_theta), float(exponent)) for exponent in exponents]
    powers = np.array(exact, np.float64).astype(real)
    frequencies = real(1) / powers
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
        return frequencies / real(scaling["factor"])
    if kind == "llama3":
        return _llama3(
            frequencies,
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            float(scaling["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        return _yarn(powers, config)
    if kind == "stored_factors":
        raise InputError(
            "tensor rope_freqs.weight is missing, which the RoPE scaling of the model is stored in"
        )
    raise InputError(f"RoPE scaling {kind!r} has no forward pass; expected default, linear, llama3 or yarn")


@lru_cache(maxsize=4096)
def _power(base: float, exponent: float) -> float:
    """To 40 digits, rounded once: slow, and the same for each pass of a model."""
    return float(_EXACT.power(Decimal(base), Decimal(exponent)))


def rope_scale(config: ModelConfig) -> float:
    """Factor of every cosine and sine: YaRN's attention factor, 1 without YaRN."""
    scaling = config.rope_scaling or {}
    return attention_factor(scaling) if scaling.get("rope_type") == "yarn" else 1.0


def longest_sequence(config: ModelConfig) -> int:
    """Positions that the model is made for; YaRN stretches those that it was trained on."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") != "yarn":
        return config.context_length
    return max(config.context_length, int(float(scaling["factor"]) * _trained_length(config)))


def _llama3(frequencies: Any, factor: float, low: float, high: float, original_length: float) -> Any:
    """Llama 3.1: leave short wavelengths, divide long ones by `factor`, interpolate between."""
    wavelengths = 2.0 * math.pi / frequencies.astype(np.float64)
    smooth = (original_length / wavelengths - low) / (high - low)
    wide = frequencies.astype(np.float64)
    between = (1.0 - smooth) * wide / factor + smooth * wide
    scaled = np.where(wavelengths > original_length / low, wide / factor, between)
    return np.where(wavelengths < original_length / high, wide, scaled).astype(frequencies.dtype)


def _yarn(powers: Any, config: ModelConfig) -> Any:
    """YaRN (Peng et al. 2023): keep what turns often in the trained context, divide what turns seldom.

    `powers` are the reciprocals of the frequencies. Between the pairs that turn ``beta_fast`` and
    ``beta_slow`` times, the two are mixed along a line; these pairs are whole numbers unless ``truncate`` is
    false. In the type of `powers`, of transformers float32.
    """
    scaling = config.rope_scaling or {}
    if scaling.get("extrapolation_factor", 1) != 1:
        raise InputError(
            f"extrapolation_factor of the RoPE scaling is {scaling['extrapolation_factor']}; expected 1"
        )
    real = powers.dtype.type
    one = real(1)
    kept, divided = one / powers, one / (real(scaling["factor"]) * powers)

    def pair(turns: float) -> float:
        log = logarithm(_trained_length(config) / (turns * 2 * math.pi))
        return config.head_dim * log / (2 * logarithm(float(config.rope_theta)))

    try:
        low, high = pair(float(scaling.get("beta_fast") or 32)), pair(float(scaling.get("beta_slow") or 1))
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
    except (ArithmeticError, ValueError) as error:
        raise InputError("RoPE scaling 'yarn': theta, beta_fast and beta_slow give no range") from error
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    pairs = np.arange(len(powers), dtype=real)
    share = one - np.clip((pairs - real(low)) / real(high - low), 0, 1).astype(real)
    return divided * (one - share) + kept * share


def _trained_length(config: ModelConfig) -> int:
    scaling = config.rope_scaling or {}
    return int(scaling.get("original_max_position_embeddings") or config.context_length)
