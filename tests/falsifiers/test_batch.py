"""The batch: the published figures, the two statistics side by side, the verdicts, and what breaks them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.errors import InputError
from driftscope.falsifiers import batch

PARAMETERS = {"tokens": 3, "depth": 2, "resamples": 100, "confidence": 0.9}
REGIMES = {
    "alike": {"spread": 0.01, "activation_format": "apr_q8k"},
    "unlike": {"spread": 0.0, "activation_format": "q8_K"},
}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("batch", "batch-spread")


def test_the_published_figures_come_out_to_their_printed_digits(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    printed = ["0.439143", "0.246297", "0.020914", "0.028250", "0.023573", "0.024674", "0.020246"]
    assert [f"{value:.6f}" for value in figures["percents"]] == printed
    assert f"{figures['mean_percent']:.6f}" == "0.114728"
    assert f"{figures['largest_over_smallest']:.2f}" == "21.69"
    assert f"{figures['mean_over_first']:.4f}" == "0.2613"
    assert f"{figures['across_tokens_a']:.6f}" == "0.033416"
    assert f"{figures['across_tokens_b']:.6f}" == "0.032228"
    assert f"{figures['across_tokens_deviation_percent']:.2f}" == "3.69"


def test_like_for_like_no_published_token_deviates_by_that_much(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    assert max(map(abs, figures["within_token_deviation_percents"])) < 0.75
    assert figures["within_token_mean_percent"] < figures["across_tokens_deviation_percent"] / 20


def test_independent_errors_predict_the_spread_of_alike_tokens(measurement: dict[str, Any]) -> None:
    for name in ("alike", "alike-q8_K", "related"):
        regime = measurement["regimes"][name]
        assert regime["sensitivity"]["value"] == pytest.approx(regime["predicted"], rel=0.3)


def test_the_verdicts_on_the_unbroken_kernels(measurement: dict[str, Any]) -> None:
    document = verdict("batch", "batch-spread", measurement)
    assert document["verdict"] == "regime-dependent"
    assert document["reason"].endswith("only in alike, alike-q8_K")
    assert verdict("batch", "batch-alone", measurement)["verdict"] == "falsified"


def test_a_step_for_the_whole_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "path_b", batch._one_scale_for_all)
    measurement = measured("batch", "batch-alone")
    assert verdict("batch", "batch-alone", measurement)["verdict"] == "supported"


def test_an_order_that_depends_on_the_number_of_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = batch.path_b

    def path_b(rows: Any, x: Any, activation: str) -> Any:
        product = original(rows, x, activation)
        return product if len(x) == 1 else np.nextafter(product, np.float32(np.inf))

    monkeypatch.setattr(batch, "path_b", path_b)
    assert verdict("batch", "batch-alone", measured("batch", "batch-alone"))["verdict"] == "supported"


def test_an_error_that_all_tokens_share_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Path B off by one vector for all tokens: the spread across them keeps its size."""

    def path_b(rows: Any, x: Any, activation: str) -> Any:
        exact = batch.path_a(rows, x)
        error = batch.generator(9).standard_normal(exact.shape[1]) * np.abs(exact).mean() * 0.01
        return exact + error.astype(np.float32)

    monkeypatch.setattr(batch, "path_b", path_b)
    assert verdict("batch", "batch-spread", measured("batch", "batch-spread"))["verdict"] == "falsified"


def test_a_fixture_of_unlike_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = batch._tokens
    monkeypatch.setattr(batch, "_tokens", lambda seed, count, spread: original(seed, count, 0.0))
    document = verdict("batch", "batch-spread", measured("batch", "batch-spread"))
    assert document["verdict"] in ("inconclusive", "vacuous")


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(batch.measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("change", [{"tokens": 1}, {"depth": 0}, {"confidence": 1.0}])
def test_a_bad_parameter_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`"):
        batch.measure({**PARAMETERS, **change}, REGIMES, [1], NOWHERE)
