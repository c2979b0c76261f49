from __future__ import annotations

import copy
import json

import polars as pl
import pytest
from tests.report import helpers

from driftscope.errors import InputError
from driftscope.report.build import KEYS, build_report
from driftscope.report.schema import validate_report

SPECIFIED_KEYS = [
    "schema_version",
    "name",
    "inputs",
    "admissibility",
    "weights",
    "divergence",
    "decomposition",
    "falsifiers",
    "published",
    "fix_scope",
    "impact",
    "gates",
    "verdict",
]


def test_keys_are_exactly_the_specified_ones() -> None:
    assert list(KEYS) == SPECIFIED_KEYS
    for evidence in ({"name": "empty"}, helpers.synthetic_evidence(layers=2)):
        report = build_report(evidence)
        assert list(report) == SPECIFIED_KEYS
        validate_report(report, "report")


def test_what_is_absent_is_not_run_and_never_a_pass() -> None:
    report = build_report({"name": "empty"})
    for key in ("weights", "divergence", "decomposition", "fix_scope", "impact"):
        assert report[key]["status"] == "not-run"
        assert report[key]["reason"]
    assert report["admissibility"]["status"] == "not-run"
    assert {check["status"] for check in report["admissibility"]["checks"]} == {"not-run"}
    assert [item["verdict"] for item in report["falsifiers"] + report["published"]] == ["not-run"] * 2
    assert [gate["status"] for gate in report["gates"]] == ["not-run"]
    assert report["verdict"]["class"] == "inconclusive"


def test_building_is_pure_and_repeats() -> None:
    evidence = helpers.synthetic_evidence(layers=2)
    before = copy.deepcopy(
        {key: value for key, value in evidence.items() if not isinstance(value, pl.DataFrame)}
    )
    first, second = (json.dumps(build_report(evidence)) for _ in range(2))
    assert first == second
    after = {key: value for key, value in evidence.items() if not isinstance(value, pl.DataFrame)}
    assert str(after) == str(before)


def test_prompts_are_named_by_digest_and_count() -> None:
    inputs = build_report(helpers.synthetic_evidence(layers=1))["inputs"]
    assert inputs["prompts"][0] == {"id": "arithmetic", "sha256": helpers.digest("arithmetic"), "count": 7}
    assert inputs["texts"][0]["count"] == 64


def test_evidence_headers_are_listed_once_and_taken_out_of_sections() -> None:
    evidence = helpers.synthetic_evidence(layers=2)
    evidence["impact"] = {**evidence["impact"], "evidence": {"inputs": {}, "code": "0"}}
    report = build_report(evidence)
    assert "evidence" not in report["impact"]
    files = [item["file"] for item in report["inputs"]["evidence"]]
    assert files == sorted(evidence["headers"])


def test_map_holds_the_median_over_prompts_in_topological_order() -> None:
    evidence = helpers.synthetic_evidence(layers=3)
    pair = build_report(evidence)["divergence"]["pairs"][0]
    assert pair["pair"] == "teacher.f32|candidate.f32"
    assert pair["scope"] == "all-but-first"
    assert pair["tokens"] == sum(helpers.PROMPTS.values()) - len(helpers.PROMPTS)
    assert [(cell["layer"], cell["tap"]) for cell in pair["map"]] == list(helpers.taps(3))
    frame = evidence["divergence"].filter(
        pl.col("pair") == pair["pair"], pl.col("scope") == "all-but-first", pl.col("layer") == 1
    )
    expected = frame.filter(pl.col("tap") == "ffn_out")["nmse"].median()
    cell = next(cell for cell in pair["map"] if (cell["layer"], cell["tap"]) == (1, "ffn_out"))
    assert cell["nmse"] == pytest.approx(expected, rel=1e-15)


def test_a_prompt_of_one_token_widens_the_scope() -> None:
    evidence = helpers.synthetic_evidence(layers=1)
    frame = evidence["divergence"]
    evidence["divergence"] = frame.filter(
        (pl.col("prompt") != "story") | (pl.col("scope") != "all-but-first")
    )
    assert {pair["scope"] for pair in build_report(evidence)["divergence"]["pairs"]} == {"all"}


def test_different_populations_are_inadmissible() -> None:
    evidence = helpers.synthetic_evidence(layers=2)
    traces = dict(evidence["traces"])
    at = (pl.col("layer") == 1) & (pl.col("tap") == "ffn_swiglu") & (pl.col("scope") == "all")
    traces["candidate.f32"] = traces["candidate.f32"].with_columns(
        pl.when(at).then(576).otherwise(pl.col("count")).alias("count")
    )
    evidence["admissibility"] = helpers.admissibility_document(traces)
    report = build_report(evidence)
    failing = [check for check in report["admissibility"]["checks"] if check["status"] == "fails"]
    assert [check["id"] for check in failing] == ["same-count"]
    assert report["verdict"]["class"] == "inadmissible"
    assert "layers.1.ffn_swiglu" in report["verdict"]["summary"]
    assert "KL" not in report["verdict"]["summary"]


def test_different_token_ids_are_inadmissible() -> None:
    evidence = helpers.synthetic_evidence(layers=1)
    other = helpers.digest("others")
    evidence["admissibility"] = helpers.admissibility_document(evidence["traces"], candidate_f32=other)
    report = build_report(evidence)
    assert report["admissibility"]["status"] == "inadmissible"
    assert report["verdict"]["class"] == "inadmissible"
    assert "token ids" in report["verdict"]["summary"]


def test_unchecked_traces_are_not_admissible() -> None:
    evidence = helpers.synthetic_evidence(layers=1)
    del evidence["admissibility"]
    report = build_report(evidence)
    assert report["admissibility"]["status"] == "not-run"
    assert report["verdict"]["class"] == "inconclusive"


def test_weights_are_counted_by_relation_and_the_worst_come_first() -> None:
    evidence = helpers.synthetic_evidence(layers=2)
    names = helpers.tensor_names(2)
    odd = "model.layers.1.mlp.down_proj.weight"
    evidence["sweep_summary"]["kinds"][odd] = "different"
    weights = build_report(evidence)["weights"]
    assert sum(weights["relations"].values()) == weights["tensors"] == len(names)
    assert weights["worst"][0]["tensor"] == odd
    assert weights["first_unlike"] == {"tensor": odd, "relation": "different", "layer": 1, "op": "ffn_out"}
    quantized = next(row for row in weights["by_dtype"] if row["dtype_b"] == "Q4_K")
    assert quantized["nmse_over_expected_max"] == pytest.approx(quantized["nmse_max"] / 0.005)


def test_judged_items_have_every_field_in_the_order_of_their_ids() -> None:
    evidence = {
        "name": "x",
        "falsifiers": [{"id": "b", "verdict": "supported"}, {"id": "a", "verdict": "vacuous"}],
    }
    items = build_report(evidence)["falsifiers"]
    assert [item["id"] for item in items] == ["a", "b"]
    assert all(set(item) == {"id", "verdict", "asked", "found", "would_change", "figures"} for item in items)


def test_a_document_that_is_no_object_is_refused() -> None:
    with pytest.raises(InputError, match="expected an object"):
        build_report({"name": "x", "impact": ["not", "an", "object"]})
