"""RMSNorm: the published figure, the derivative as the null, the verdicts, and what breaks them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.errors import InputError
from driftscope.falsifiers import norm

PARAMETERS = {"channels": 16, "eps": 1e-6, "draws": 8, "resamples": 100, "confidence": 0.9}
REGIMES = {
    "far": {"rms": 1.0, "outlier_gain": 1.0, "outlier_weight": 1.0},
    "below": {"rms": 1e-5, "outlier_gain": 1.0, "outlier_weight": 1.0},
}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("norm", "norm-amplifies")


def test_the_published_figure_comes_out(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    assert f"{figures['amplification']:.4f}" == "1.0000"
    assert f"{figures['before_percent']:.4f}" == "0.0770"
    assert figures["mean_square_over_eps"] > 1e7


def test_the_prediction_is_the_derivative_that_torch_takes() -> None:
    draw = norm._Draw(3, 4, 32, 1e-3, 20.0, 0.1, False)
    x, weight = torch.tensor(draw.x, dtype=torch.float64), torch.tensor(draw.weight, dtype=torch.float64)
    drift = torch.tensor(draw.moved.astype(np.float64) - draw.x)
    behind, moved = torch.autograd.functional.jvp(
        lambda each: torch.nn.functional.rms_norm(each, (32,), weight, 1e-6), x, drift
    )
    expected = moved.norm(dim=1) / behind.norm(dim=1) / (drift.norm(dim=1) / x.norm(dim=1))
    assert norm._predicted(draw, 1e-6) == pytest.approx(expected.numpy(), rel=1e-9)


def test_drifts_come_out_as_the_derivative_says(measurement: dict[str, Any]) -> None:
    for regime in measurement["regimes"].values():
        assert regime["gain"]["value"] == pytest.approx(regime["predicted"], rel=1e-3)
        assert regime["kept"]["value"] == pytest.approx(regime["predicted_kept"], abs=1e-3)


def test_the_verdicts_on_the_unbroken_kernel(measurement: dict[str, Any]) -> None:
    document = verdict("norm", "norm-amplifies", measurement)
    assert document["verdict"] == "regime-dependent"
    assert document["reason"].endswith("only in outlier-low-weight")
    document = verdict("norm", "norm-removes-size", measurement)
    assert document["verdict"] == "regime-dependent"
    assert document["reason"].endswith("only in far-above-eps, outlier, outlier-low-weight")


def test_a_forgotten_eps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda x, weight, eps: original(x, weight, 0.0))
    document = verdict("norm", "norm-removes-size", measured("norm", "norm-removes-size"))
    assert document["verdict"] == "supported"


def test_a_root_that_is_taken_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a change of size stays, however far above eps."""

    def fourth_root(x: Any, weight: Any, eps: float) -> Any:
        square = np.square(x).mean(axis=1, keepdims=True) + eps
        return (x / np.sqrt(np.sqrt(square)) * weight).astype(np.float32)

    monkeypatch.setattr(norm, "rms_norm", fourth_root)
    document = verdict("norm", "norm-removes-size", measured("norm", "norm-removes-size"))
    assert document["verdict"] == "falsified"


def test_weights_that_are_left_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda x, weight, eps: original(x, np.ones_like(weight), eps))
    document = verdict("norm", "norm-amplifies", measured("norm", "norm-amplifies"))
    assert document["verdict"] == "inconclusive"
    assert "drift-under-a-large-weight" in document["reason"]


def test_a_norm_in_bfloat16_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to 8 bits, a drift of 0.077 % is a step of 0.4 % or none: more than the derivative has."""
    original = norm.rms_norm

    def rounded(x: Any, weight: Any, eps: float) -> Any:
        bits = original(x, weight, eps).view(np.uint32) + np.uint32(0x8000)
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)

    monkeypatch.setattr(norm, "rms_norm", rounded)
    document = verdict("norm", "norm-amplifies", measured("norm", "norm-amplifies"))
    assert document["verdict"] == "supported"


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(norm.measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("change", [{"channels": 1}, {"eps": -1.0}, {"draws": 0}])
def test_a_bad_parameter_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`"):
        norm.measure({**PARAMETERS, **change}, REGIMES, [1], NOWHERE)
