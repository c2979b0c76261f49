"""Rounded activations against rounded weights: both errors, their prediction, what moves the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, verdict
from tests.falsifiers.test_real_weights import Candidate

from driftscope.artifacts.open import open_artifact
from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers import outlier_cost
from driftscope.falsifiers.outlier_cost import Site, inputs, measure
from driftscope.falsifiers.own_activations import OwnActivations
from driftscope.falsifiers.sampling import F64, generator
from driftscope.falsifiers.super_block import F32
from driftscope.kernels.activations import quantize_activation

ASKED = load_contract(CONTRACTS / "outlier.yaml").falsifier("outlier-costs").measurement
LAYERS, TOKENS = 3, 16


class Pair(Candidate):
    """Both models, as far as the measurement asks for them."""

    def has(self, name: str) -> bool:
        return True


def _place(monkeypatch: pytest.MonkeyPatch, *, tail: float, weight_error: float) -> None:
    """Put drawn sites in the place of the model's; activations are Student's t with `tail` degrees."""

    def sites(*_: Any) -> Any:
        for layer in range(LAYERS):
            for index, name in enumerate(("q", "k", "v", "o", "gate", "up", "down")):
                random = generator(layer, index)
                x = random.standard_t(tail, (TOKENS, 512)).astype(np.float32)
                exact = random.standard_normal((48, 512)).astype(np.float32)
                noise = weight_error * random.standard_normal(exact.shape)
                yield Site(layer, name, x, exact, exact + noise.astype(np.float32))

    held = OwnActivations({}, np.zeros(TOKENS, np.int64), np.arange(TOKENS))
    monkeypatch.setattr(outlier_cost, "_sites", sites)
    monkeypatch.setattr(outlier_cost, "own_activations", lambda *_, **__: held)


def _measured() -> dict[str, Any]:
    return measure(ASKED.parameters, ASKED.regimes, ASKED.seeds, Pair())


def _verdict() -> dict[str, Any]:
    return verdict("outlier", "outlier-costs", _measured())


def test_both_errors_are_those_of_plain_matrix_products() -> None:
    random = generator(1)
    x = random.standard_normal((4, 256)).astype(np.float32)
    exact = random.standard_normal((8, 256)).astype(np.float32)
    quantized = exact + np.float32(0.05) * random.standard_normal((8, 256)).astype(np.float32)
    weight = outlier_cost._energy(x, quantized - exact)
    cost = outlier_cost._cost(Site(0, "q", x, exact, quantized), "q8_K", weight)

    def energy(a: F32, w: F32) -> F64:
        return np.square(a.astype(np.float64) @ w.astype(np.float64).T).sum(axis=1)

    rounded = quantize_activation(x, "q8_K").dequantize()
    expected = np.sqrt(energy(rounded - x, quantized) / energy(x, quantized - exact))
    assert cost["ratio"] == pytest.approx(expected, rel=1e-4)
    assert cost["relative_weight"] == pytest.approx(np.sqrt(weight / energy(x, exact)), rel=1e-4)


def test_outlier_tokens_come_first_and_calm_ones_last() -> None:
    random = generator(2)
    x = random.standard_normal((8, 256)).astype(np.float32)
    x[3, 7], x[6, 9] = 900.0, 400.0
    w = random.standard_normal((8, 256)).astype(np.float32)
    cost = outlier_cost._cost(Site(0, "q", x, w, w), "q8_K", np.ones(8))
    assert list(cost["outlier"]) == [3, 6]
    assert not {3, 6} & set(cost["calm"])


def test_the_predicted_size_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    _place(monkeypatch, tail=3.0, weight_error=0.02)
    document = _measured()
    for regime in document["regimes"].values():
        assert regime["excess"]["value"] == pytest.approx(1.0, abs=0.15)
    widths = document["widths"]
    assert widths["narrowest"] == "q8_0"
    assert widths["q8_K"]["measured"] == pytest.approx(widths["q8_K"]["predicted"], rel=0.1)
    assert widths["q8_K"]["measured"] > 1.5


def test_the_verdict_follows_the_outliers_and_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    _place(monkeypatch, tail=1.5, weight_error=0.003)
    assert _verdict()["verdict"] == "supported"
    _place(monkeypatch, tail=30.0, weight_error=0.05)
    assert _verdict()["verdict"] == "falsified"
    _place(monkeypatch, tail=2.0, weight_error=0.02)
    assert _verdict()["verdict"] == "regime-dependent"


def test_a_kernel_without_a_shared_step_changes_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    _place(monkeypatch, tail=1.5, weight_error=0.003)

    def exact(x: Any, fmt: str) -> Any:
        return quantize_activation(x, "f16")

    monkeypatch.setattr(outlier_cost, "quantize_activation", exact)
    assert _verdict()["verdict"] in ("vacuous", "falsified", "inconclusive")


def test_the_same_arguments_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    _place(monkeypatch, tail=3.0, weight_error=0.02)
    first, second = (json.dumps(_measured(), allow_nan=False) for _ in range(2))
    assert first == second


@pytest.mark.model
def test_a_model_against_itself_has_no_weight_error_to_exceed(default_gguf: Path) -> None:
    parameters = {"rows": 8, "most_tokens": 2, "resamples": 100, "confidence": 0.95}
    regimes = {"down": ASKED.regimes["down-q8_K-outlier"], "all": ASKED.regimes["all-q8_0-outlier"]}
    document = measure(parameters, regimes, [1], Pair(open_artifact(default_gguf)))
    assert (document["sites"], document["tokens"]) == (210, 3)
    assert document["weight_error"]["value"] < 1e-12
    assert set(document["regimes"]["all"]["by_site"]) == {"q", "k", "v", "o", "gate", "up", "down"}


def test_missing_models_are_not_run_and_the_evidence_is_named() -> None:
    assert inputs({}) == ["models/teacher.json", "models/candidate.json", "prompts.json"]
    assert measure(ASKED.parameters, ASKED.regimes, [1], NOWHERE)["status"] == "not-run"


@pytest.mark.parametrize(("key", "value"), [("tokens", "first"), ("site", "lm_head")])
def test_bad_parameters_are_named(key: str, value: str) -> None:
    regime = {**ASKED.regimes["all-q8_0-outlier"], key: value}
    with pytest.raises(InputError, match=f"`{key}`"):
        measure(ASKED.parameters, {"a": regime}, [1], Pair())
