"""An entry in plain words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.contracts.examples import coin_measurement, write_contract

from driftscope.contracts.explain import explain
from driftscope.errors import InputError

CONTRACTS = Path(__file__).parents[2] / "contracts"


def test_a_falsifier_says_what_it_asks_and_when_it_holds(tmp_path: Path) -> None:
    found = explain([write_contract(tmp_path)], "loaded-coin")
    assert found["kind"] == "falsifier"
    assert found["holds if"] == ["in every regime, heads > 0.6 (four standard deviations of 100 fair throws)"]
    assert found["controls"]["fair"] == "negative: a fair coin"
    assert found["serves"] == ["the coin shows both sides alike"]
    assert "verdict" not in found


def test_with_evidence_it_says_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "falsifiers").mkdir()
    file = tmp_path / "falsifiers" / "loaded-coin.measurement.json"
    file.write_text(json.dumps(coin_measurement()), encoding="utf-8")
    found = explain([write_contract(tmp_path)], "loaded-coin", tmp_path)
    assert (found["verdict"], found["found"]) == (
        "supported",
        "It shows heads in 80% (left) and 70% (right).",
    )
    file.unlink()
    assert explain([tmp_path / "coin.yaml"], "loaded-coin", tmp_path)["verdict"] == "not-run"


def test_gates_and_contracts_are_explained() -> None:
    assert explain([CONTRACTS], "kl-mean")["kind"] == "gate"
    assert "chain-superlinear" in explain([CONTRACTS], "chain")["falsifiers"]


def test_an_unknown_id_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean `kl-mean`"):
        explain([CONTRACTS], "kl-mena")
