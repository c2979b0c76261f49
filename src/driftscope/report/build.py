"""Evidence to report: one plain document with a fixed set of keys, whatever was run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from driftscope.report.admissibility import admissibility_section
from driftscope.report.divergence import divergence_section
from driftscope.report.evidence import Document, ReportEvidence, not_run, plain
from driftscope.report.text import number, percent
from driftscope.report.verdict import verdict_section
from driftscope.report.weights import weights_section

SCHEMA_VERSION = "1.0"

KEYS = (
    "schema_version",
    "name",
    "inputs",
    "admissibility",
    "weights",
    "divergence",
    "decomposition",
    "falsifiers",
    "published",
    "fix_scope",
    "impact",
    "gates",
    "verdict",
)
"""The top-level keys of a report, in order."""


def build_report(evidence: ReportEvidence) -> dict[str, Any]:
    """Assemble the report of one case; a pure function of its evidence.

    Returns:
        A document with exactly the keys of `KEYS`. A part whose evidence is absent is
        ``{"status": "not-run", "reason": …}``, in a list one entry of verdict ``not-run``; never a pass.
    """
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": evidence["name"],
        "inputs": _inputs(evidence),
        "admissibility": admissibility_section(evidence),
        "weights": weights_section(evidence),
        "divergence": divergence_section(evidence),
        "decomposition": _decomposition(evidence.get("decomposition")),
        "falsifiers": _judged(
            evidence.get("falsifiers"),
            "falsifiers",
            "Which registered hypotheses hold?",
            "no falsifier was judged",
        ),
        "published": _judged(
            evidence.get("published"),
            "published",
            "Do the published figures reproduce?",
            "no figure was recomputed",
        ),
        "fix_scope": _section(evidence.get("fix_scope"), "no counterfactual run, so no fix was judged"),
        "impact": _section(evidence.get("impact"), "no next-token distributions were compared"),
        "gates": _gates(evidence.get("gates")),
    }
    report["verdict"] = verdict_section(report)
    return report


def _inputs(evidence: ReportEvidence) -> dict[str, Any]:
    headers = evidence.get("headers") or {}
    return {
        "title": evidence.get("title", ""),
        "models": [dict(model) for model in evidence.get("models") or []],
        "prompts": [_counted_tokens(prompt) for prompt in evidence.get("prompts") or []],
        "texts": [_counted_tokens(text) for text in evidence.get("texts") or []],
        "paths": [
            {"id": path} if isinstance(path, str) else dict(path) for path in evidence.get("paths") or []
        ],
        "code": evidence.get("code"),
        "config": evidence.get("config"),
        "evidence": [{"file": file, **headers[file]} for file in sorted(headers)],
    }


def _counted_tokens(prompt: Document) -> dict[str, Any]:
    """Call a prompt's number of tokens `count`, as every other population of the report is called."""
    fields = dict(prompt)
    if "tokens" in fields:
        fields["count"] = fields.pop("tokens")
    return fields


def _section(document: Document | None, reason: str) -> dict[str, Any]:
    if not document:
        return not_run(reason)
    return {"status": "done", **plain(document)}


def _decomposition(document: Document | None) -> dict[str, Any]:
    """Add to the decomposition what its controls must be and whether they are."""
    section = _section(document, "no runs with single mechanisms, layers or sites promoted")
    if section["status"] == "not-run":
        return section
    controls = section.get("controls") or {}
    no_op, everything = controls.get("no_op_energy"), controls.get("all_promoted_share")
    exact = controls.get("all_promoted_exact")
    section["checks"] = [
        _control(
            "no-op",
            "promoting nothing changes nothing: energy 0",
            no_op,
            no_op == 0,
            f"energy {number(no_op)}",
        ),
        _control(
            "all-promoted",
            "promoting everything gives the whole difference, bit for bit: 100 %",
            everything if everything is not None else exact,
            exact is True,
            f"{percent(everything)}, {'bit for bit' if exact else 'not bit for bit'}",
        ),
    ]
    section.setdefault("shares", [])
    section.setdefault("positions", 0)
    return section


def _control(name: str, asked: str, value: float | None, holds: bool, found: str) -> dict[str, Any]:
    if value is None:
        return {"id": name, "status": "not-run", "asked": asked, "found": "the control was not run"}
    return {"id": name, "status": "holds" if holds else "fails", "asked": asked, "found": found}


def _judged(items: Sequence[Document] | None, name: str, asked: str, reason: str) -> list[dict[str, Any]]:
    """Return the judged items by id, with every field of the report's contract filled in."""
    if not items:
        empty = {"id": name, "verdict": "not-run", "asked": asked, "found": reason}
        return [{**empty, "would_change": "running this stage", "figures": {}}]
    judged = []
    for item in items:
        fields = plain(item)
        judged.append(
            {
                "id": fields.pop("id"),
                "verdict": str(fields.pop("verdict")).replace(" ", "-"),
                "asked": fields.pop("asked", ""),
                "found": fields.pop("found", ""),
                "would_change": fields.pop("would_change", ""),
                "figures": fields.pop("figures", {}),
                **fields,
            }
        )
    return sorted(judged, key=lambda item: (str(item.get("contract", "")), str(item["id"])))


def _gates(gates: Sequence[Document] | None) -> list[dict[str, Any]]:
    if not gates:
        return [{"id": "gates", "status": "not-run", "asked": "May it ship?", "found": "no gate was judged"}]
    judged = []
    for gate in gates:
        fields = plain(gate)
        status = fields.pop("status", None) or fields.get("verdict")
        judged.append({"id": fields.pop("id"), "status": status, **fields})
    return sorted(judged, key=lambda gate: (str(gate.get("contract", "")), str(gate["id"])))
