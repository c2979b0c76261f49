"""Ship gates over evidence documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.contracts.examples import coin_contract

from driftscope.contracts.gates import judge_gates
from driftscope.contracts.model import Contract
from driftscope.errors import InputError

GATES = """\
id: gates
version: 1.0.0
title: Gates
references: [none]
obligations:
- {id: covered, statement: everything is compared, gates: [coverage, impact]}
gates:
- id: coverage
  asked: Is every tensor compared?
  found: "{weights.coverage.compared} of {weights.coverage.expected} compared"
  clauses:
  - {id: some, metric: weights.coverage.compared, comparator: ">", threshold: 0}
  - {id: all, metric: weights.coverage.compared, comparator: ==, threshold_metric: weights.coverage.expected}
- id: impact
  asked: Is the divergence small?
  found: "{impact.pairs[pair=a|b].kl:.2f} nats"
  clauses:
  - {id: kl, metric: "impact.pairs[pair=a|b].kl", comparator: <=, threshold: 0.1}
status_history:
- {version: 1.0.0, status: active}
"""


@pytest.fixture
def contract(tmp_path: Path) -> Contract:
    return coin_contract(tmp_path, GATES)


def _documents(compared: int = 3, kl: float = 0.05) -> dict[str, Any]:
    pair = {"pair": "a|b", "kl": kl, "kl_low": kl - 0.01, "kl_high": kl + 0.01}
    return {"weights": {"coverage": {"compared": compared, "expected": 3}}, "impact": {"pairs": [pair]}}


def _statuses(contract: Contract, documents: dict[str, Any]) -> list[str]:
    return [gate["status"] for gate in judge_gates(contract, documents)]


def test_gates_hold_fail_or_stay_open(contract: Contract) -> None:
    assert _statuses(contract, _documents()) == ["holds", "holds"]
    assert _statuses(contract, _documents(compared=2, kl=0.3)) == ["fails", "fails"]
    assert _statuses(contract, _documents(kl=0.1)) == ["holds", "inconclusive"]


def test_nothing_compared_fails_even_where_nothing_was_expected(contract: Contract) -> None:
    documents = _documents()
    documents["weights"]["coverage"] = {"compared": 0, "expected": 0}
    assert _statuses(contract, documents)[0] == "fails"


@pytest.mark.parametrize("absent", [None, {}, {"status": "not-run", "reason": "no sweep"}])
def test_a_document_that_is_not_there_is_not_run(contract: Contract, absent: Any) -> None:
    documents = {**_documents(), "weights": absent}
    gate = judge_gates(contract, documents)[0]
    assert gate["status"] == "not-run"
    assert "weights was not measured" in gate["found"]


def test_a_missing_metric_is_inconclusive_and_named(contract: Contract) -> None:
    documents = _documents()
    documents["impact"]["pairs"][0]["pair"] = "a|c"
    gate = judge_gates(contract, documents)[1]
    assert gate["status"] == "inconclusive"
    assert "impact.pairs[pair=a|b].kl is not in the evidence" in gate["found"]


def test_the_finding_carries_the_figures(contract: Contract) -> None:
    assert judge_gates(contract, _documents())[0]["found"] == "3 of 3 compared"


def test_a_malformed_template_is_an_error(tmp_path: Path) -> None:
    broken = coin_contract(tmp_path, GATES.replace("{weights.coverage.compared} of", "{weights.cover} of"))
    with pytest.raises(InputError, match="gate coverage"):
        judge_gates(broken, _documents())


def test_a_gate_that_fails_may_lack_what_its_sentence_names(tmp_path: Path) -> None:
    text = GATES.replace("{weights.coverage.compared} of", "{weights.share:.0%} of")
    gate = judge_gates(coin_contract(tmp_path, text), _documents(compared=2))[0]
    assert gate["status"] == "fails"
    assert gate["found"] == "weights.coverage.compared is 2"


def test_the_registered_ship_gates_hold_on_a_sound_report_and_fail_on_a_broken_one() -> None:
    from driftscope.contracts.loading import load_contract

    gates = load_contract(Path(__file__).parents[2] / "contracts" / "ship-gates.yaml")
    relations = {
        "identical": 3,
        "quantized-from": 7,
        "different": 0,
        "transformed": 0,
        "non-finite": 0,
        "unclassified": 0,
    }
    pair = {
        "pair": "teacher.f32|candidate.int8-dot",
        "positions": 240,
        "mean_kl": 0.05,
        "mean_kl_low": 0.04,
        "mean_kl_high": 0.06,
        "same_top1": 0.9,
        "same_top1_low": 0.87,
        "same_top1_high": 0.93,
    }
    report: dict[str, Any] = {
        "admissibility": {"status": "admissible", "checks": []},
        "weights": {
            "status": "done",
            "coverage": {"expected": 10, "compared": 10},
            "tensors": 10,
            "relations": relations,
            "corrupt_tensors": 0,
            "missing": [],
            "extra": [],
        },
        "decomposition": {
            "status": "done",
            "controls": {"no_op_energy": 0.0, "all_promoted_share": 1.0, "all_promoted_exact": True},
        },
        "impact": {"status": "done", "pairs": [pair]},
    }
    assert set(_statuses(gates, report)) == {"holds"}
    report["weights"]["corrupt_tensors"] = 1
    assert list(_statuses(gates, report)).count("fails") == 1
    report["admissibility"]["status"] = "inadmissible"
    report["weights"]["missing"] = ["lm_head.weight"]
    relations["different"] = 1
    report["decomposition"]["controls"] |= {"all_promoted_share": None, "all_promoted_exact": False}
    pair |= {"mean_kl_low": 0.2, "mean_kl_high": 0.3, "same_top1_low": 0.5, "same_top1_high": 0.6}
    assert set(_statuses(gates, report)) == {"fails"}
    assert set(_statuses(gates, {})) == {"not-run"}
