"""What the command line and the workflow call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.contracts.examples import write_contract

from driftscope.contracts.commands import find, inputs_of, judge, measure, status, validate
from driftscope.contracts.model import measurement_sha256
from driftscope.errors import InputError

CONTRACTS = Path(__file__).parents[2] / "contracts"


def test_the_registered_contracts_are_valid() -> None:
    rows = validate([CONTRACTS])
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    ids = [falsifier for row in rows for falsifier in row["falsifiers"]]
    assert {"token-scope", "one-block-excess", "one-block-representative", "chain-superlinear"} <= set(ids)


def test_an_unregistered_measurement_is_refused(tmp_path: Path) -> None:
    write_contract(tmp_path)
    with pytest.raises(InputError, match=r"coin\.yaml: falsifier `loaded-coin`: measurement `coin`"):
        validate([tmp_path])


def test_measure_then_judge_and_the_status_of_both(tmp_path: Path) -> None:
    contract = CONTRACTS / "one-block.yaml"
    measurement = measure(contract, "one-block-excess", tmp_path)
    _, falsifier = find(contract, "one-block-excess")
    assert measurement["measurement"] == measurement_sha256(falsifier)
    document = judge(contract, "one-block-excess", json.loads(json.dumps(measurement)))
    assert document["verdict"] == "falsified"
    folder = tmp_path / "falsifiers"
    folder.mkdir()
    file = folder / "one-block-excess.verdict.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    rows = {row["falsifier"]: row for row in status([contract], tmp_path)}
    assert (rows["one-block-excess"]["verdict"], rows["one-block-excess"]["state"]) == (
        "falsified",
        "current",
    )
    assert rows["one-block-representative"]["state"] == "not-run"
    file.write_text(json.dumps({**document, "clause": "0" * 64}), encoding="utf-8")
    assert status([contract], tmp_path)[0]["state"] == "stale"


def test_inputs_are_named_relative_to_the_results() -> None:
    assert inputs_of(CONTRACTS / "token-scope.yaml", "token-scope") == ["trace/teacher.f32.parquet"]
    assert inputs_of(CONTRACTS / "chain.yaml", "chain-superlinear") == []


def test_an_unknown_falsifier_is_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match="has no falsifier `x`; it has chain-superlinear"):
        find(CONTRACTS / "chain.yaml", "x")


def test_a_broken_trace_is_one_input_error(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "teacher.f32.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"falsifier token-scope: .*teacher\.f32\.parquet"):
        measure(CONTRACTS / "token-scope.yaml", "token-scope", tmp_path)


def test_a_figure_that_is_not_finite_leaves_the_question_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from driftscope.falsifiers import chain

    contract = CONTRACTS / "chain.yaml"
    broken = {"samples": 1, "regimes": {"a": {"exponent": float("nan")}}}
    monkeypatch.setattr(chain, "measure", lambda *arguments: broken)
    document = measure(contract, "chain-superlinear", tmp_path)
    assert document["status"] == "not-run"
    assert document["reason"] == "regimes.a.exponent is not a finite number on this evidence"
    assert judge(contract, "chain-superlinear", document)["verdict"] == "not-run"
