from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from tests.report import helpers, replays

from driftscope.report.build import build_report
from driftscope.report.verdict import CLASSES


def verdict_of(evidence: Any) -> dict[str, Any]:
    verdict = build_report(evidence)["verdict"]
    assert verdict["class"] in CLASSES
    assert verdict["summary"].startswith(verdict["headline"])
    return verdict


def relate(evidence: Any, tensors: list[str], relation: str, /, **summary: Any) -> None:
    kinds = evidence["sweep_summary"]["kinds"]
    evidence["sweep_summary"] = {"kinds": {**kinds, **dict.fromkeys(tensors, relation)}, **summary}


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
    evidence["replay"] = replays.replay_document()
    limits = verdict_of(evidence)["limits"]
    assert not any("replay was not run" in limit for limit in limits)
    assert any("transformers" in limit and "pip install" in limit for limit in limits)


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
    assert "context_length" in " ".join(verdict["reasons"])


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


TWO_TRAININGS = {
    "conclusion": "different-weights",
    "statement": "Different weights: 21 of 22 matrices differ, as further training leaves",
}


def test_two_trainings_are_different_weights_in_the_sweeps_words(evidence: Any) -> None:
    names = [name for name in helpers.tensor_names(3) if "proj" in name]
    relate(evidence, names, "different", **TWO_TRAININGS)
    verdict = verdict_of(evidence)
    assert verdict["class"] == "different-weights"
    assert verdict["layer"] is None
    assert verdict["reasons"][0] == "21 of 22 matrices differ, as further training leaves"


def test_a_transform_that_nobody_declared_is_a_bug_with_its_class(evidence: Any) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    found = {
        "relation": "quantized-from-under:rows-interleaved(8)",
        "class": "row-permutation-heads",
        "transforms": ["rows-interleaved(8)"],
        "evidence": {"nmse_under": 0.004, "expected_nmse_under": 0.005, "alternatives_tried": 17},
    }
    relate(evidence, [name], "transformed", conclusion="transformed", found={name: found})
    report = build_report(evidence)
    verdict = report["verdict"]
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", 1, "qkv_matmul")
    assert "rows-interleaved(8)" in verdict["reasons"][0]
    assert "another number of heads" in verdict["reasons"][0]
    (fault,) = report["weights"]["at_fault"]
    assert (fault["class"], fault["alternatives_tried"]) == ("row-permutation-heads", 17)


UP, DOWN = "model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def test_a_corrupt_block_is_a_bug_that_names_tensor_and_block(evidence: Any) -> None:
    helpers.put_findings(evidence, [helpers.flipped_bit(UP), helpers.flipped_bit(DOWN, 7, (0, 256))])
    report = build_report(evidence)
    verdict = report["verdict"]
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", 1, "ffn_out")
    assert verdict["headline"].endswith("It starts at layer 1, ffn_out: corrupt block of a weight.")
    first = f"{DOWN} holds a corrupt block (row 7, columns 0 to 255), the first of 2 in the model's order"
    assert verdict["reasons"][0] == first
    for reason, name in zip(verdict["reasons"][1:3], (DOWN, UP), strict=True):
        assert reason.startswith(f"{name}, row ")
        assert reason.endswith("Class: corrupt-block")
    assert report["weights"]["first_unlike"]["relation"] == "quantized-from"


def test_many_corrupt_blocks_are_counted(evidence: Any) -> None:
    helpers.put_findings(evidence, [helpers.flipped_bit(UP, row) for row in range(5)])
    reasons = verdict_of(evidence)["reasons"]
    assert sum("Class: corrupt-block" in reason for reason in reasons) == 3
    assert "2 corrupt blocks more; they are in 1 tensor" in reasons


def test_outlying_blocks_are_no_bug(evidence: Any) -> None:
    odd = {**helpers.flipped_bit(UP), "kind": "outlying-error", "corrupt": False}
    helpers.put_findings(evidence, [odd])
    report = build_report(evidence)
    assert report["verdict"]["class"] == "expected-quantization-noise"
    assert (report["weights"]["blocks"]["found"], report["weights"]["corrupt_tensors"]) == (1, 0)


