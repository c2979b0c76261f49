"""A candidate with a NaN among its weights: counted, reported, and never a pass."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from tests.workflow.case import CONFIG, Case, tiny_model_tensors, write_model

pytestmark = pytest.mark.slow


def test_a_nan_in_a_weight_is_counted_and_reported(case: Case) -> None:
    tensors = tiny_model_tensors()
    tensors["blk.1.ffn_up.weight"][3, 5] = np.nan
    write_model(case.folder / "config/models/broken.gguf", tensors)
    case.configure(models={**CONFIG["models"], "candidate": {"source": "file:models/broken.gguf"}})
    case.lock()
    done = case.run()
    assert done.returncode == 0, done.stdout + done.stderr

    sweep = pl.read_parquet(case.results / "sweep.parquet").filter(pl.col("nan_b") > 0)
    assert sweep["tensor"].to_list() == ["model.layers.1.mlp.up_proj.weight"]
    row = sweep.row(0, named=True)
    assert (row["nan_a"], row["nan_b"], row["element_count"] - row["compared_count"]) == (0, 1, 1)
    trace = pl.read_parquet(case.results / "trace/candidate.f32.parquet")
    first = trace.filter(pl.col("nan_count") > 0).row(0, named=True)
    assert (first["layer"], first["tap"]) == (1, "ffn_up")

    report = json.loads(case.report.read_text(encoding="utf-8"))
    verdict = report["verdict"]
    assert (verdict["class"], verdict["layer"], verdict["op"]) == ("bug", 1, "ffn_up")
    assert "not finite" in verdict["summary"]
    for part in ("decomposition", "impact"):
        assert report[part]["status"] == "inadmissible"
        assert "not finite" in report[part]["reason"]
    assert report["fix_scope"]["status"] == "not-run"
    gates = {gate["id"]: gate["status"] for gate in report["gates"]}
    assert gates["no-different-tensors"] == "fails"
    assert "holds" not in {gates["kl-mean"], gates["same-top-token"], gates["decomposition-controls"]}
    assert case.driftscope("gate", f"results/{case.results.name}_report.json").returncode == 1
