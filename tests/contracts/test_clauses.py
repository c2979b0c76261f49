"""Each comparator on points, intervals and missing metrics."""

from __future__ import annotations

from typing import Any

import pytest

from driftscope.contracts.clauses import conjunction, evaluate
from driftscope.contracts.model import Clause


def _state(value: Any, comparator: str, **operand: Any) -> str:
    clause = Clause.model_validate({"id": "c", "metric": "x", "comparator": comparator, **operand})
    return str(evaluate(clause, {"x": value})["state"])


@pytest.mark.parametrize(
    ("comparator", "below", "at", "above"),
    [
        ("<", "holds", "fails", "fails"),
        ("<=", "holds", "holds", "fails"),
        (">", "fails", "fails", "holds"),
        (">=", "fails", "holds", "holds"),
        ("==", "fails", "holds", "fails"),
        ("!=", "holds", "fails", "holds"),
    ],
)
def test_a_point_against_a_threshold(comparator: str, below: str, at: str, above: str) -> None:
    assert [_state(value, comparator, threshold=2) for value in (1.0, 2.0, 3.0)] == [below, at, above]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1.1, 1.9, "holds"), (0.5, 0.9, "fails"), (2.1, 3.0, "fails"), (0.9, 1.1, "open"), (0.5, 3.0, "open")],
)
def test_an_interval_against_a_band(low: float, high: float, expected: str) -> None:
    assert _state({"value": (low + high) / 2, "low": low, "high": high}, "within", band=[1, 2]) == expected


@pytest.mark.parametrize(
    ("comparator", "threshold", "expected"),
    [("<", 1.0, "fails"), ("<", 2.0, "open"), ("<", 3.1, "holds"), (">", 0.9, "holds"), (">", 2.0, "open")],
)
def test_an_interval_that_straddles_is_open(comparator: str, threshold: float, expected: str) -> None:
    assert _state({"value": 2.0, "low": 1.0, "high": 3.0}, comparator, threshold=threshold) == expected


@pytest.mark.parametrize("value", [None, "text", float("nan"), True, {"low": 1}])
def test_what_is_not_a_number_is_missing_and_never_passes(value: Any) -> None:
    assert _state(value, "<", threshold=1e9) == "missing"


def test_a_refusal_and_an_empty_list() -> None:
    assert _state({"refused": True}, "refuses") == "holds"
    assert _state({"refused": False}, "refuses") == "fails"
    assert _state([], "empty") == "holds"
    assert _state(["x"], "empty") == "fails"
    assert _state(3, "empty") == "missing"


def test_a_bool_does_not_equal_a_number_and_text_is_compared_exactly() -> None:
    assert _state(True, "==", threshold=True) == "holds"
    assert _state(1, "==", threshold=True) == "fails"
    assert _state("0xc693a21e", "==", threshold="0xc693a21e") == "holds"


def test_a_clause_may_compare_two_metrics() -> None:
    clause = Clause(id="c", metric="a", comparator="==", threshold_metric="b")
    assert evaluate(clause, {"a": 3, "b": 3})["state"] == "holds"
    assert evaluate(clause, {"a": 3})["state"] == "missing"


def test_states_are_joined_by_and() -> None:
    assert conjunction(["holds", "open", "fails"]) == "fails"
    assert conjunction(["holds", "open", "missing"]) == "missing"
    assert conjunction(["holds", "open"]) == "open"
    assert conjunction(["holds"]) == "holds"
    assert conjunction([]) == "missing"