def test_a_different_tensor_before_a_corrupt_one_leads(evidence: Any) -> None:
    relate(evidence, [DOWN], "different")
    helpers.put_findings(evidence, [helpers.flipped_bit(UP)])
    verdict = verdict_of(evidence)
    assert verdict["reasons"][0].startswith(f"{DOWN} is different, the first of 2")
    assert verdict["reasons"][1].startswith(f"{UP}, row 5")
    assert "corrupt" not in verdict["headline"]


def test_two_trainings_stay_so_with_corrupt_blocks(evidence: Any) -> None:
    relate(evidence, [UP, DOWN], "different", **TWO_TRAININGS)
    helpers.put_findings(evidence, [helpers.flipped_bit(UP)])
    assert verdict_of(evidence)["class"] == "different-weights"


@pytest.mark.parametrize(("component", "found"), [("model", "corrupt block"), ("engine", "engine bug")])
def test_a_replay_that_flags_the_corrupt_op_agrees(evidence: Any, component: str, found: str) -> None:
    fault = {"class": "unexplained", "layer": 2, "tap": "ffn_up", "part": "", "component": component}
    evidence["replay"] = replays.replay_document([replays.faulty("candidate.f32", **fault)])
    helpers.put_findings(evidence, [helpers.flipped_bit(UP)])
    verdict = verdict_of(evidence)
    assert (verdict["layer"], verdict["op"]) == (2, "ffn_up")
    assert found in verdict["headline"]


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


def replay(evidence: Any, *faulty: dict[str, Any]) -> dict[str, Any]:
    """Judge the case with a replay in which these paths stand for the clean ones of their name."""
    changed = {path["path"]: path for path in faulty}
    paths = [changed.get(path) or replays.replayed(path) for path in replays.PATHS]
    evidence["replay"] = replays.replay_document(paths)
    return verdict_of(evidence)


def test_a_clean_replay_is_a_reason_with_its_count_of_ops(evidence: Any) -> None:
    verdict = replay(evidence)
    assert verdict["class"] == "expected-quantization-noise"
    ops = 4 * replays.replayed("candidate.f32")["tested"]
    assert f"Every one of {ops} ops of paths {', '.join(replays.PATHS)} is at its floor" in verdict["reasons"]
    assert "tensors" in verdict["summary"]


@pytest.mark.parametrize("component", ["engine", "model"])
def test_a_flagged_op_is_a_bug_with_layer_op_and_class(evidence: Any, component: str) -> None:
    verdict = replay(evidence, replays.faulty(component=component))
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", 1, "q_post_rope")
    for words in ("layer 1, q_post_rope", "rope-pairing", "candidate.llama.cpp"):
        assert words in verdict["summary"]
    assert ("engine bug" in verdict["headline"]) == (component == "engine")
    assert "NMSE 3.1e-14 of 0.62" in " ".join(verdict["reasons"])
    clean = next(reason for reason in verdict["reasons"] if "at its floor" in reason)
    assert "candidate.llama.cpp" not in clean


def test_the_price_of_the_declared_arithmetic_is_no_bug(evidence: Any) -> None:
    entry = {**replays.faulty(component="arithmetic"), "first": None}
    assert replay(evidence, entry)["class"] == "expected-quantization-noise"


def test_flags_without_a_diagnosis_are_a_bug_of_no_known_class(evidence: Any) -> None:
    entry = {**replays.faulty(), "first": None}
    verdict = replay(evidence, entry)
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", 1, "q_post_rope")
    assert "unexplained" in verdict["summary"]


