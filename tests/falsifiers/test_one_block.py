"""One block: the published bits, the verdicts, and what breaks them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.errors import InputError
from driftscope.falsifiers import one_block, super_block
from driftscope.falsifiers.one_block import measure
from driftscope.kernels.matmul import matmul_quantized
from driftscope.kernels.reference import published

PARAMETERS = {"rows": 16, "activations": 8, "resamples": 100, "confidence": 0.9}
REGIMES = {
    "generic": {"activation_format": "q8_K", "outlier_gain": 1},
    "outlier": {"activation_format": "apr_q8k", "outlier_gain": 50},
}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("one-block", "one-block-excess")


def test_the_published_block_comes_out_bit_for_bit(measurement: dict[str, Any]) -> None:
    assert measurement["published"]["a_bits"] == "0xc69384e3"
    assert measurement["published"]["b_bits"] == "0xc693a21e"
    assert measurement["published"]["relative_difference_percent"] == pytest.approx(0.0774, abs=5e-5)


def test_the_rounding_step_predicts_the_difference(measurement: dict[str, Any]) -> None:
    for regime in measurement["regimes"].values():
        assert regime["excess"]["value"] == pytest.approx(1.0, abs=0.1)
        assert regime["excess"]["low"] < regime["excess"]["value"] < regime["excess"]["high"]


def test_the_verdicts_on_the_unbroken_kernels(measurement: dict[str, Any]) -> None:
    excess = verdict("one-block", "one-block-excess", measurement)
    assert excess["verdict"] == "falsified"
    assert excess["contradicts"] == []
    near = verdict("one-block", "one-block-representative", measurement)
    assert near["verdict"] == "falsified"
    assert near["found"].startswith("No: ")


@pytest.mark.parametrize("gain", [1.5, 3.0])
def test_an_activation_step_that_is_too_coarse_is_found(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    """A product that uses fewer activation levels than its format has errs more than it has to."""

    def coarse(x: Any, raw: Any, dtype: str, *, activation: str) -> Any:
        exact = super_block.path_a(raw, x)
        return exact + np.float32(gain) * (matmul_quantized(x, raw, dtype, activation=activation) - exact)

    monkeypatch.setattr(super_block, "matmul_quantized", coarse)
    document = verdict("one-block", "one-block-excess", measured("one-block", "one-block-excess"))
    assert document["verdict"] == "supported"
    assert document["contradicts"] == ["expected-quantization-noise"]


def test_minima_that_are_left_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_minima(x: Any, raw: Any, dtype: str, *, activation: str) -> Any:
        broken = raw.copy()
        broken[:, 2:4] = 0
        return matmul_quantized(x, broken, dtype, activation=activation)

    monkeypatch.setattr(super_block, "matmul_quantized", without_minima)
    assert verdict("one-block", "one-block-excess", measured("one-block", "one-block-excess"))["verdict"] == (
        "supported"
    )


def test_a_path_b_that_is_path_a_is_found_by_the_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is quantized: the positive control of the second question can no longer fire."""
    monkeypatch.setattr(
        super_block, "matmul_quantized", lambda x, raw, dtype, *, activation: super_block.path_a(raw, x)
    )
    document = verdict("one-block", "one-block-representative", measured("one-block", "one-block-excess"))
    assert document["verdict"] in ("inconclusive", "vacuous")


def test_an_unlike_fixture_changes_the_second_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Had the published block been typical, the prediction would hold on ordinary activations."""
    monkeypatch.setattr(one_block.published, "relative_difference", lambda a, b: 0.0067)
    measurement = measured("one-block", "one-block-excess")
    measurement["controls"]["same-block-other-scale"]["scalar_over_published"] = {"value": 1.0}
    measurement["domain"][0]["scalar_over_published"] = {"value": 1.0}
    document = verdict("one-block", "one-block-representative", measurement)
    assert document["verdict"] == "regime-dependent"


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2))
    assert first == second
    assert json.dumps(measure(PARAMETERS, REGIMES, [1, 3], NOWHERE)) != first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 1}, "`rows`"),
        ({"activations": "many"}, "`activations`"),
        ({"resamples": 1}, "`resamples`"),
    ],
)
def test_a_bad_parameter_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        measure({**PARAMETERS, **change}, REGIMES, [1], NOWHERE)


def test_a_bad_activation_format_is_named() -> None:
    with pytest.raises(InputError, match="q9"):
        measure(PARAMETERS, {"a": {"activation_format": "q9", "outlier_gain": 1}}, [1], NOWHERE)


@pytest.mark.parametrize("power", [-8, 3])
def test_the_positive_control_of_the_second_question_rests_on_exact_scaling(power: int) -> None:
    def difference(x: Any) -> float:
        block = published.block_bytes()
        a, b = published.path_a_dot(block, x), published.path_b_dot(block, x)
        return published.relative_difference(float(a), float(b))

    ramp = published.activation()
    assert difference(np.float32(2.0**power) * ramp) == difference(ramp)


def test_the_published_dot_hides_what_drawn_ones_show() -> None:
    figures = one_block._published_dot(1)
    assert figures["scalar_dot_bits"] == figures["simd_dot_bits"] == "0x44191e70"
    assert figures["drawn_dots_equal_percent"] == pytest.approx(12.9, abs=1.0)
