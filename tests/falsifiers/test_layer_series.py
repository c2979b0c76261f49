"""The table of 28 layers: its statistics, their null models, and what would change the verdict."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.falsifiers.registered import CONTRACTS, NOWHERE, measured, verdict

from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers import layer_series
from driftscope.falsifiers.layer_series import measure

ASKED = load_contract(CONTRACTS / "layers.yaml").falsifier("layers-compound").measurement
SMALL = {**ASKED.parameters, "chains": 200, "resamples": 100}
LAYERS = np.array(ASKED.parameters["layers"])


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("layers", "layers-compound")


def test_the_printed_statistics_come_out(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    assert f"{figures['mean_percent']:.3f}" == "16.388"
    assert (figures["smallest_percent"], figures["largest_percent"]) == (0.030, 441.978)
    assert (figures["drops"], figures["close"]) == (13, 2)
    # Printed 1.8103, from figures with more digits than were printed.
    assert figures["growth"] == pytest.approx(0.985 / 0.544)
    five = measurement["published_five"]
    # 1.8081 was printed as growth over five layers; it is the last step alone.
    assert five["step"] == pytest.approx(0.774 / 0.428)
    assert five["growth"] == pytest.approx(0.774 / 0.544)


def test_the_trend_is_spearmans_rank_correlation(measurement: dict[str, Any]) -> None:
    expected = stats.spearmanr(np.arange(28), LAYERS)
    assert measurement["published"]["trend"] == pytest.approx(expected.statistic)
    one_sided = stats.spearmanr(np.arange(28), LAYERS, alternative="greater").pvalue
    assert measurement["regimes"]["permuted"]["p_trend"]["value"] == pytest.approx(one_sided, abs=0.01)


def test_the_null_of_the_drops_is_that_of_random_permutations(measurement: dict[str, Any]) -> None:
    """Descents of a random permutation of n: mean (n-1)/2, variance (n+1)/12."""
    low, middle, high = measurement["regimes"]["permuted"]["null"]["drops"]
    assert middle in (13, 14)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(29 / 12), abs=1.0)


def test_the_largest_of_ratios_of_normals_follows_cauchys_law(measurement: dict[str, Any]) -> None:
    found = measurement["regimes"]["ratio-of-normals"]["p_largest"]
    # P(|Cauchy| > t) = 1 - 2/pi atan(t); the median of |Cauchy| is 1.
    each = 1.0 - 2.0 / np.pi * np.arctan(measurement["published"]["largest"])
    assert found["value"] == pytest.approx(1.0 - (1.0 - each) ** 28, abs=0.003)
    assert found["low"] < found["value"] < found["high"]


def test_the_verdict_on_the_printed_table(measurement: dict[str, Any]) -> None:
    document = verdict("layers", "layers-compound", measurement)
    assert document["verdict"] == "falsified"
    assert "13 of 27" in document["found"]


def test_a_table_that_grows_with_depth_changes_the_verdict() -> None:
    grown = {**SMALL, "layers": list(LAYERS * 1.5 ** np.arange(28))}
    document = verdict("layers", "layers-compound", measure(grown, ASKED.regimes, [1, 2], NOWHERE))
    assert document["verdict"] == "supported"


def test_a_null_model_that_grows_itself_changes_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws that are not independent of depth: no series can stand out, and the control shows it."""
    original = layer_series._null

    def rising(kind: str, values: Any) -> layer_series.Draw:
        return lambda seed, chains, layers: np.sort(original(kind, values)(seed, chains, layers), axis=1)

    monkeypatch.setattr(layer_series, "_null", rising)
    document = verdict("layers", "layers-compound", measure(SMALL, ASKED.regimes, [1, 2], NOWHERE))
    assert document["verdict"] == "vacuous"


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (
        json.dumps(measure(SMALL, ASKED.regimes, [1], NOWHERE), allow_nan=False) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    "change", [{"layers": [1.0]}, {"layers": "many"}, {"five": [0.1, -1.0, 0.2]}, {"chains": 1}]
)
def test_a_bad_parameter_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`"):
        measure({**SMALL, **change}, ASKED.regimes, [1], NOWHERE)


def test_an_unknown_null_model_is_named() -> None:
    with pytest.raises(InputError, match="expected one of permuted, ratio, blocks"):
        measure(SMALL, {"a": {"null": "normal"}}, [1], NOWHERE)
