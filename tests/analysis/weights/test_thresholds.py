"""Bounds of the command line: how they are read, and what they say of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driftscope.analysis.weights.sweep import compare_tensor
from driftscope.analysis.weights.thresholds import METRICS, Threshold, metric_of
from driftscope.artifacts.tensor import TensorRef

ROW: dict[str, Any] = {
    "nmse": 0.02,
    "expected_nmse": 0.01,
    "cosine_similarity": 0.99,
    "std_ratio": None,
    "identical_count": 25,
    "element_count": 100,
    "max_diff": 0.5,
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("x nmse<0.03", True),
        ("x nmse<0.02", False),
        ("x nmse<=0.02", True),
        ("x nmse > 1e-2", True),
        ("x  cosine_similarity >= 0.99", True),
        ("x nmse_over_expected<2.0", False),
        ("x nmse_over_expected<=2", True),
        ("x identical_share>0.2", True),
        ("x std_ratio>-1", False),
        ("a b c max_diff<1", True),
    ],
)
def test_a_bound_on_a_row(text: str, holds: bool) -> None:
    assert Threshold.parse(text).holds(ROW) is holds


def test_all_but_the_last_word_is_the_pattern() -> None:
    threshold = Threshold.parse(r"  layers\.(0|1)\.mlp (up|down) nmse<1e-3 ")
    assert threshold.pattern.pattern == r"layers\.(0|1)\.mlp (up|down)"
    assert (threshold.metric, threshold.comparator, threshold.value) == ("nmse", "<", 1e-3)


def test_every_metric_is_a_figure_of_the_sweep(tmp_path: Path) -> None:
    refs = []
    for name, values in (("a", [1.0, 2.0]), ("b", [1.0, 2.5])):
        file = tmp_path / name
        file.write_bytes(np.asarray(values, np.float32).tobytes())
        refs.append(TensorRef(name, name, (1, 2), "F32", file, 0, 8))
    row = compare_tensor(*refs)
    assert {metric for metric in METRICS if metric_of(row, metric) is None} == {"nmse_over_expected"}
