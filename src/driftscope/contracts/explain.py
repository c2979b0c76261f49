"""One entry of the contracts in plain words."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from driftscope.contracts.discharge import read_evidence
from driftscope.contracts.judge import judge
from driftscope.contracts.loading import ContractFile, load_contracts
from driftscope.contracts.model import Clause, Falsifier, Gate
from driftscope.errors import InputError


def explain(paths: Sequence[Path], entry: str, results: Path | None = None) -> dict[str, Any]:
    """Gather what is registered under an id, with its verdict where there is evidence.

    Args:
        paths: contract files and folders.
        entry: id of a contract, a falsifier or a gate.
        results: results folder of a case, or None.

    Returns:
        ``kind`` (``contract``, ``falsifier`` or ``gate``), ``id``, ``contract``, ``file`` and the entry's
        own keys; a falsifier with evidence has ``verdict``, ``found`` and ``would_change`` too.

    Raises:
        InputError: no such id; with the nearest known one.
    """
    items = load_contracts(paths)
    known: dict[str, dict[str, Any]] = {}
    for item in items:
        known[item.contract.id] = _contract(item)
    for item in items:
        known |= {falsifier.id: _falsifier(item, falsifier) for falsifier in item.contract.falsifiers}
        known |= {gate.id: _gate(item, gate) for gate in item.contract.gates}
    if entry not in known:
        near = difflib.get_close_matches(entry, known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise InputError(f"no contract, falsifier or gate has the id `{entry}`{hint}")
    found = known[entry]
    if results is not None and found["kind"] == "falsifier":
        contract = next(item.contract for item in items if item.contract.id == found["contract"])
        document = judge(contract, contract.falsifier(entry), read_evidence(results, entry))
        found |= {key: document[key] for key in ("verdict", "reason", "found", "would_change")}
    return found


def _contract(item: ContractFile) -> dict[str, Any]:
    contract = item.contract
    return {
        "kind": "contract",
        "id": contract.id,
        "contract": contract.id,
        "file": str(item.file),
        "version": contract.version,
        "title": contract.title,
        "status": contract.status_history[-1].status,
        "obligations": {obligation.id: obligation.statement for obligation in contract.obligations},
        "falsifiers": {falsifier.id: falsifier.hypothesis for falsifier in contract.falsifiers},
        "gates": {gate.id: gate.asked for gate in contract.gates},
        "references": list(contract.references),
    }


def _falsifier(item: ContractFile, falsifier: Falsifier) -> dict[str, Any]:
    measurement, contract = falsifier.measurement, item.contract
    return {
        "kind": "falsifier",
        "id": falsifier.id,
        "contract": contract.id,
        "file": str(item.file),
        "version": contract.version,
        "hypothesis": falsifier.hypothesis,
        "prediction": falsifier.prediction,
        "holds if": [_sentence(clause) for clause in falsifier.judgement.clauses],
        "admitted if": [_sentence(clause) for clause in falsifier.judgement.admits],
        "measurement": measurement.name,
        "parameters": dict(measurement.parameters),
        "regimes": {name: dict(values) for name, values in measurement.regimes.items()},
        "seeds": len(measurement.seeds),
        "controls": {control.id: f"{control.kind}: {control.what}" for control in falsifier.controls},
        "serves": [
            obligation.statement
            for obligation in contract.obligations
            if falsifier.id in obligation.falsifiers
        ],
        "equations": {equation.id: equation.formula for equation in contract.equations},
        "references": list(contract.references),
    }


def _gate(item: ContractFile, gate: Gate) -> dict[str, Any]:
    return {
        "kind": "gate",
        "id": gate.id,
        "contract": item.contract.id,
        "file": str(item.file),
        "version": item.contract.version,
        "asked": gate.asked,
        "holds if": [_sentence(clause) for clause in gate.clauses],
        "would_change": gate.would_change,
    }


def _sentence(clause: Clause) -> str:
    if clause.comparator == "within":
        operand = f"within {clause.band[0]} and {clause.band[1]}" if clause.band else "within"
    elif clause.comparator in ("refuses", "empty"):
        operand = "was refused" if clause.comparator == "refuses" else "is empty"
    else:
        wanted = clause.threshold if clause.threshold_metric is None else clause.threshold_metric
        operand = f"{clause.comparator} {wanted}"
    where = "in every regime, " if clause.scope == "regime" else ""
    return f"{where}{clause.metric} {operand}" + (f" ({clause.why})" if clause.why else "")
