from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from tests.report import helpers

from driftscope.report.build import build_report
from driftscope.report.verdict import CLASSES


def verdict_of(evidence: Any) -> dict[str, Any]:
    verdict = build_report(evidence)["verdict"]
    assert verdict["class"] in CLASSES
    assert verdict["summary"].startswith(verdict["headline"])
    return verdict


def relate(evidence: Any, tensors: list[str], relation: str) -> None:
    relations = evidence["sweep_summary"]["relations"]
    evidence["sweep_summary"] = {"relations": {**relations, **dict.fromkeys(tensors, relation)}}


def silence(evidence: Any, pairs: tuple[str, ...]) -> None:
    evidence["divergence"] = evidence["divergence"].with_columns(
        pl.when(pl.col("pair").is_in(pairs)).then(0.0).otherwise(pl.col("nmse")).alias("nmse")
    )


@pytest.fixture
def evidence() -> Any:
    return helpers.synthetic_evidence(layers=3)


def test_a_clean_quantized_pair_is_expected_noise_with_figures(evidence: Any) -> None:
    verdict = verdict_of(evidence)
    assert verdict["class"] == "expected-quantization-noise"
    assert (verdict["layer"], verdict["op"]) == (None, None)
    for figure in ("256 token positions", "90.6 %", "0.0437 nats", "Weight quantization brings in 93.1 %"):
        assert figure in verdict["summary"]


def test_an_absent_replay_is_named_as_a_limit(evidence: Any) -> None:
    assert any("replay was not run" in limit for limit in verdict_of(evidence)["limits"])
    evidence["local_error"] = {"status": "done"}
    assert not any("replay" in limit for limit in verdict_of(evidence)["limits"])


def test_identical_needs_identical_tensors_and_identical_traces(evidence: Any) -> None:
    relate(evidence, helpers.tensor_names(3), "identical")
    silence(evidence, helpers.PAIRS)
    assert verdict_of(evidence)["class"] == "identical"


def test_same_weights_on_integer_arithmetic_are_noise(evidence: Any) -> None:
    relate(evidence, helpers.tensor_names(3), "identical")
    silence(evidence, helpers.PAIRS[:1])
    verdict = verdict_of(evidence)
    assert verdict["class"] == "expected-quantization-noise"
    assert "integer arithmetic" in verdict["reasons"][0]


def test_same_weights_that_part_on_the_same_arithmetic_are_a_bug(evidence: Any) -> None:
    relate(evidence, helpers.tensor_names(3), "identical")
    frame = evidence["divergence"]
    before = (pl.col("layer") < 1) | ((pl.col("layer") == 1) & ~pl.col("tap").str.contains("rope|scores"))
    at_fault = (pl.col("pair") == helpers.PAIRS[0]) & before & (pl.col("layer") >= -1)
    evidence["divergence"] = frame.with_columns(
        pl.when(at_fault).then(0.0).otherwise(pl.col("nmse")).alias("nmse")
    )
    verdict = verdict_of(evidence)
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", 1, "q_post_rope")
    assert "torch_dtype" in " ".join(verdict["reasons"])


def test_a_few_different_tensors_are_a_bug_at_the_first_in_the_models_order(evidence: Any) -> None:
    relate(
        evidence,
        ["model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"],
        "different",
    )
    verdict = verdict_of(evidence)
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", 1, "qkv_matmul")
    assert "layer 1, qkv_matmul" in verdict["headline"]


def test_non_finite_weights_are_a_bug_wherever_else_agrees(evidence: Any) -> None:
    relate(evidence, ["model.embed_tokens.weight"], "non-finite")
    verdict = verdict_of(evidence)
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", None, "embedding")


def test_mostly_different_tensors_are_different_weights(evidence: Any) -> None:
    names = [name for name in helpers.tensor_names(3) if "proj" in name]
    relate(evidence, names, "different")
    verdict = verdict_of(evidence)
    assert verdict["class"] == "different-weights"
    assert verdict["layer"] is None


def test_non_finite_activations_are_a_bug_at_the_first_op(evidence: Any) -> None:
    traces = dict(evidence["traces"])
    late = (pl.col("layer") == 1) & pl.col("tap").is_in(["ffn_out", "post_ffn_residual"])
    traces["candidate.int8-dot"] = traces["candidate.int8-dot"].with_columns(
        pl.when(late).then(3).otherwise(pl.col("nan_count")).alias("nan_count")
    )
    evidence["traces"] = traces
    verdict = verdict_of(evidence)
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", 1, "ffn_out")
    assert "candidate.int8-dot" in verdict["reasons"][0]


def test_masked_scores_on_both_sides_are_no_fault(evidence: Any) -> None:
    masked = pl.when(pl.col("tap") == "attn_scores").then(21).otherwise(0).alias("inf_count")
    evidence["traces"] = {path: frame.with_columns(masked) for path, frame in evidence["traces"].items()}
    assert verdict_of(evidence)["class"] == "expected-quantization-noise"


def test_incomplete_coverage_is_inadmissible(evidence: Any) -> None:
    inventory = evidence["sweep_inventory"]
    evidence["sweep_inventory"] = {
        **inventory,
        "missing": ["model.norm.weight"],
        "coverage": {"expected": 29, "compared": 28},
    }
    verdict = verdict_of(evidence)
    assert verdict["class"] == "inadmissible"
    assert "model.norm.weight" in verdict["summary"]


def test_nothing_compared_is_never_a_pass(evidence: Any) -> None:
    evidence["sweep"] = evidence["sweep"].with_columns(pl.lit(0, pl.Int64).alias("compared_count"))
    assert verdict_of(evidence)["class"] == "inconclusive"


@pytest.mark.parametrize("part", ["sweep", "divergence", "decomposition"])
def test_without_a_part_that_it_rests_on_it_is_inconclusive(evidence: Any, part: str) -> None:
    del evidence[part]
    assert verdict_of(evidence)["class"] == "inconclusive"


def test_unclassified_tensors_are_inconclusive(evidence: Any) -> None:
    del evidence["sweep_summary"]
    verdict = verdict_of(evidence)
    assert verdict["class"] == "inconclusive"
    assert "not classified" in verdict["reasons"][0]


@pytest.mark.parametrize(
    "controls",
    [
        {"no_op_energy": 1e-9, "all_promoted_share": 1.0, "all_promoted_exact": True},
        {"no_op_energy": 0.0, "all_promoted_share": 0.99, "all_promoted_exact": False},
        {},
    ],
)
def test_a_control_that_fails_or_was_not_run_is_inconclusive(evidence: Any, controls: dict[str, Any]) -> None:
    evidence["decomposition"] = {**evidence["decomposition"], "controls": controls}
    assert verdict_of(evidence)["class"] == "inconclusive"


def test_too_few_positions_are_inconclusive(evidence: Any) -> None:
    few = {"status": "inadmissible", "reason": "12 token positions, at least 192 are asked for", "shares": []}
    evidence["decomposition"] = {**evidence["decomposition"], **few}
    verdict = verdict_of(evidence)
    assert verdict["class"] == "inconclusive"
    assert "12 token positions" in " ".join(verdict["reasons"])


def test_a_contradicting_falsifier_is_named(evidence: Any) -> None:
    evidence["falsifiers"] = [
        *evidence["falsifiers"],
        {"id": "local-noise", "verdict": "falsified", "contradicts": ["expected-quantization-noise"]},
    ]
    verdict = verdict_of(evidence)
    assert verdict["class"] == "inconclusive"
    assert "local-noise" in verdict["reasons"][0]
