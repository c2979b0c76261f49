"""Metric paths and templates."""

from __future__ import annotations

import pytest

from driftscope.contracts.metrics import Metric, MissingMetricError, fill, resolve, resolve_all

DOCUMENT = {
    "a": {"b": {"value": 2.0, "low": 1.0, "high": 3.0}},
    "mean": 5,
    "mean_low": 4,
    "mean_high": 6,
    "rows": [{"tensor": "layers.0.q", "nmse": 0.5}, {"tensor": "norm", "nmse": 0.25}],
    "none": None,
    "empty": [],
}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.b", Metric(2.0, 1.0, 3.0)),
        ("a.b.low", Metric(1.0, 1.0, 1.0)),
        ("mean", Metric(5, 4, 6)),
        ("rows.1.nmse", Metric(0.25, 0.25, 0.25)),
        ("rows[tensor=layers.0.q].nmse", Metric(0.5, 0.5, 0.5)),
        ("empty", Metric([], [], [])),
    ],
)
def test_a_path_gives_a_metric_with_its_interval(path: str, expected: Metric) -> None:
    assert resolve(DOCUMENT, path) == expected


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "a..b",
        "a.c",
        "none",
        "rows.2.nmse",
        "rows[tensor=x].nmse",
        "mean.x",
        "rows.*.nmse",
        "a.",
        "[",
        "a]b",
    ],
)
def test_a_path_that_leads_nowhere_is_missing(path: str) -> None:
    with pytest.raises(MissingMetricError):
        resolve(DOCUMENT, path)


def test_a_star_stands_for_every_member_and_for_at_least_one() -> None:
    assert [metric.value for metric in resolve_all(DOCUMENT, "rows.*.nmse")] == [0.5, 0.25]
    with pytest.raises(MissingMetricError):
        resolve_all(DOCUMENT, "empty.*")


def test_templates_are_filled_with_formats() -> None:
    assert fill("{a.b:.1f} of {mean:,d} at {rows[tensor=norm].nmse:.0%}", DOCUMENT) == "2.0 of 5 at 25%"


@pytest.mark.parametrize(
    "template", ["{a.b!r}", "{mean:>99999999}", "{mean", "{rows.0.tensor:.2f}", "{0.__class__}"]
)
def test_templates_cannot_reach_further_than_the_document(template: str) -> None:
    with pytest.raises((ValueError, MissingMetricError)):
        fill(template, DOCUMENT)
