from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from driftscope.analysis.calibration import (
    RUNS,
    SETTINGS,
    clean_run,
    clean_runs,
    false_alarms,
)
from driftscope.analysis.floors import COMPONENTS, Floors, statistics_of
from driftscope.analysis.proportion import clopper_pearson

pytestmark = pytest.mark.slow


def test_half_of_the_runs_are_fitted_and_the_rest_raises_no_alarm(floors: Floors) -> None:
    assert RUNS % (2 * len(SETTINGS)) == 0
    held_out = floors.calibration["held_out"]
    assert (floors.calibration["runs"], held_out["runs"]) == (RUNS // 2, RUNS // 2)
    assert held_out["flagged"] == 0
    assert held_out["tests"] > 5000


def test_tails_of_held_out_runs_are_no_smaller_than_they_say(floors: Floors) -> None:
    """The floors lean to fewer flags, never to more: each share is at its level or below."""
    tails = floors.calibration["held_out"]["tails"]
    assert tails["0.1"] <= 0.1
    assert tails["0.01"] <= 0.01
    assert tails["0.001"] <= 0.001


def test_runs_that_calibration_never_saw_raise_no_alarm(floors: Floors) -> None:
    unseen = list(clean_runs(range(1000, 1000 + len(SETTINGS))))
    found = false_alarms(floors, unseen)
    assert found["flagged_runs"] == []
    tails = [
        floors.tail_probabilities(row, run.arithmetic)["score"]
        for run in unseen
        for row in run.rows
        if row["component"] in COMPONENTS and row["score"] is not None
    ]
    # As rare as they say or rarer, and yet not all large: floors that are far too wide would be of no use.
    for level in (0.2, 0.1, 0.05, 0.01, 0.001):
        assert np.mean(np.array(tails) <= level) <= level
    assert 0.3 < float(np.median(tails)) < 0.7


def test_every_common_kind_is_fitted(floors: Floors) -> None:
    kinds = {kind for kind, component, _ in floors.cells if component == "engine"}
    assert {
        *("norm f32", "matmul f32", "matmul int8-dot", "rope f32", "scores f32", "softmax f32"),
        *("attention f32", "silu f32", "scores kv-f16", "attention kv-f16", "any narrow", "matmul narrow"),
    } <= kinds
    assert {kind for kind, component, _ in floors.cells if component == "model"} == {
        *("matmul", "norm", "embedding", "derived"),
    }


def test_the_same_run_gives_the_same_rows(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows.append(clean_run(5, tmp_path / name).rows)
    assert rows[0] == rows[1]
    assert all(statistics_of(row, None) for row in rows[0])


@pytest.mark.parametrize(("hits", "trials"), [(0, 60), (1, 60), (7, 20), (60, 60)])
def test_interval_is_that_of_scipy(hits: int, trials: int) -> None:
    expected = scipy.stats.binomtest(hits, trials).proportion_ci(0.95, method="exact")
    assert clopper_pearson(hits, trials) == pytest.approx((expected.low, expected.high))
