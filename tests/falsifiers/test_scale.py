"""The block scale: the published sweep to its printed digits, what its bytes decode to, the verdicts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.errors import InputError
from driftscope.falsifiers import scale
from driftscope.kernels.matmul import matmul_quantized

PARAMETERS = {
    "rows": 2, "activations": 2, "scales": [0.1, 1.0], "activation_format": "q8_K",
    "resamples": 100, "confidence": 0.9,
}  # fmt: skip
ALONE = {"minima": "none", "blocks": 1, "mean": 0.0, "outlier_gain": 1}
REGIMES = {"alone": ALONE, "two": {**ALONE, "minima": "fixed", "blocks": 2}}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("scale", "block-scale")


def test_the_published_sweep_comes_out_to_its_printed_digits(measurement: dict[str, Any]) -> None:
    printed = ["0.091873", "0.091873", "0.091924", "0.092017", "0.091932", "0.091932", "0.091966"]
    assert [f"{value:.6f}" for value in measurement["published"]["percents"]] == printed
    assert f"{measurement['published']['factor']:.2f}" == "1.00"


def test_what_moves_in_the_published_sweep_is_the_order_of_summing(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    assert figures["percents"] != figures["percents_in_stated_order"]
    for value in (*figures["percents"], *figures["percents_in_stated_order"]):
        assert value == pytest.approx(figures["exact_percent"], abs=1e-4)


def test_two_of_the_published_byte_pairs_are_another_scale(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    assert figures["wrong_bytes"] == [0.001, 0.05]
    of_five_hundredths = figures["fixture"][2]
    assert of_five_hundredths["bytes"] == "33 29"
    assert of_five_hundredths["decoded"] == pytest.approx(
        float(np.array([0x2933], np.uint16).view(np.float16)[0])
    )
    assert of_five_hundredths["off_percent"] == pytest.approx(-18.8, abs=0.05)


def test_a_common_factor_cancels_and_the_rest_is_predicted(measurement: dict[str, Any]) -> None:
    regimes = measurement["regimes"]
    for name in ("alone", "mixed-signs"):
        assert regimes[name]["factor"]["value"] == pytest.approx(1.0, abs=1e-3)
    for regime in regimes.values():
        assert regime["factor"]["value"] == pytest.approx(regime["predicted"], rel=0.15)
    assert measurement["controls"]["powers-of-two"]["factor"]["value"] == 1.0


def test_the_verdict_on_the_unbroken_kernels(measurement: dict[str, Any]) -> None:
    document = verdict("scale", "block-scale", measurement)
    assert document["verdict"] == "regime-dependent"
    assert document["reason"].endswith("only in fixed-minima-mean, one-of-eight-outlier")


def test_an_error_that_does_not_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product with an absolute error: at small scales it is nearly all there is."""

    def path_b(rows: Any, x: Any, activation: str) -> Any:
        return matmul_quantized(x, rows, "Q4_K", activation=activation) + np.float32(100.0)

    monkeypatch.setattr(scale, "path_b", path_b)
    document = verdict("scale", "block-scale", measured("scale", "block-scale"))
    assert document["verdict"] != "regime-dependent"


def test_a_path_b_that_is_path_a_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is rounded, so nothing can depend on the scale."""
    monkeypatch.setattr(scale, "path_b", lambda rows, x, activation: scale.path_a(rows, x))
    document = verdict("scale", "block-scale", measured("scale", "block-scale"))
    assert document["verdict"] == "falsified"


def test_a_kernel_that_ignores_the_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def path_b(rows: Any, x: Any, activation: str) -> Any:
        fixed = rows.copy()
        fixed[:, :2] = np.array([1.0], np.float16).view(np.uint8)
        return matmul_quantized(x, fixed, "Q4_K", activation=activation)

    monkeypatch.setattr(scale, "path_b", path_b)
    document = verdict("scale", "block-scale", measured("scale", "block-scale"))
    assert document["verdict"] != "regime-dependent"


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(scale.measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "change", [{"rows": 1}, {"activations": 1}, {"scales": [1.0]}, {"scales": [1.0, -1.0]}, {"scales": "all"}]
)
def test_a_bad_parameter_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`"):
        scale.measure({**PARAMETERS, **change}, REGIMES, [1], NOWHERE)


def test_a_bad_regime_or_format_is_named() -> None:
    with pytest.raises(InputError, match="`minima`"):
        scale.measure(PARAMETERS, {"a": {**ALONE, "minima": "some"}}, [1], NOWHERE)
    with pytest.raises(InputError, match="q8_0"):
        scale.measure({**PARAMETERS, "activation_format": "q8_0"}, REGIMES, [1], NOWHERE)
