"""Every rule of the linter fires on a contract that breaks it, and on no other."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.contracts.examples import CONTRACT_YAML, coin_measurement, share, write_contract

from driftscope.contracts.discharge import discharge
from driftscope.contracts.lint import lint

CONTRACTS = Path(__file__).parents[2] / "contracts"


@pytest.fixture(autouse=True)
def _coin_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        __import__("driftscope.falsifiers.registry", fromlist=["MEASUREMENTS"]).MEASUREMENTS,
        "coin",
        "driftscope.falsifiers.chain",
    )


def write_evidence(results: Path, document: dict[str, Any] | None = None) -> Path:
    folder = results / "falsifiers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loaded-coin.measurement.json").write_text(
        json.dumps(coin_measurement() if document is None else document), encoding="utf-8"
    )
    return results


def rules(path: Path, results: Path | None = None) -> list[str]:
    return [finding.rule for finding in lint([path], results).findings]


def test_the_contracts_of_this_repository_have_no_findings() -> None:
    assert lint([CONTRACTS]).findings == []


def test_a_sound_contract_with_its_evidence_has_no_findings(tmp_path: Path) -> None:
    file = write_contract(tmp_path)
    done = lint([file], write_evidence(tmp_path / "results"))
    assert done.findings == []
    assert done.unchecked == [f"{file}: no git history to compare its version with"]


def test_what_needs_evidence_is_named_where_there_is_none(tmp_path: Path) -> None:
    file = write_contract(tmp_path)
    assert any("no results folder" in line for line in lint([file]).unchecked)
    assert any("has no evidence" in line for line in lint([file], tmp_path / "empty").unchecked)


def test_an_obligation_that_nothing_could_break(tmp_path: Path) -> None:
    text = CONTRACT_YAML.replace("  falsifiers: [loaded-coin]\n", "")
    (finding,) = lint([write_contract(tmp_path, text)]).findings
    assert (finding.rule, finding.line) == ("unbound-obligation", 10)


def test_a_falsifier_without_measurement(tmp_path: Path) -> None:
    text = CONTRACT_YAML.replace("name: coin", "name: dice")
    assert rules(write_contract(tmp_path, text)) == ["unbound-falsifier"]


def test_a_reference_to_a_file_that_is_not_there(tmp_path: Path) -> None:
    text = CONTRACT_YAML.replace("- Bernoulli", "- docs/coins.md after Bernoulli")
    file = write_contract(tmp_path, text)
    assert rules(file) == ["missing-reference"]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "coins.md").touch()
    assert rules(file) == []


@pytest.mark.parametrize(
    ("value", "answer"), [(0.9, "holds"), (0.1, "fails")], ids=["never-fails", "never-holds"]
)
def test_a_predicate_that_gives_one_answer(tmp_path: Path, value: float, answer: str) -> None:
    same = share(value)
    document = coin_measurement(same, same)
    document["domain"] = [same, same]
    document["controls"] = {"two-headed": same, "fair": same}
    results = write_evidence(tmp_path / "results", document)
    messages = [finding.message for finding in lint([write_contract(tmp_path)], results).findings]
    assert any(f"clause `share` {answer} wherever it is asked" in message for message in messages)


def test_a_clause_that_decides_nothing_beside_one_that_does(tmp_path: Path) -> None:
    text = CONTRACT_YAML.replace(
        "    clauses:\n", "    clauses:\n    - {id: never, metric: heads, comparator: '<=', threshold: 1}\n"
    )
    results = write_evidence(tmp_path / "results")
    (finding,) = lint([write_contract(tmp_path, text)], results).findings
    assert finding.rule == "constant-predicate"
    assert "clause `never` holds" in finding.message


@pytest.mark.parametrize(
    ("status", "document", "broken"),
    [
        ("active", {"status": "not-run", "reason": "no model"}, True),
        ("active", None, False),
        ("partial", {"status": "not-run", "reason": "no model"}, True),
        ("blocked", None, True),
        ("blocked", {"status": "not-run", "reason": "no model"}, False),
        ("proposed", {"status": "not-run", "reason": "no model"}, False),
    ],
)
def test_a_status_that_the_evidence_does_not_support(
    tmp_path: Path, status: str, document: dict[str, Any] | None, broken: bool
) -> None:
    file = write_contract(tmp_path, CONTRACT_YAML.replace("status: active", f"status: {status}"))
    found = rules(file, write_evidence(tmp_path / "results", document))
    assert found == (["unsupported-status"] if broken else [])


def test_discharged_needs_pinned_evidence(tmp_path: Path) -> None:
    file = write_contract(tmp_path, CONTRACT_YAML.replace("status: active", "status: discharged"))
    assert rules(file) == ["unsupported-status"]
    discharge(file, write_evidence(tmp_path / "results"))
    assert rules(file, tmp_path / "results") == []


def test_pinned_figures_and_verdicts_that_the_evidence_does_not_give(tmp_path: Path) -> None:
    file = write_contract(tmp_path)
    results = write_evidence(tmp_path / "results")
    discharge(file, results)
    write_evidence(results, coin_measurement(left=share(0.5, 0.45, 0.55)))
    messages = " ".join(finding.message for finding in lint([file], results).findings)
    assert "pinned as supported, the evidence gives regime-dependent" in messages
    assert "figure `left` is pinned as 0.8, found 0.5" in messages


def test_pinned_inputs_that_are_others_now(tmp_path: Path) -> None:
    file, header = write_contract(tmp_path), {"code": "c", "inputs": {"trace.parquet": "0" * 64}}
    results = write_evidence(tmp_path / "results", {**coin_measurement(), "evidence": header})
    discharge(file, results)
    assert rules(file, results) == []
    header["inputs"] = {"trace.parquet": "1" * 64}
    write_evidence(results, {**coin_measurement(), "evidence": header})
    assert rules(file, results) == ["pinned-evidence"]


def test_an_edit_after_pinning(tmp_path: Path) -> None:
    file = write_contract(tmp_path)
    discharge(file, write_evidence(tmp_path / "results"))
    file.write_text(file.read_text(encoding="utf-8").replace("threshold: 0.6", "threshold: 0.5"))
    assert rules(file) == ["stale-evidence"]


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("threshold: 0.6", "threshold: 0.5", "the judgement of `loaded-coin`"),
        ("throws: 100", "throws: 200", "the measurement of `loaded-coin`"),
        ("seeds: [1, 2]", "seeds: [1]", "the measurement of `loaded-coin`"),
    ],
)
def test_another_question_needs_another_version(tmp_path: Path, old: str, new: str, what: str) -> None:
    file = write_contract(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    assert rules(file) == []
    file.write_text(CONTRACT_YAML.replace(old, new), encoding="utf-8")
    (finding,) = lint([file]).findings
    assert (finding.rule, finding.line) == ("version", 2)
    assert finding.message.startswith(f"{what} differs from commit ")
    git(tmp_path, "commit", "-qam", "second")
    assert rules(file) == ["version"], "a commit does not make it right"
    file.write_text(CONTRACT_YAML.replace(old, new).replace("1.2.0", "1.3.0"), encoding="utf-8")
    assert rules(file) == []


def test_prose_may_change_under_one_version(tmp_path: Path) -> None:
    file = write_contract(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    file.write_text(CONTRACT_YAML.replace("why: four", "why: about four"), encoding="utf-8")
    assert rules(file) == []
