"""The benchmark's report: a JSON document, validated, and a page that a person reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from driftscope.errors import InputError
from driftscope.faultbench.examine import ABOVE, MATERIAL_KL, OVER_ROUNDING
from driftscope.faultbench.faults import CONTROLS, FAULTS, Fault
from driftscope.faultbench.rates import JUDGED, by_fault, summary, targets

Row = Mapping[str, Any]

SCHEMA_VERSION = 1


def build(parts: Iterable[Mapping[str, Sequence[Row]]], *, alpha: float) -> dict[str, Any]:
    """Join the rows of all jobs.

    Args:
        parts: ``faults``, ``clean`` and ``controls`` of each job.
        alpha: probability that a clean trace is flagged anywhere, at which all of them were judged.
    """
    rows: dict[str, list[Row]] = {"faults": [], "clean": [], "controls": []}
    for part in parts:
        for kind, found in rows.items():
            found += part[kind]
    for found in rows.values():
        found.sort(key=lambda row: (row.get("fault", ""), row.get("control", ""), row["id"]))
    faults = rows["faults"]
    run = [row for row in faults if row["status"] == "run"]
    above = [row for row in run if row["effect"]["above_floor"]]
    return {
        "schema_version": SCHEMA_VERSION,
        "alpha": alpha,
        "above_floor": {"tail": ABOVE, "kl": MATERIAL_KL, "over_rounding": OVER_ROUNDING},
        "targets": targets(faults, rows["clean"], rows["controls"]),
        "summary": summary(faults),
        "catalogue": [_described(fault) for fault in FAULTS.values()],
        "by_fault": by_fault(faults, list(FAULTS)),
        "controls_asked": dict(CONTROLS),
        "misses": [row["id"] for row in above if not all(row[key] for key in JUDGED)],
        "below_floor": [row["id"] for row in run if not row["effect"]["above_floor"]],
        "alarms": [
            row["id"]
            for row in (*rows["clean"], *rows["controls"])
            if row["status"] == "run" and row["alarm"]
        ],
        "not_applicable": _reasons(row for row in faults if row["status"] == "not-applicable"),
        "not_run": _reasons(
            row for row in (*faults, *rows["clean"], *rows["controls"]) if row["status"] == "not-run"
        ),
        "rows": run,
        "clean": [row for row in rows["clean"] if row["status"] == "run"],
        "controls": rows["controls"],
    }


def _described(fault: Fault) -> dict[str, str]:
    """A row of the catalogue as plain values."""
    plain = {"id": fault.id, "class": fault.class_, "says": fault.says}
    return {**plain, "seen": fault.seen, "absent": fault.absent}


def _reasons(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [{"id": row["id"], "reason": row["reason"]} for row in rows]


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of the report."""
    text = resources.files("driftscope.faultbench").joinpath("schema.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def check(document: Mapping[str, Any]) -> None:
    """Validate a report.

    Raises:
        InputError: it breaks the schema; names the first place.
    """
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema())
    for error in sorted(validator.iter_errors(document), key=lambda error: list(map(str, error.path))):
        raise InputError(f"faultbench report: {error.json_path}: {error.message}")
