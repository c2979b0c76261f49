"""The factor of cosines and sines that YaRN (Peng et al. 2023) and LongRoPE (Ding et al. 2024) ask for."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Context, Decimal
from typing import Any

# 40 digits, so that a logarithm is the same on every host.
_EXACT = Context(prec=40)


def attention_factor(scaling: Mapping[str, Any]) -> float:
    """Factor of every cosine and sine.

    The ``attention_factor`` itself where it is given; else ``0.1 ln(factor) + 1`` (equation 22), of which
    ``mscale`` and ``mscale_all_dim`` are multiples of the logarithm in a numerator and a denominator.
    """
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = float(scaling["factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return softening(factor, float(scaling["mscale"])) / softening(
            factor, float(scaling["mscale_all_dim"])
        )
    return softening(factor)


def softening(factor: float, multiple: float = 1.0) -> float:
    """``0.1 * multiple * ln(factor) + 1``, 1 where nothing is stretched."""
    return 1.0 if factor <= 1.0 else 0.1 * multiple * logarithm(factor) + 1.0


def logarithm(value: float) -> float:
    """Natural logarithm of a positive number."""
    return float(Decimal(value).ln(_EXACT))


def longrope_attention_factor(factor: float, original_length: int) -> float:
    """``sqrt(1 + ln(factor) / ln(original_length))``, 1 where nothing is stretched (Ding et al. 2024).

    Args:
        factor: how many times longer the context became.
        original_length: tokens of the context before; more than 1.
    """
    if factor <= 1.0:
        return 1.0
    ratio = Decimal(factor).ln(_EXACT) / Decimal(original_length).ln(_EXACT)
    return float((1 + ratio).sqrt(_EXACT))
