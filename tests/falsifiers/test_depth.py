"""Error by depth on a model's own layers: the growth law, the intervals, and what breaks the verdict."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.evidence.schemas import frame_of
from driftscope.falsifiers import depth
from driftscope.falsifiers.depth import inputs
from driftscope.falsifiers.sampling import generator

PAIRS = ("candidate.f32|candidate.int8-dot", "teacher.f32|candidate.f32")
PROMPTS = ("a", "b", "c")


class Divergence:
    """Evidence in memory: an error by layer that grows as depth to a power."""

    def __init__(self, *powers: float, layers: int = 20) -> None:
        rows = []
        for pair, power in zip(PAIRS, powers, strict=True):
            for index, prompt in enumerate(PROMPTS):
                for scope in ("all", "last", "all-but-first"):
                    noise = np.exp(0.05 * generator(index, len(scope)).standard_normal(layers))
                    for layer in range(layers):
                        error = 0.01 * (layer + 1) ** power * noise[layer]
                        rows.append(_row(pair, prompt, scope, layer, error))
        self.frame = frame_of(rows, "divergence")

    def has(self, name: str) -> bool:
        return name == "divergence.parquet"

    def table(self, name: str, schema: str) -> pl.DataFrame:
        assert schema == "divergence"
        return self.frame


def _row(pair: str, prompt: str, scope: str, layer: int, error: float) -> dict[str, Any]:
    return {
        "pair": pair,
        "prompt": prompt,
        "layer": layer,
        "tap": "post_ffn_residual",
        "kind": "propagated",
        "scope": scope,
        "position": -1,
        "token_count": 5,
        "count": 320,
        "compared_count": 320,
        "nmse": error**2,
        "relative_l2": error,
        "cosine_similarity": 1.0,
        "max_abs_diff": error,
        "std_ratio": 1.0,
    }


def _measured(evidence: Any) -> dict[str, Any]:
    return measured("depth", "depth-compounds", evidence)


def _verdict(evidence: Any) -> dict[str, Any]:
    return verdict("depth", "depth-compounds", _measured(evidence))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.4])
def test_the_exponent_is_the_power_of_depth(power: float) -> None:
    regime = _measured(Divergence(power, 0.5))["regimes"]["activations"]
    assert regime["exponent"]["value"] == pytest.approx(power, abs=0.05)
    assert regime["exponent"]["low"] <= regime["exponent"]["value"] <= regime["exponent"]["high"]
    assert regime["growth"]["value"] == pytest.approx(20**power, rel=0.15)
    assert [item["layer"] for item in regime["layers"]] == list(range(20))


def test_the_square_root_law_is_falsified_and_faster_than_depth_is_supported() -> None:
    assert _verdict(Divergence(0.5, 0.5))["verdict"] == "falsified"
    assert _verdict(Divergence(1.5, 1.5))["verdict"] == "supported"
    assert _verdict(Divergence(1.5, 0.5))["verdict"] == "regime-dependent"


def test_an_error_that_is_not_handed_on_is_found_by_the_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were layers independent in the control as well, compounding could not show."""

    def forgetful(gain: float, seed: int) -> Any:
        return np.exp(0.3 * generator(seed).standard_normal((8, 30)))

    monkeypatch.setattr(depth, "_handed_on", forgetful)
    assert _verdict(Divergence(1.5, 1.5))["verdict"] in ("vacuous", "inconclusive")


def test_synthetic_layers_follow_the_recursion() -> None:
    metrics = _measured(Divergence(0.5, 0.5))
    assert metrics["controls"]["quadrature"]["exponent"]["value"] == pytest.approx(0.5, abs=0.05)


def test_layers_without_an_error_are_left_out_and_no_table_is_not_run() -> None:
    evidence = Divergence(0.5, 0.5)
    evidence.frame = evidence.frame.with_columns(
        relative_l2=pl.when(pl.col("layer") == 4).then(0.0).otherwise(pl.col("relative_l2"))
    )
    layers = _measured(evidence)["regimes"]["activations"]["layers"]
    assert 4 not in [item["layer"] for item in layers]
    document = verdict("depth", "depth-compounds", _measured(NOWHERE))
    assert document["verdict"] == "not-run"


def test_one_prompt_has_no_interval_and_decides_nothing() -> None:
    evidence = Divergence(0.5, 0.5)
    evidence.frame = evidence.frame.filter(pl.col("prompt") == "a")
    assert _verdict(evidence)["verdict"] == "not-run"


def test_the_measurement_says_what_it_reads_and_repeats_its_bytes() -> None:
    assert inputs({}) == ["divergence.parquet"]
    first, second = (json.dumps(_measured(Divergence(0.3, 0.4)), allow_nan=False) for _ in range(2))
    assert first == second
