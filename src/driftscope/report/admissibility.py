"""The ``admissibility`` section: may the two sides be compared at all?"""

from __future__ import annotations

from typing import Any

from driftscope.report.evidence import Document, ReportEvidence, not_run, plain
from driftscope.report.text import count, counted, listed


def admissibility_section(evidence: ReportEvidence) -> dict[str, Any]:
    """Join the checks of the traces with the one that the sweep left no tensor out.

    Returns:
        ``status``: `inadmissible` if a check fails, `not-run` if the traces were not checked, else
        `admissible`; ``checks``: each with what was asked, what was found and its own status.
    """
    given = evidence.get("admissibility")
    weights = _weights_coverage(evidence.get("sweep_inventory"))
    if not given:
        traces = _check(
            "traces", "all traces are over the same tokens, taps and capture points", None, "no check"
        )
        checks = [traces, weights]
        if weights["status"] != "fails":
            return {**not_run("the populations of the traces were not checked"), "checks": checks}
        return {"status": "inadmissible", "checks": checks}
    section = plain(given)
    checks = [*section.get("checks", []), weights]
    failing = section["status"] == "inadmissible" or weights["status"] == "fails"
    return {**section, "status": "inadmissible" if failing else section["status"], "checks": checks}


def _check(name: str, asked: str, holds: bool | None, found: str) -> dict[str, Any]:
    status = "not-run" if holds is None else "holds" if holds else "fails"
    return {"id": name, "status": status, "asked": asked, "found": found}


def _weights_coverage(inventory: Document | None) -> dict[str, Any]:
    """A sweep that left a tensor out, or had none, says nothing about the model."""
    asked = "every tensor of the teacher is compared with one of the candidate"
    if not inventory or "coverage" not in inventory:
        return _check("weights-coverage", asked, None, "no sweep")
    expected = int(inventory["coverage"]["expected"])
    compared = int(inventory["coverage"]["compared"])
    found = f"{count(compared)} of {counted(expected, 'tensor')} compared"
    if missing := list(inventory.get("missing") or []):
        found += f"; missing from the candidate: {listed(missing)}"
    return _check("weights-coverage", asked, 0 < expected == compared and not missing, found)
