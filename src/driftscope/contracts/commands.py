"""What the command line and the workflow call: validate, status, measure, judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from driftscope.contracts.judge import judge as judge_falsifier
from driftscope.contracts.loading import load_contract, load_contracts
from driftscope.contracts.model import Contract, Falsifier, judgement_sha256, measurement_sha256
from driftscope.errors import InputError


def validate(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Load every contract and check that its measurements are registered.

    Returns:
        `{file, id, version, falsifiers, gates}` of each contract.

    Raises:
        InputError: the first thing that is wrong, with file and line.
    """
    from driftscope.falsifiers.registry import measurement_module

    rows = []
    for file, contract in ((item.file, item.contract) for item in load_contracts(paths)):
        for falsifier in contract.falsifiers:
            try:
                measurement_module(falsifier.measurement.name)
            except InputError as error:
                raise InputError(f"{file}: falsifier `{falsifier.id}`: {error}") from error
        rows.append(
            {
                "file": str(file),
                "id": contract.id,
                "version": contract.version,
                "falsifiers": [falsifier.id for falsifier in contract.falsifiers],
                "gates": [gate.id for gate in contract.gates],
            }
        )
    return rows


def status(paths: Sequence[Path], results: Path) -> list[dict[str, Any]]:
    """Say of each falsifier what its verdict in a results folder is, and whether it is up to date.

    Returns:
        `{contract, version, status, falsifier, verdict, state}` of each falsifier; `state` is
        `current`, `stale` (the contract was edited since) or `not-run`.
    """
    from driftscope.evidence.store import read_json

    rows = []
    for contract in (item.contract for item in load_contracts(paths)):
        for falsifier in contract.falsifiers:
            file = results / "falsifiers" / f"{falsifier.id}.verdict.json"
            document = read_json(file) if file.is_file() else {}
            current = (
                document.get("clause") == judgement_sha256(falsifier)
                and document.get("measurement") == measurement_sha256(falsifier)
                and document.get("version") == contract.version
            )
            rows.append(
                {
                    "contract": contract.id,
                    "version": contract.version,
                    "status": contract.status_history[-1].status,
                    "falsifier": falsifier.id,
                    "verdict": document.get("verdict", "not-run"),
                    "state": "not-run" if not document else "current" if current else "stale",
                }
            )
    return rows


def inputs_of(contract_path: Path, falsifier_id: str) -> list[str]:
    """Return the evidence files that a falsifier's measurement reads, relative to the results folder."""
    return measurement_inputs(find(contract_path, falsifier_id)[1])


def measurement_inputs(falsifier: Falsifier) -> list[str]:
    """Return the evidence files that a loaded falsifier's measurement reads; see `inputs_of`."""
    from driftscope.falsifiers.registry import measurement_module

    return measurement_module(falsifier.measurement.name).inputs(falsifier.measurement.parameters)


def measure(contract_path: Path, falsifier_id: str, results: Path, device: str = "cpu") -> dict[str, Any]:
    """Measure one falsifier on the evidence of a results folder.

    Args:
        contract_path: the contract file.
        falsifier_id: one of its falsifiers.
        results: the results folder.
        device: ``cpu`` or ``cuda``; see `driftscope.falsifiers.registry.ON_DEVICE`.

    Returns:
        What its measurement gives, with `falsifier`, `name` and `measurement` (the digest of what was
        asked to be measured). The judgement is not read.

    Raises:
        InputError: no such falsifier or measurement, a bad parameter, or broken evidence.
    """
    from driftscope.evidence.store import first_non_finite
    from driftscope.falsifiers.reader import FolderReader
    from driftscope.falsifiers.registry import measurement_module

    _, falsifier = find(contract_path, falsifier_id)
    asked = falsifier.measurement
    try:
        document = measurement_module(asked.name).measure(
            asked.parameters, asked.regimes, asked.seeds, FolderReader(results, device)
        )
    except InputError as error:
        raise InputError(f"falsifier {falsifier_id}: {error}") from error
    if where := first_non_finite(document):
        # The evidence holds a NaN or an infinity, and it reached a figure. The case still gets its report.
        reason = f"{where.removeprefix('$.')} is not a finite number on this evidence"
        document = {"status": "not-run", "reason": reason}
    return {
        "falsifier": falsifier.id,
        "name": asked.name,
        "measurement": measurement_sha256(falsifier),
        **document,
    }


def judge(contract_path: Path, falsifier_id: str, measurement: Mapping[str, Any] | None) -> dict[str, Any]:
    """Judge one falsifier by its measurement; nothing is measured.

    Raises:
        InputError: no such falsifier, a template that the measurement cannot fill, or a measurement made
            with other parameters.
    """
    contract, falsifier = find(contract_path, falsifier_id)
    return judge_falsifier(contract, falsifier, measurement)


def find(contract_path: Path, falsifier_id: str) -> tuple[Contract, Falsifier]:
    """Return a contract and one of its falsifiers.

    Raises:
        InputError: the contract is not valid, or has no such falsifier.
    """
    contract = load_contract(contract_path)
    try:
        return contract, contract.falsifier(falsifier_id)
    except KeyError as error:
        known = ", ".join(falsifier.id for falsifier in contract.falsifiers) or "none"
        raise InputError(f"{contract_path}: has no falsifier `{falsifier_id}`; it has {known}") from error
