"""Softmax: the published figures, the Jacobian as the null, the verdicts, and what breaks them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.errors import InputError
from driftscope.falsifiers import softmax

PARAMETERS = {"keys": 5, "draws": 16, "resamples": 100, "confidence": 0.9}
REGIMES = {"tie": {"top": 10.0, "gap": 0.0}, "saturated": {"top": 10.0, "gap": 9.0}}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("softmax", "softmax-amplifies")


def test_the_published_figures_come_out_to_their_printed_digits(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    assert f"{figures['before_percent']:.4f}" == "0.0513"
    assert f"{figures['behind_percent']:.6f}" == "0.000578"
    assert f"{figures['amplification']:.4f}" == "0.0113"
    # Without the rounding of probabilities near 1 it is 0.0114.
    assert figures["exact_amplification"] == pytest.approx(0.01138, abs=5e-6)


def test_a_constant_on_all_logits_changes_the_figure_and_not_the_softmax(measurement: dict[str, Any]) -> None:
    shifts = measurement["published"]["by_shift"]
    sizes = [
        sum(abs(x + entry["shift"]) for x in (-1.5, 0.5, -0.8, 10.0, 1.2, -0.3, 0.7)) for entry in shifts
    ]
    for entry, size in zip(shifts, sizes, strict=True):
        expected = shifts[0]["amplification"] * size / sizes[0]
        assert entry["amplification"] == pytest.approx(expected, rel=1e-6)


def test_the_prediction_is_the_jacobian_that_torch_derives() -> None:
    before, after = softmax._logits(1, 3, 5, 10.0, 0.5, False)
    for row in range(3):
        logits = torch.tensor(before[row], dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda x: torch.softmax(x, 0), logits)
        drift = torch.tensor(after[row].astype(np.float64) - before[row])
        expected = float((jacobian @ drift).abs().sum())
        assert softmax._predicted(before, after)[row] == pytest.approx(expected, rel=1e-12)


def test_the_gain_falls_from_tie_to_certainty_as_predicted(measurement: dict[str, Any]) -> None:
    gains = [sample["gain"]["value"] for sample in measurement["domain"][: len(softmax._GAPS)]]
    assert gains == sorted(gains, reverse=True)
    for regime in measurement["regimes"].values():
        assert regime["gain"]["value"] == pytest.approx(regime["predicted"], rel=0.01)


def test_the_verdicts_on_the_unbroken_kernel(measurement: dict[str, Any]) -> None:
    document = verdict("softmax", "softmax-amplifies", measurement)
    assert document["verdict"] == "regime-dependent"
    assert document["reason"].endswith("only in tie, near-tie")
    assert verdict("softmax", "softmax-excess", measurement)["verdict"] == "falsified"


def test_a_scale_that_is_applied_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits four times too small: certainties become ties, and drift more than they should."""
    original = softmax.attention_softmax
    monkeypatch.setattr(
        softmax, "attention_softmax", lambda scores, *, n_heads: original(scores / 4, n_heads=n_heads)
    )
    measurement = measured("softmax", "softmax-amplifies")
    assert verdict("softmax", "softmax-excess", measurement)["verdict"] not in ("falsified", "supported")
    assert verdict("softmax", "softmax-amplifies", measurement)["reason"] != (
        "the prediction holds only in tie, near-tie"
    )


def test_a_noise_of_the_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = softmax.attention_softmax

    def noisy(scores: Any, *, n_heads: int) -> Any:
        noise = 1.0 + 2e-3 * np.sin(1e5 * scores)
        return (original(scores, n_heads=n_heads) * noise).astype(np.float32)

    monkeypatch.setattr(softmax, "attention_softmax", noisy)
    document = verdict("softmax", "softmax-excess", measured("softmax", "softmax-excess"))
    assert document["verdict"] != "falsified"


def test_a_kernel_that_ignores_its_logits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def uniform(scores: Any, *, n_heads: int) -> Any:
        return np.full_like(scores, 1.0 / scores.shape[0])

    monkeypatch.setattr(softmax, "attention_softmax", uniform)
    measurement = measured("softmax", "softmax-amplifies")
    for falsifier in ("softmax-amplifies", "softmax-excess"):
        # Nothing drifts any more, and the positive controls stay silent.
        assert verdict("softmax", falsifier, measurement)["verdict"] == "inconclusive"


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(softmax.measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("change", [{"keys": 2}, {"draws": 1}, {"resamples": 1}])
def test_a_bad_parameter_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`"):
        softmax.measure({**PARAMETERS, **change}, REGIMES, [1], NOWHERE)
