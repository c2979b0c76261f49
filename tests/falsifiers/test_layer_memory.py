"""The published step: nothing is handed on, and what would change that."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.errors import InputError
from driftscope.falsifiers import layer_memory
from driftscope.falsifiers.layer_memory import measure, published_step
from driftscope.kernels.reference import published

PARAMETERS = {"layers": 6, "resamples": 100, "confidence": 0.9}
REGIMES = {"a": {"blocks": "random", "activation_format": "apr_q8k"}}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("layers", "layers-remember")


def test_the_published_step_keeps_the_direction() -> None:
    ramp = published.activation()
    for result in (-1.658492, 0.25, 18882.443):
        following = published_step(ramp, np.float32(result)).astype(np.float64)
        factor = 1.0 + 0.001 * result / max(abs(result), 1.0)
        assert following == pytest.approx(factor * ramp.astype(np.float64), rel=1e-6, abs=1e-6)


def test_the_verdict_on_the_published_step(measurement: dict[str, Any]) -> None:
    document = verdict("layers", "layers-remember", measurement)
    assert document["verdict"] == "falsified"
    assert document["controls"]["handed-on"]["as_required"]
    for regime in measurement["regimes"].values():
        # A thousandth of the activation is handed on as its length alone.
        assert regime["history"]["value"] < 0.001


def test_a_step_that_hands_the_output_on_changes_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(initial: Any, result: Any) -> Any:
        return initial + np.float32(0.5) * np.sign(result) * initial[::-1] * np.cos(initial)

    monkeypatch.setattr(layer_memory, "published_step", turned)
    document = verdict("layers", "layers-remember", measured("layers", "layers-remember"))
    assert document["verdict"] == "supported"


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2))
    assert first == second


def test_bad_parameters_are_named() -> None:
    with pytest.raises(InputError, match="`layers`"):
        measure({**PARAMETERS, "layers": 1}, REGIMES, [1], NOWHERE)
    with pytest.raises(InputError, match="expected one of random, gaussian"):
        measure(PARAMETERS, {"a": {"blocks": "zero", "activation_format": "q8_K"}}, [1], NOWHERE)
