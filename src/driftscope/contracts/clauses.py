"""Comparisons: a clause against a document. Nothing is computed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from driftscope.contracts.metrics import Metric, MissingMetricError, resolve, resolve_all
from driftscope.contracts.model import Clause

State = Literal["holds", "fails", "open", "missing"]


def evaluate(clause: Clause, document: Any) -> dict[str, Any]:
    """Compare the metrics that a clause names with its threshold.

    Returns:
        `{id, metric, comparator, threshold|band, state, found, low, high}`; `found` is null where the
        metric is missing. A path with `*` holds if every member does, and fails if one fails.
    """
    result: dict[str, Any] = {"id": clause.id, "metric": clause.metric, "comparator": clause.comparator}
    if clause.band is not None:
        result["band"] = list(clause.band)
    try:
        metrics = resolve_all(document, clause.metric)
        threshold: Any = clause.threshold
        if clause.threshold_metric is not None:
            threshold = resolve(document, clause.threshold_metric).value
        if clause.comparator not in ("within", "refuses", "empty"):
            result["threshold"] = threshold
        states = [compare(metric, clause, threshold) for metric in metrics]
    except MissingMetricError as error:
        return {**result, "state": "missing", "missing": error.path, "found": None}
    state = conjunction(states)
    shown = metrics[states.index(state)]
    result |= {"state": state, "found": _shown(shown.value)}
    if shown.low is not shown.value or shown.high is not shown.value:
        result |= {"low": shown.low, "high": shown.high}
    return result


def conjunction(states: Sequence[State]) -> State:
    """Join states by `and`: one that fails decides, then a missing one, then an open one."""
    for state in ("fails", "missing", "open"):
        if state in states:
            return state
    return "holds" if states else "missing"


def compare(metric: Metric, clause: Clause, threshold: Any) -> State:
    """Compare one metric, with its interval, with a clause's threshold or band."""
    comparator = clause.comparator
    if comparator == "refuses":
        return _as_state(_refused(metric.value))
    if comparator == "empty":
        if not hasattr(metric.value, "__len__"):
            return "missing"
        return _as_state(len(metric.value) == 0)
    if comparator in ("==", "!="):
        same = type(metric.value) is type(threshold) or _both_numbers(metric.value, threshold)
        equal = same and metric.value == threshold
        return _as_state(equal == (comparator == "=="))
    if not all(_is_number(value) for value in (metric.value, metric.low, metric.high)):
        return "missing"
    if comparator == "within":
        assert clause.band is not None  # the model demands it
        lower, upper = clause.band
        if metric.low >= lower and metric.high <= upper:
            return "holds"
        return "fails" if metric.high < lower or metric.low > upper else "open"
    if not _is_number(threshold):
        return "missing"
    ends = {
        "<": (metric.high < threshold, metric.low < threshold),
        "<=": (metric.high <= threshold, metric.low <= threshold),
        ">": (metric.low > threshold, metric.high > threshold),
        ">=": (metric.low >= threshold, metric.high >= threshold),
    }[comparator]
    return "holds" if ends[0] else "open" if ends[1] else "fails"


def _refused(value: Any) -> bool:
    return value is True or (isinstance(value, dict) and value.get("refused") is True)


def _as_state(holds: bool) -> State:
    return "holds" if holds else "fails"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _both_numbers(left: Any, right: Any) -> bool:
    return _is_number(left) and _is_number(right)


def _shown(value: Any) -> Any:
    """Return a value as a verdict shows it: whole objects and lists by their size only."""
    if isinstance(value, dict | list) and len(value) > 8:
        return f"{len(value)} entries"
    return value
