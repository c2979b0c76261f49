"""Ship gates: clauses over evidence documents. What was not compared does not pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driftscope.contracts.clauses import conjunction, evaluate
from driftscope.contracts.metrics import MissingMetricError, fill, split_path
from driftscope.contracts.model import Contract, Gate, gate_sha256
from driftscope.errors import InputError


def judge_gates(contract: Contract, documents: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Judge every gate of a contract, in the contract's order.

    Args:
        contract: holds the gates.
        documents: evidence documents by name; the first step of a metric path picks one. A document that
            is absent, null, or says `status: not-run` makes the gates that read it `not-run`.

    Returns:
        `{id, contract, version, clause, status, asked, found, would_change, clauses}` each, with the status
        `holds`, `fails`, `inconclusive` (a metric is missing, or an interval straddles its threshold) or
        `not-run`.

    Raises:
        InputError: a template is malformed.
    """
    return [_judge_gate(contract, gate, documents) for gate in contract.gates]


def _judge_gate(contract: Contract, gate: Gate, documents: Mapping[str, Any]) -> dict[str, Any]:
    results = [evaluate(clause, documents) for clause in gate.clauses]
    absent = {
        name: reason
        for clause in gate.clauses
        for name in (str(split_path(clause.metric)[0]),)
        if (reason := _absent(documents.get(name))) is not None
    }
    state = conjunction([result["state"] for result in results])
    status = {"holds": "holds", "fails": "fails"}.get(state, "inconclusive")
    if absent:
        status = "not-run"
        found = "; ".join(f"{name} was not measured: {reason}" for name, reason in sorted(absent.items()))
    elif missing := [result["missing"] for result in results if "missing" in result]:
        found = f"{', '.join(sorted(set(missing)))} is not in the evidence"
    else:
        found = _found(gate, state, results, documents)
    return {
        "id": gate.id,
        "contract": contract.id,
        "version": contract.version,
        "clause": gate_sha256(gate),
        "status": status,
        "asked": gate.asked,
        "found": found,
        "would_change": gate.would_change,
        "clauses": results,
    }


def _absent(document: Any) -> str | None:
    """Say why a document holds no evidence, or None where it does."""
    if document is None:
        return "there is no such document"
    if isinstance(document, Mapping) and document.get("status") == "not-run":
        return str(document.get("reason", "not run"))
    if not document:
        return "the document is empty"
    return None


def _found(gate: Gate, state: str, results: list[dict[str, Any]], documents: Mapping[str, Any]) -> str:
    """Fill the gate's sentence; a gate that does not hold may lack what the sentence names."""
    try:
        return fill(gate.found, documents)
    except MissingMetricError as error:
        if state == "holds":
            raise InputError(
                f"gate {gate.id}: found names `{error.path}`, which the evidence lacks"
            ) from error
        return "; ".join(
            f"{item['metric']} is {item['found']}" for item in results if item["state"] != "holds"
        )
    except ValueError as error:
        raise InputError(f"gate {gate.id}: found: {error}") from error
