"""RoPE: the published figure, why it could not fail, the verdicts, and what breaks them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.errors import InputError
from driftscope.falsifiers import rope
from driftscope.kernels.reference import published

PARAMETERS = {
    "head": 8, "base": 10000.0, "positions": 64, "draws": 16, "resamples": 100, "confidence": 0.9,
}  # fmt: skip
REGIMES = {
    "split": {"pairing": "split-half", "drift": "scaling", "alignment": 0.0},
    "neighbours": {"pairing": "interleaved", "drift": "direction", "alignment": 0.9},
}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("rope", "rope-norm")


def test_the_published_figure_comes_out_and_could_not_have_been_another(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    assert f"{figures['amplification']:.2f}" == "1.00"
    assert f"{figures['input_percent']:.3f}" == "0.077"
    before, behind = published.rope_drift()
    assert figures["amplification"] == pytest.approx(behind / before, rel=1e-3)
    assert figures["query_unchanged_at_position_0"]
    assert figures["cases"] == 98
    assert figures["farthest_from_one"] < 0.005


def test_an_isometry_keeps_every_drift(measurement: dict[str, Any]) -> None:
    for regime in measurement["regimes"].values():
        assert regime["norm"]["value"] == pytest.approx(1.0, abs=1e-5)
        assert regime["score_absolute"]["value"] == pytest.approx(1.0, abs=0.1)


def test_the_score_of_alike_vectors_shrinks_with_distance(measurement: dict[str, Any]) -> None:
    """The expected cosine at a distance is the mean of the pairs' cosines (Su et al. 2021, section 3.4.3)."""
    scores = measurement["regimes"]["attended-split-half"]["score_by_distance"]
    assert scores[0] == {"distance": 0, "score": pytest.approx(1.0, abs=1e-4)}
    # Farther on the mean cosine is near zero, and the score is the key's unlike part.
    for entry in (entry for entry in scores if entry["distance"] <= 256):
        frequencies = 10000.0 ** (-np.arange(32) / 32)
        expected = 1.0 / abs(np.cos(entry["distance"] * frequencies).mean())
        assert entry["score"] == pytest.approx(expected, rel=0.25)


def test_the_verdicts_on_the_unbroken_kernel(measurement: dict[str, Any]) -> None:
    assert verdict("rope", "rope-norm", measurement)["verdict"] == "falsified"
    document = verdict("rope", "rope-score", measurement)
    assert document["verdict"] == "regime-dependent"
    assert "attended-split-half, attended-interleaved" in document["reason"]


def test_a_rotation_that_is_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sines of another angle: the map shears, and some directions grow."""
    tables = rope.rope_tables

    def broken(frequencies: Any, n_positions: int, **rest: Any) -> Any:
        return tables(frequencies, n_positions, **rest)[0], tables(2 * frequencies, n_positions, **rest)[1]

    monkeypatch.setattr(rope, "rope_tables", broken)
    document = verdict("rope", "rope-norm", measured("rope", "rope-norm"))
    assert document["verdict"] == "regime-dependent"
    assert "random-split-half" in document["reason"]


def test_a_kernel_that_does_not_rotate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "rope", lambda x, cosine, sine, positions, *, interleaved=False: x)
    measurement = measured("rope", "rope-norm")
    for falsifier in ("rope-norm", "rope-score"):
        # The positive control, a slip of one position, has nothing to slip on.
        assert verdict("rope", falsifier, measurement)["verdict"] in ("inconclusive", "vacuous")


def test_keys_that_stay_at_their_query_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A position that is always the same: nothing is turned apart, and alike queries behave as unrelated."""
    original = rope.rope

    def stuck(x: Any, cosine: Any, sine: Any, positions: Any, *, interleaved: bool = False) -> Any:
        return original(x, cosine, sine, np.ones_like(positions), interleaved=interleaved)

    monkeypatch.setattr(rope, "rope", stuck)
    assert verdict("rope", "rope-score", measured("rope", "rope-score"))["verdict"] == "falsified"


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(rope.measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("change", [{"head": 7}, {"base": 0.5}, {"positions": 0}, {"draws": "many"}])
def test_a_bad_parameter_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`"):
        rope.measure({**PARAMETERS, **change}, REGIMES, [1], NOWHERE)


@pytest.mark.parametrize("change", [{"pairing": "thirds"}, {"drift": "none"}, {"alignment": 2}])
def test_a_bad_regime_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`"):
        rope.measure(PARAMETERS, {"a": {**REGIMES["split"], **change}}, [1], NOWHERE)
