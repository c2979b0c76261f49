"""Budgets: the median with its interval, and files that must not pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, verdict
from tests.falsifiers.small_case import SmallCase

from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers import budget as module
from driftscope.falsifiers.reader import FolderReader

FILES = {"steps-25": "logs/short.jsonl", "steps-100": "logs/long.jsonl"}


def measured(evidence: Any = NOWHERE, **changes: Any) -> dict[str, Any]:
    asked = load_contract(CONTRACTS / "budget.yaml").falsifier("budget-wall").measurement
    parameters = {**asked.parameters, "resamples": 200, **changes}
    return module.measure(parameters, asked.regimes, [1, 2], evidence)


def lines(*values: Any) -> str:
    return "".join(json.dumps({"wall_ms": value}) + "\n" for value in values)


def judged(short: str, long: str = lines(*range(1, 101))) -> dict[str, Any]:
    case = SmallCase({}, {}, {FILES["steps-25"]: short, FILES["steps-100"]: long})
    return verdict("budget", "budget-wall", measured(case, files=FILES))


def test_the_published_medians_come_out_of_the_stand_ins() -> None:
    measurement = measured()
    medians = {name: regime["median"]["value"] for name, regime in measurement["regimes"].items()}
    assert {name: f"{value:.2f}" for name, value in medians.items()} == {
        "steps-25": "101.30",
        "steps-100": "264.74",
    }
    assert all(regime["stand_in"] for regime in measurement["regimes"].values())
    document = verdict("budget", "budget-wall", measurement)
    assert document["verdict"] == "supported"
    assert "stand-ins" in document["found"]
    assert all(control["as_required"] for control in document["controls"].values())


def test_a_bare_median_is_under_the_true_one_half_of_the_time() -> None:
    null = measured()["null"]
    for shape in null.values():
        assert shape["median_under"] == pytest.approx(0.5, abs=0.1)
        assert shape["interval_under"] <= 0.06


@pytest.mark.parametrize(
    ("short", "expected"),
    [
        pytest.param(lines(*[100.0] * 25), "supported", id="fast"),
        pytest.param(lines(*[900.0] * 25), "regime-dependent", id="slow"),
        pytest.param(lines(*[100.0] * 12, *[900.0] * 13), "regime-dependent", id="just over half are slow"),
        pytest.param(lines(*[100.0] * 14, *[900.0] * 11), "regime-dependent", id="too near to tell"),
        pytest.param("", "inadmissible", id="empty"),
        pytest.param("\n  \n", "inadmissible", id="blank"),
        pytest.param(lines(100.0) + '{"other": 1}\n', "inadmissible", id="no field"),
        pytest.param(lines(100.0) + '{"wall_ms": NaN}\n', "inadmissible", id="NaN"),
        pytest.param(lines(100.0) + '{"wall_ms": -Infinity}\n', "inadmissible", id="infinite"),
        pytest.param(lines(100.0) + '{"wall_ms": 1e999}\n', "inadmissible", id="overflow"),
        pytest.param(lines(100.0) + f'{{"wall_ms": 1{"0" * 400}}}\n', "inadmissible", id="huge integer"),
        pytest.param(lines(100.0, "100"), "inadmissible", id="text"),
        pytest.param(lines(100.0, None), "inadmissible", id="null"),
        pytest.param(lines(100.0, True), "inadmissible", id="boolean"),
        pytest.param(lines(100.0) + "[1]\n", "inadmissible", id="no object"),
        pytest.param(lines(100.0) + '{"wall_ms": 10', "inadmissible", id="cut off"),
        pytest.param(lines(100.0) + "[" * 100_000, "inadmissible", id="deep"),
    ],
)
def test_files_and_their_verdicts(short: str, expected: str) -> None:
    document = judged(short)
    if expected == "regime-dependent":
        # Undecided in one regime and passed in the other is no pass either.
        assert document["verdict"] in ("regime-dependent", "inconclusive")
    else:
        assert document["verdict"] == expected


def test_slow_steps_in_both_files_are_falsified() -> None:
    assert judged(lines(*[900.0] * 25), lines(*[700.0] * 100))["verdict"] == "falsified"


def test_a_median_that_leaves_out_slow_steps_changes_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest in the place of the median: the timeouts go unseen."""
    monkeypatch.setattr(module, "_median", lambda sample: sample.min(axis=1))
    assert verdict("budget", "budget-wall", measured())["verdict"] == "inconclusive"


def test_problems_are_named_with_their_line() -> None:
    values, problems, count = module.read_field(lines(1.0) + "\n[]\n" + lines(float("nan"), 2), "wall_ms")
    assert (values, count) == ([1.0, 2.0], 4)
    assert problems == [{"line": 3, "what": "no JSON object"}, {"line": 4, "what": "wall_ms is not finite"}]


def test_the_interval_is_the_bootstrap_of_the_median() -> None:
    values = np.arange(1.0, 102.0)
    metrics = module._metrics(module.as_lines("x", values), "x", module.Resampling(2000, 0.95))
    assert metrics["median"]["value"] == 51.0
    # Order statistics around the binomial quantiles of 101 draws: 41 and 61.
    assert metrics["median"]["low"] == pytest.approx(41.0, abs=2.0)
    assert metrics["median"]["high"] == pytest.approx(61.0, abs=2.0)


def test_files_are_read_from_the_results_folder(tmp_path: Path) -> None:
    assert module.inputs({"files": FILES}) == ["logs/long.jsonl", "logs/short.jsonl"]
    assert module.inputs({"files": {}}) == []
    document = verdict("budget", "budget-wall", measured(FolderReader(tmp_path), files=FILES))
    assert document["verdict"] == "not-run"
    (tmp_path / "logs").mkdir()
    for name in FILES.values():
        (tmp_path / name).write_text(lines(*[10.0] * 30))
    found = measured(FolderReader(tmp_path), files=FILES)
    assert found["regimes"]["steps-25"] == {
        "lines": 30,
        "problems": [],
        "median": {"value": 10.0, "low": 10.0, "high": 10.0},
        "largest": 10.0,
        "stand_in": False,
    }
    (tmp_path / FILES["steps-25"]).write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="not readable UTF-8"):
        measured(FolderReader(tmp_path), files=FILES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"field": 3}, "`field`"),
        ({"files": []}, "`files`"),
        ({"files": {"steps-25": "/etc/hosts"}}, "path in the results folder"),
        ({"files": {"steps-25": "a/../../b"}}, "path in the results folder"),
        ({"confidence": 0.0}, "`confidence`"),
    ],
)
def test_a_bad_parameter_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measured(**changes)


def test_a_file_of_no_regime_is_named() -> None:
    with pytest.raises(InputError, match="'other', which is no regime"):
        measured(SmallCase({}, {}, {"x": ""}), files={"other": "x"})


def test_the_same_arguments_give_the_same_bytes() -> None:
    assert json.dumps(measured(), allow_nan=False) == json.dumps(measured())
