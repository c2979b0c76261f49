"""Tensors that are a constant times the other, or the other plus a constant: seen from a row's sums alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from driftscope.analysis.weights.relations import Band, Relation

# Quantizing moves the factor from one by a few times the NMSE: up to 6.3 times was seen, with an importance
# matrix (libgguf, Q6_K).
_SHRINKS = 8.0

# Values of float formats that no prediction is made for: a part of the energy below which what is left is the
# rounding of f32 and of the sums.
_EXACT = 1e-12


def linear_relation(row: Mapping[str, Any], relation: Relation, band: Band) -> Relation:
    """The relation of a tensor that nothing else explains, where one factor or one constant explains it.

    Args:
        row: the tensor's row of the sweep.
        relation: what was found so far; returned as it is unless it is ``different``.
        band: measured over expected NMSE that is the error of b's format.

    Returns:
        ``quantized-from`` under ``scaled(c)`` or ``shifted(c)``, never expected: what is left of b - c a, or
        of b - a - c, is the error that b's format predicts.
    """
    if relation.match != "different" or row["nmse"] is None or row["scale"] is None:
        return relation
    energy, scale, shift = row["nmse"], row["scale"], row["mean_error"]
    # All in units of the energy of a: of b - a, of b, and of what is left.
    of_b = energy - 1.0 + 2.0 * scale
    scaled = max(0.0, of_b - scale * scale)
    mean_square = row["rmse"] ** 2
    shifted = energy * max(0.0, mean_square - shift * shift) / mean_square if mean_square else energy
    # Quantizing shrinks a little, so that the factor is known to a few digits only.
    scaled_name = f"scaled({scale:.3g})"
    for left, size, name in ((scaled, of_b, scaled_name), (shifted, 1.0, f"shifted({shift:.3g})")):
        expected = row["expected_nmse"]
        fits = band.holds(left, expected) if expected else left <= _EXACT * size
        if fits and (left < energy / 2 or (name == scaled_name and _is_off(scale, left, row))):
            evidence = {**relation.evidence, "nmse_under": left, "expected_nmse_under": expected}
            evidence |= {"factor": scale, "constant": shift}
            return replace(
                relation, match="quantized-from", transforms=(name,), expected=False, evidence=evidence
            )
    return relation


def _is_off(scale: float, left: float, row: Mapping[str, Any]) -> bool:
    """Whether a factor is farther from one than quantizing and chance move it."""
    chance = 6.0 * (left / row["compared_count"]) ** 0.5
    return abs(scale - 1.0) > _SHRINKS * left + chance
