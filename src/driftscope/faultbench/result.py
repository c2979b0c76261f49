"""One row of the report: a fault, where it was put, what it did, and what the tool said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from driftscope.faultbench.examine import Effect, Finding
from driftscope.faultbench.injection import Spot


@dataclass(frozen=True)
class Setting:
    """What was run.

    Attributes:
        fault: its id.
        injection: the injection's name.
        says: the injection in words.
        mechanism: ``weights``, ``configuration``, ``engine``, ``capture`` or ``inventory``.
        judged: ``engine`` (trace against the sound model), ``model`` (faulty model against the teacher),
            ``capture`` or ``inventory``.
        source: the engine that computed: ``driftscope``, ``transformers`` or ``llama.cpp``.
        model: its name.
        format: how it is stored.
        path: the arithmetic.
        regime: the prompts.
    """

    fault: str
    injection: str
    says: str
    mechanism: str
    judged: str
    source: str
    model: str
    format: str
    path: str
    regime: str

    @property
    def id(self) -> str:
        """All of it in one line."""
        where = f"{self.model}/{self.format}/{self.path}"
        return f"{self.fault}/{self.injection}|{self.source}|{where}|{self.regime}|{self.judged}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"id": self.id, **vars(self)}


def not_run(setting: Setting, status: str, reason: str) -> dict[str, Any]:
    """A row of what was not run: ``not-applicable`` or ``not-run``."""
    return {**setting.to_dict(), "status": status, "reason": reason}


def judged(
    setting: Setting,
    expected: Spot,
    classes: Sequence[str],
    finding: Finding,
    effect: Effect,
) -> dict[str, Any]:
    """A row of a fault that was run and looked for in a replayed trace."""
    first = finding.first
    flagged = finding.flagged
    points = finding.capture_points
    component = "model" if setting.judged == "model" else "engine"
    if setting.judged == "capture":
        found = [point for point in points if _same_op(point, expected)]
        layer_right = any(point["layer"] == expected.layer for point in points)
        hit = {"detected": bool(points), "layer_right": layer_right, "op_right": bool(found)}
        hit["class_right"] = bool(found) and first is None
    else:
        ours = first is not None and first["component"] == component
        hit = {"detected": any(flag["component"] == component for flag in flagged)}
        hit["layer_right"] = bool(ours and first is not None and first["layer"] == expected.layer)
        hit["op_right"] = bool(ours and first is not None and _same_op(first, expected))
        hit["class_right"] = bool(hit["op_right"] and first is not None and first.get("class") in classes)
    return {
        **setting.to_dict(),
        "status": "run",
        "reason": "",
        "expected": {**vars(expected), "class": classes[0], "also": list(classes[1:])},
        "effect": {
            "kl": _figure(effect.kl),
            "kl_undefined": effect.kl_undefined,
            "kl_rounding": _figure(effect.kl_rounding),
            "over_predicted": _figure(effect.over_predicted),
            "unpredicted": effect.over_predicted is not None and math.isinf(effect.over_predicted),
            "above_floor": effect.above_floor,
        },
        **hit,
        "found": finding.summary(),
        "flags": len({(flag["layer"], flag["tap"], flag["part"]) for flag in flagged}),
        "capture_points": [
            {key: point.get(key) for key in ("layer", "tap", "part", "statement")} for point in points
        ],
    }


def _same_op(found: Mapping[str, Any], expected: Spot) -> bool:
    same = (found["layer"], found["tap"]) == (expected.layer, expected.tap)
    return same and expected.part in ("", found.get("part") or "")


def _figure(value: float | None) -> float | None:
    """A figure to four digits; what is not finite has none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.3e}")
