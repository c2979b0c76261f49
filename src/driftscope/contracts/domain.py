"""Could a predicate have failed? It is run on evidence perturbed within the sampled domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from driftscope.contracts.clauses import State, compare
from driftscope.contracts.metrics import Metric, MissingMetricError, resolve, resolve_all
from driftscope.contracts.model import Clause, Falsifier


def constant_clauses(falsifier: Falsifier, measurement: Mapping[str, Any]) -> list[tuple[str, State]]:
    """Name the clauses that give one answer wherever they are asked.

    A clause is asked of every regime, every control and every sample of the domain, and of values between
    those (a metric between two neighbouring samples). A clause on the whole document has one value
    only and is not asked.

    Returns:
        ``(clause id, its one answer)`` each, in the contract's order.
    """
    found = []
    for clause in falsifier.judgement.clauses:
        if clause.scope != "regime":
            continue
        states = set(_states(clause, list(_samples(measurement))))
        if len(states) == 1:
            found.append((clause.id, states.pop()))
    return found


def _samples(measurement: Mapping[str, Any]) -> Iterator[Any]:
    for key in ("regimes", "controls"):
        members = measurement.get(key)
        if isinstance(members, Mapping):
            yield from members.values()
    domain = measurement.get("domain")
    if isinstance(domain, Sequence) and not isinstance(domain, str):
        yield from domain


def _states(clause: Clause, samples: list[Any]) -> Iterator[State]:
    metrics: list[Metric] = []
    thresholds: list[Any] = [] if clause.threshold_metric else [clause.threshold]
    for sample in samples:
        try:
            found = resolve_all(sample, clause.metric)
            if clause.threshold_metric is not None:
                thresholds.append(resolve(sample, clause.threshold_metric).value)
        except MissingMetricError:
            continue
        metrics.extend(found)
    for metric in [*metrics, *_between(metrics)]:
        for threshold in thresholds:
            state = compare(metric, clause, threshold)
            if state in ("holds", "fails"):
                yield state


def _between(metrics: list[Metric]) -> Iterator[Metric]:
    """Metrics half way between neighbours in value, with the wider of their intervals."""
    numbers = [metric for metric in metrics if _is_number(metric.value)]
    numbers.sort(key=lambda metric: float(metric.value))
    for one, other in pairwise(numbers):
        middle = (one.value + other.value) / 2
        below = max(one.value - one.low, other.value - other.low)
        above = max(one.high - one.value, other.high - other.value)
        yield Metric(middle, middle - below, middle + above)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