def test_a_capture_point_is_named_and_is_no_divergence(evidence: Any) -> None:
    point = {
        "layer": 1,
        "tap": "attn_out",
        "found": "after the residual",
        "layers": [1, 2],
        "statement": "found so",
    }
    flagged = [replays.flag(1, "attn_out", "engine"), replays.flag(1, "post_attn_residual", "engine")]
    entry = replays.replayed("candidate.llama.cpp", flagged=flagged, capture_points=[point])
    verdict = replay(evidence, entry)
    assert verdict["class"] == "expected-quantization-noise"
    assert any(
        "layer 1, attn_out at another capture point (after the residual) in 2 layers" in reason
        for reason in verdict["reasons"]
    )


def test_a_first_divergence_of_the_class_capture_point_is_none(evidence: Any) -> None:
    verdict = replay(evidence, replays.faulty(**{"class": "capture-point"}))
    assert verdict["class"] == "expected-quantization-noise"


def test_an_arithmetic_that_explains_a_flagged_path_better_is_named(evidence: Any) -> None:
    entry = {**replays.faulty(tap="ffn_up"), "fits_better": replays.guess()}
    reasons = " ".join(replay(evidence, entry)["reasons"])
    assert "explains candidate.llama.cpp better: Integer products with q8_K activations" in reasons


def test_a_teachers_path_at_fault_is_named(evidence: Any) -> None:
    verdict = replay(evidence, replays.faulty("teacher.f32"))
    assert verdict["class"] == "bug"
    assert verdict["headline"].startswith("This is an engine bug of teacher.f32,")


def test_the_candidates_fault_leads_and_the_others_are_named(evidence: Any) -> None:
    verdict = replay(
        evidence,
        replays.faulty("teacher.f32", layer=0, tap="ffn_norm"),
        replays.faulty("candidate.f32", layer=2, component="model"),
        replays.faulty("candidate.llama.cpp", layer=2, component="model"),
    )
    assert (verdict["layer"], verdict["op"]) == (2, "q_post_rope")
    reasons = " ".join(verdict["reasons"])
    assert "The same op is flagged on candidate.llama.cpp" in reasons
    assert "teacher.f32 is flagged too, first at layer 0, ffn_norm" in reasons


def test_a_fault_outside_the_layers_has_no_layer(evidence: Any) -> None:
    entry = replays.faulty(layer=-1, tap="lm_head", **{"class": "head-tie"})
    verdict = replay(evidence, entry)
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", None, "lm_head")


def test_different_weights_stay_so_and_get_a_place(evidence: Any) -> None:
    names = [name for name in helpers.tensor_names(3) if "proj" in name]
    relate(evidence, names, "different", **TWO_TRAININGS)
    entry = replays.faulty(layer=0, tap="qkv_matmul", component="model", **{"class": "unexplained"})
    verdict = replay(evidence, entry)
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("different-weights", 0, "qkv_matmul")
    engine = replay(evidence, replays.faulty())
    assert (engine["class"], engine["layer"]) == ("different-weights", None)
    assert "candidate.llama.cpp" in " ".join(engine["reasons"])


def test_a_different_tensor_keeps_its_place(evidence: Any) -> None:
    relate(evidence, ["model.layers.1.self_attn.k_proj.weight"], "different")
    verdict = replay(evidence, replays.faulty(component="model", tap="k_post_rope"))
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", 1, "qkv_matmul")


def test_a_fault_needs_no_sweep(evidence: Any) -> None:
    del evidence["sweep"]
    assert replay(evidence)["class"] == "inconclusive"
    assert replay(evidence, replays.faulty())["class"] == "bug"


def test_inadmissible_sides_stay_inadmissible(evidence: Any) -> None:
    evidence["admissibility"] = helpers.admissibility_document(
        evidence["traces"], candidate_f32=helpers.digest("others")
    )
    assert replay(evidence, replays.faulty())["class"] == "inadmissible"


def test_a_replay_that_tested_nothing_is_no_clean_one(evidence: Any) -> None:
    verdict = replay(evidence, *(replays.replayed(path, tested=0) for path in replays.PATHS))
    assert any("replay was not run" in limit for limit in verdict["limits"])
    assert not any("at its floor" in reason for reason in verdict["reasons"])
