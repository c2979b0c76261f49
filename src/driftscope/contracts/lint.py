"""What is wrong with contracts beyond their form: claims that nothing backs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driftscope.contracts.discharge import pin, read_evidence
from driftscope.contracts.domain import constant_clauses
from driftscope.contracts.history import changes_without_version
from driftscope.contracts.judge import DECIDED, judge
from driftscope.contracts.loading import ContractFile, load_contracts
from driftscope.contracts.model import Falsifier, PinnedEvidence, judgement_sha256, measurement_sha256
from driftscope.contracts.strict_yaml import Location, load_yaml
from driftscope.errors import InputError

_PATH = re.compile(r"(?:config|contracts|docs|scripts|src|tests|workflow)/[\w./-]*\w")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        file: the contract file.
        line: line of the entry, from 1.
        rule: name of the rule that it breaks.
        message: what is wrong, in one line.
    """

    file: Path
    line: int
    rule: str
    message: str


@dataclass(frozen=True)
class Lint:
    """What linting found, and what it could not check."""

    findings: list[Finding]
    unchecked: list[str]


def lint(paths: Sequence[Path], results: Path | None = None) -> Lint:
    """Lint contracts, with the evidence of a results folder where there is one.

    Args:
        paths: contract files and folders.
        results: results folder of a case; None checks what needs no evidence and says what was left out.

    Raises:
        InputError: a file is no valid contract, or evidence is broken.
    """
    findings: list[Finding] = []
    unchecked: list[str] = []
    for item in load_contracts(paths):
        document = load_yaml(item.file)
        for rule, location, message in _problems(item, results, unchecked):
            findings.append(Finding(item.file, document.line(location), rule, message))
    return Lint(findings, unchecked)


Problem = tuple[str, Location, str]


def _problems(item: ContractFile, results: Path | None, unchecked: list[str]) -> Iterator[Problem]:
    yield from _bindings(item)
    yield from _references(item)
    changed = changes_without_version(item.file)
    if changed is None:
        unchecked.append(f"{item.file}: no git history to compare its version with")
    for what in changed or ():
        yield "version", ("version",), what
    yield from _pins(item)
    if results is None:
        unchecked.append(f"{item.file}: no results folder, so no predicate, status or figure was checked")
        return
    yield from _against_evidence(item, results, unchecked)


def _bindings(item: ContractFile) -> Iterator[Problem]:
    from driftscope.falsifiers.registry import measurement_module

    for index, obligation in enumerate(item.contract.obligations):
        if not obligation.falsifiers and not obligation.gates:
            message = f"obligation `{obligation.id}` has no falsifier and no gate that could show it broken"
            yield "unbound-obligation", ("obligations", index), message
    for index, falsifier in enumerate(item.contract.falsifiers):
        try:
            measurement_module(falsifier.measurement.name)
        except InputError as error:
            yield "unbound-falsifier", ("falsifiers", index, "measurement"), f"`{falsifier.id}`: {error}"


def _references(item: ContractFile) -> Iterator[Problem]:
    """Find references to files of this repository that are not there."""
    root = _root(item.file)
    for index, reference in enumerate(item.contract.references):
        for path in _PATH.findall(reference):
            # A path after another project's name ("llama.cpp tools/...") starts with none of ours.
            if not (root / path).exists():
                yield "missing-reference", ("references", index), f"{path} does not exist in {root}"


def _root(file: Path) -> Path:
    """Folder that references are relative to: the one that holds the folder ``contracts``."""
    for parent in file.resolve().parents:
        if parent.name == "contracts":
            return parent.parent
    return file.resolve().parent


def _pins(item: ContractFile) -> Iterator[Problem]:
    contract = item.contract
    for name, pinned in contract.evidence.items():
        falsifier = contract.falsifier(name)
        for what, then, now in (
            ("measurement", pinned.measurement_sha256, measurement_sha256(falsifier)),
            ("judgement", pinned.judgement_sha256, judgement_sha256(falsifier)),
        ):
            if then != now:
                message = f"`{name}`: its {what} was edited since its evidence was pinned"
                yield "stale-evidence", ("evidence", name), message
    if contract.status_history[-1].status == "discharged":
        for falsifier in contract.falsifiers:
            evidence = contract.evidence.get(falsifier.id)
            if evidence is None or evidence.verdict not in DECIDED:
                message = f"discharged, but no deciding evidence is pinned for `{falsifier.id}`"
                yield "unsupported-status", ("status_history",), message


def _against_evidence(item: ContractFile, results: Path, unchecked: list[str]) -> Iterator[Problem]:
    verdicts: dict[str, str] = {}
    for index, falsifier in enumerate(item.contract.falsifiers):
        where: Location = ("falsifiers", index)
        evidence = read_evidence(results, falsifier.id)
        if evidence is None:
            verdicts[falsifier.id] = "not-run"
            unchecked.append(f"{item.file}: `{falsifier.id}` has no evidence in {results}")
            continue
        try:
            document = judge(item.contract, falsifier, evidence)
        except InputError as error:
            yield "judgement", where, str(error)
            continue
        verdicts[falsifier.id] = document["verdict"]
        if document["verdict"] != "not-run":
            yield from _constant(falsifier, evidence, document, where)
        pinned = item.contract.evidence.get(falsifier.id)
        if pinned is not None:
            now = pin(item.contract, falsifier, evidence, document)
            for difference in _pin_differences(pinned, now):
                yield "pinned-evidence", ("evidence", falsifier.id), f"`{falsifier.id}`: {difference}"
    yield from _status(item, verdicts)


def _constant(falsifier: Falsifier, evidence: Any, document: Any, where: Location) -> Iterator[Problem]:
    if document["verdict"] == "vacuous":
        yield "constant-predicate", where, f"`{falsifier.id}`: {document['reason']}"
    for clause, state in constant_clauses(falsifier, evidence):
        message = f"`{falsifier.id}`: clause `{clause}` {state} wherever it is asked, so it decides nothing"
        yield "constant-predicate", (*where, "judgement", "clauses"), message


def _pin_differences(pinned: PinnedEvidence, now: PinnedEvidence) -> Iterator[str]:
    if pinned.verdict != now.verdict:
        yield f"pinned as {pinned.verdict}, the evidence gives {now.verdict}"
    for name in sorted({*pinned.figures, *now.figures}):
        if pinned.figures.get(name) != now.figures.get(name):
            yield f"figure `{name}` is pinned as {pinned.figures.get(name)}, found {now.figures.get(name)}"
    for name in sorted({*pinned.inputs, *now.inputs}):
        if pinned.inputs.get(name) != now.inputs.get(name):
            yield f"input {name} is not the pinned one"


def _status(item: ContractFile, verdicts: dict[str, str]) -> Iterator[Problem]:
    """Compare what the status claims with the verdicts that the evidence gives."""
    status = item.contract.status_history[-1].status
    undecided = [f"`{name}` is {verdict}" for name, verdict in verdicts.items() if verdict not in DECIDED]
    missing = [name for name, verdict in verdicts.items() if verdict == "not-run"]
    message = None
    if status in ("active", "discharged") and undecided:
        message = f"status {status}, but {', '.join(undecided)}"
    if status == "partial" and verdicts and len(undecided) == len(verdicts):
        message = "status partial, but no falsifier is decided"
    if status == "blocked" and verdicts and not missing:
        message = "status blocked, but every falsifier was measured"
    if message:
        yield "unsupported-status", ("status_history",), message
