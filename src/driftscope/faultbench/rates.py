"""Rates of what was found, with exact intervals, and whether the targets are met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from driftscope.analysis.proportion import clopper_pearson

Row = Mapping[str, Any]

JUDGED = ("detected", "layer_right", "op_right", "class_right")

OP_TARGET, CLASS_TARGET, CLEAN_TARGET = 0.95, 0.85, 50

_GROUPS = ("judged", "source", "mechanism", "model", "format", "regime")


def rate(hits: int, trials: int) -> dict[str, Any]:
    """A share with its 95 % interval (Clopper and Pearson); of nothing there is none."""
    if not trials:
        return {"count": 0, "of": 0, "rate": None, "low": None, "high": None}
    low, high = clopper_pearson(hits, trials)
    return {
        "count": hits,
        "of": trials,
        "rate": _figure(hits / trials),
        "low": _figure(low),
        "high": _figure(high),
    }


def rates(rows: Sequence[Row]) -> dict[str, Any]:
    """What was found of the faults that were run; shares are of those with an effect above the floor."""
    run = [row for row in rows if row["status"] == "run"]
    above = [row for row in run if row["effect"]["above_floor"]]
    found: dict[str, Any] = {"runs": len(run), "above_floor": len(above)}
    for key in JUDGED:
        found[key] = rate(sum(bool(row[key]) for row in above), len(above))
    below = [row for row in run if not row["effect"]["above_floor"]]
    found["detected_below_floor"] = sum(bool(row["detected"]) for row in below)
    return found


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Rates over all rows, and by each of the things that a row says of its making."""
    found: dict[str, Any] = {"all": rates(rows)}
    for group in _GROUPS:
        values = sorted({row[group] for row in rows if row["status"] == "run"})
        found[f"by_{group}"] = {
            value: rates([row for row in rows if row[group] == value]) for value in values
        }
    return found


def by_fault(rows: Sequence[Row], faults: Sequence[str]) -> list[dict[str, Any]]:
    """Rates of each fault, ``complete`` where every run with an effect above the floor was found in full."""
    found = []
    for fault in faults:
        mine = [row for row in rows if row["fault"] == fault]
        entry = rates(mine)
        full = all(entry[key]["count"] == entry["above_floor"] for key in JUDGED)
        largest = [
            row["effect"]["kl"] for row in mine if row["status"] == "run" and row["effect"]["kl"] is not None
        ]
        found.append(
            {
                "fault": fault,
                **entry,
                "complete": bool(entry["above_floor"]) and full,
                "largest_kl": max(largest, default=None),
            }
        )
    return found


def targets(faults: Sequence[Row], clean: Sequence[Row], controls: Sequence[Row]) -> list[dict[str, Any]]:
    """Each target, what was found, and whether it is met."""
    total = rates(faults)
    pairs = [row for row in clean if row["status"] == "run"]
    sound = [*pairs, *(row for row in controls if row["status"] == "run")]
    alarms = rate(sum(bool(row["alarm"]) for row in sound), len(sound))

    def at_least(share: float) -> Callable[[Mapping[str, Any]], bool]:
        return lambda found: found["rate"] is not None and found["rate"] >= share

    detected = "every fault with an effect above the floor is detected"
    op = f"the op is right at rank 1 in {OP_TARGET:.0%} or more"
    class_ = f"the class is right in {CLASS_TARGET:.0%} or more"
    listed = (
        ("detected", detected, total["detected"], at_least(1.0)),
        ("op", op, total["op_right"], at_least(OP_TARGET)),
        ("class", class_, total["class_right"], at_least(CLASS_TARGET)),
        ("false-alarms", "no false alarm on clean pairs and controls", alarms, _none_of_some),
    )
    found = [
        {"id": name, "asked": asked, **what, "met": bool(met(what))} for name, asked, what, met in listed
    ]
    count = {"count": len(pairs), "of": CLEAN_TARGET, "rate": None, "low": None, "high": None}
    asked = f"at least {CLEAN_TARGET} clean pairs are run"
    return [*found, {"id": "clean-pairs", "asked": asked, **count, "met": len(pairs) >= CLEAN_TARGET}]


def _none_of_some(found: Mapping[str, Any]) -> bool:
    return found["of"] > 0 and found["count"] == 0


def _figure(value: float) -> float:
    return float(f"{value:.4g}")
