"""Pin evidence into a contract: what its verdicts rest on, so that a later difference is seen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from driftscope.contracts.judge import DECIDED, judge
from driftscope.contracts.loading import load_contract
from driftscope.contracts.model import (
    Contract,
    Falsifier,
    PinnedEvidence,
    judgement_sha256,
    measurement_sha256,
)
from driftscope.errors import InputError
from driftscope.evidence.atomic import replacing


class NotDischargedError(Exception):
    """The evidence does not hold what a contract would pin."""


_BLOCK = re.compile(r"^evidence:.*?(?=^[^\s#]|\Z)", re.MULTILINE | re.DOTALL)


def read_evidence(results: Path, falsifier_id: str) -> dict[str, Any] | None:
    """The measurement of a falsifier in a results folder, or None where there is none.

    Raises:
        InputError: it is there and broken.
    """
    from driftscope.evidence.store import read_json

    file = results / "falsifiers" / f"{falsifier_id}.measurement.json"
    return read_json(file) if file.is_file() else None


def pin(
    contract: Contract, falsifier: Falsifier, evidence: Mapping[str, Any], document: Mapping[str, Any]
) -> PinnedEvidence:
    """What a verdict rests on.

    Args:
        contract: the contract of the falsifier.
        falsifier: the falsifier.
        evidence: its measurement.
        document: its verdict, from `driftscope.contracts.judge.judge`.
    """
    header = evidence.get("evidence")
    header = header if isinstance(header, Mapping) else {}
    return PinnedEvidence(
        verdict=document["verdict"],
        measurement_sha256=measurement_sha256(falsifier),
        judgement_sha256=judgement_sha256(falsifier),
        inputs=dict(sorted(dict(header.get("inputs") or {}).items())),
        code=str(header.get("code") or ""),
        figures=dict(document["figures"]),
    )


def discharge(path: Path, results: Path) -> dict[str, PinnedEvidence]:
    """Write the evidence block of a contract file from a results folder.

    Args:
        path: the contract file; only its block ``evidence`` changes.
        results: results folder of a case.

    Returns:
        The pinned evidence of each falsifier.

    Raises:
        NotDischargedError: a verdict is not there, is not decided, or was made under another contract.
        InputError: a file is broken or cannot be written.
    """
    contract = load_contract(path)
    if not contract.falsifiers:
        raise InputError(f"{path}: has no falsifier, so there is no evidence to pin")
    pinned: dict[str, PinnedEvidence] = {}
    for falsifier in contract.falsifiers:
        evidence = read_evidence(results, falsifier.id)
        if evidence is None:
            raise NotDischargedError(f"{path}: falsifier `{falsifier.id}` was not measured in {results}")
        document = judge(contract, falsifier, evidence)
        if document["verdict"] not in DECIDED:
            raise NotDischargedError(
                f"{path}: falsifier `{falsifier.id}` is {document['verdict']}: {document['reason']}"
            )
        pinned[falsifier.id] = pin(contract, falsifier, evidence, document)
    text = path.read_text(encoding="utf-8")
    block = {"evidence": {name: item.model_dump(mode="json") for name, item in pinned.items()}}
    kept = _BLOCK.sub("", text).rstrip("\n")
    written = yaml.safe_dump(block, sort_keys=False, width=100, allow_unicode=True)
    with replacing(path) as partial:
        partial.write_text(f"{kept}\n{written}", encoding="utf-8")
        load_contract(partial)
    return pinned
