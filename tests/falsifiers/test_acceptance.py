"""The criteria of the published fix: ratios, cosines, counts, and what would change the verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, verdict

from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.evidence.schemas import frame_of
from driftscope.falsifiers import acceptance
from driftscope.falsifiers.acceptance import inputs, measure
from driftscope.falsifiers.sampling import F64, generator
from driftscope.falsifiers.token_scope import trace_of

CONTRACT = load_contract(CONTRACTS / "acceptance.yaml")
PAIRS = (
    "candidate.f32|candidate.int8-dot",
    "teacher.f32|candidate.int8-dot",
    "teacher.f32|candidate.f32",
)
PROMPTS = ("chat", "fibonacci", "two-plus-two")
LAYERS = 6


class Runs:
    """Evidence in memory: std ratios and logits' cosines of every pair, and one path's own std."""

    def __init__(self, ratio: float = 1.02, cosine: float = 0.9997, spread: float = 1.2) -> None:
        rows = []
        for pair in PAIRS:
            for prompt in PROMPTS:
                for layer in range(LAYERS):
                    rows.append(_row(pair, prompt, layer, "ffn_swiglu", ratio if layer == 3 else 1.0, cosine))
                rows.append(_row(pair, prompt, -1, "lm_head", 1.0, cosine))
        self.divergence = frame_of(rows, "divergence")
        frames = []
        for index, prompt in enumerate(PROMPTS):
            for tap in ("ffn_swiglu", "ffn_out"):
                values = generator(index, 1).standard_normal((LAYERS, 5, 256))
                values *= spread ** (index + np.arange(LAYERS)[:, None, None])
                frames.append(trace_of(values, prompt, tap))
        self.trace = pl.concat(frames)

    def has(self, name: str) -> bool:
        return True

    def table(self, name: str, schema: str) -> pl.DataFrame:
        return self.divergence if schema == "divergence" else self.trace

    def document(self, name: str) -> dict[str, Any]:
        assert name == "fix_scope.json"
        options = [
            {"option": option, "mean_kl": kl, "mean_kl_low": kl - 0.01, "mean_kl_high": kl + 0.01}
            for option, kl in (("A", 0.06), ("B", 0.05))
        ]
        return {"options": options, "closer_to_teacher": "B"}

    def model(self, name: str) -> Any:
        raise AssertionError(name)


def _row(pair: str, prompt: str, layer: int, tap: str, ratio: float, cosine: float) -> dict[str, Any]:
    return {
        "pair": pair,
        "prompt": prompt,
        "layer": layer,
        "tap": tap,
        "kind": "propagated",
        "scope": "last",
        "position": -1,
        "token_count": 1,
        "count": 256,
        "compared_count": 256,
        "nmse": 0.0,
        "relative_l2": 0.0,
        "cosine_similarity": cosine,
        "max_abs_diff": 0.0,
        "std_ratio": ratio,
    }


def _measured(falsifier: str, runs: Any) -> dict[str, Any]:
    asked = CONTRACT.falsifier(falsifier).measurement
    return measure(asked.parameters, asked.regimes, asked.seeds, runs)


def _verdict(falsifier: str, runs: Any) -> dict[str, Any]:
    return verdict("acceptance", falsifier, _measured(falsifier, runs))


def test_the_published_layers_are_in_the_band_and_not_within_a_tenth() -> None:
    document = _measured("fix-earlier-criteria", Runs())
    assert document["counts"]["published"] == {"layers": 5, "earlier": 1, "later": 5}
    published = document["regimes"]["published"]
    assert published["departure"]["value"] == pytest.approx(0.063019 / 0.044975)
    assert f"{published['layers'][3]:.4f}" == "1.2059"
    assert published["logits_cosine"] is None


def test_a_departure_counts_alike_in_both_directions() -> None:
    for ratio in (1.3, 1.0 / 1.3):
        regime = _measured("fix-earlier-criteria", Runs(ratio))["regimes"]["arithmetic"]
        assert regime["departure"]["value"] == pytest.approx(1.3)
        assert regime["typical"]["value"] == pytest.approx(1.0)


def test_the_earlier_criteria_fail_on_the_published_layers_and_on_a_cosine_below() -> None:
    document = _verdict("fix-earlier-criteria", Runs())
    assert document["verdict"] == "falsified"
    assert "1 of 5 are within a tenth" in document["found"]
    assert document["regimes"]["arithmetic"]["clauses"][0]["state"] == "holds"


def test_runs_that_meet_the_criteria_change_the_verdict() -> None:
    document = _verdict("fix-earlier-criteria", Runs(1.02, 0.99999))
    assert document["verdict"] == "regime-dependent"
    assert "arithmetic, option-a, option-b" in document["reason"]


def test_published_layers_within_a_tenth_leave_the_missing_logits() -> None:
    """Better published layers would no longer fail; without logits they would not hold either."""
    asked = CONTRACT.falsifier("fix-earlier-criteria").measurement
    parameters = json.loads(json.dumps(asked.parameters))
    parameters["published"]["last_token_a"] = parameters["published"]["last_token_b"]
    document = measure(parameters, asked.regimes, asked.seeds, Runs(1.02, 0.99999))
    assert verdict("acceptance", "fix-earlier-criteria", document)["verdict"] == "inconclusive"


def test_unlike_things_inside_the_band_falsify_and_outside_of_it_support(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside = _verdict("fix-later-band", Runs(spread=1.2))
    assert inside["verdict"] == "falsified"
    assert "5 given layers" in inside["found"]
    assert _verdict("fix-later-band", Runs(spread=3.0))["verdict"] == "regime-dependent"

    def apart(seed: int) -> F64:
        return np.full((2, LAYERS), 4.0)

    # A statistic that saw the order of channels would notice the shuffled values too.
    monkeypatch.setattr(acceptance, "_shuffled", apart)
    assert _verdict("fix-later-band", Runs(spread=3.0))["verdict"] == "supported"


def test_a_departure_that_is_always_one_is_found_by_the_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "_middle", lambda sample: np.zeros(len(sample)))
    assert _verdict("fix-later-band", Runs(spread=3.0))["verdict"] in ("vacuous", "inconclusive")


def test_the_stds_and_counts_of_the_published_prompt_are_kept() -> None:
    runs = Runs(1.3)
    document = _measured("fix-earlier-criteria", runs)
    assert document["counts"]["arithmetic"] == {"layers": LAYERS, "earlier": LAYERS - 1, "later": LAYERS}
    rows = runs.trace.filter(
        (pl.col("prompt") == "two-plus-two") & (pl.col("tap") == "ffn_out") & (pl.col("scope") == "all")
    )
    kept = [row["all"] for row in document["stds"]["ffn_out"]]
    assert kept == pytest.approx(rows.sort("layer")["std"].to_list())
    assert document["fidelity"]["closer_to_teacher"] == "B"


def test_missing_evidence_is_not_run_and_the_evidence_is_named() -> None:
    assert inputs({}) == ["divergence.parquet", "trace/candidate.f32.parquet"]
    assert inputs({"fidelity": True})[-1] == "fix_scope.json"
    assert _measured("fix-later-band", NOWHERE)["status"] == "not-run"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda p: p.pop("published"), "published"),
        (lambda p: p["published"]["last_token_b"].pop("27"), "published"),
        (lambda p: p.update(bands={"earlier": [1.0]}), "bands"),
        (lambda p: p.pop("tap"), "tap"),
    ],
)
def test_a_malformed_parameter_is_one_input_error(edit: Callable[[dict[str, Any]], Any], said: str) -> None:
    asked = CONTRACT.falsifier("fix-later-band").measurement
    parameters = json.loads(json.dumps(asked.parameters))
    edit(parameters)
    with pytest.raises(InputError, match=f"`{said}`"):
        measure(parameters, asked.regimes, asked.seeds, Runs())


def test_an_unknown_comparison_is_named() -> None:
    asked = CONTRACT.falsifier("fix-later-band").measurement
    with pytest.raises(InputError, match="expected one of published, pair, shuffled"):
        measure(asked.parameters, {"a": {"compared": "other-model"}}, [1], Runs())


def test_the_same_evidence_gives_the_same_bytes() -> None:
    first, second = (json.dumps(_measured("fix-earlier-criteria", Runs()), allow_nan=False) for _ in range(2))
    assert first == second
