"""Rows of the ``replay`` table with scores of our choosing."""

from __future__ import annotations

from typing import Any


def row(**changes: Any) -> dict[str, Any]:
    """One clean row; what is given replaces what it holds."""
    found: dict[str, Any] = {
        "path": "other",
        "prompt": "a",
        "layer": 0,
        "tap": "ffn_out",
        "part": "",
        "component": "engine",
        "token_count": 16,
        "count": 16 * 64,
        "nmse": 1e-14,
        "energy": 1e-12,
        "signal_energy": 100.0,
        "predicted_energy": 1e-12,
        "score": 0.0,
        "score_token": 0.3,
        "worst_position": 5,
        "score_channel": 0.5,
        "worst_channel": 7,
        "non_finite": 0,
        "recomputed": "",
    }
    return {**found, **changes}
