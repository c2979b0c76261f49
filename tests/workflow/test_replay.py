"""The replay of a whole case: clean as it is, and with a fault put into the candidate's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.workflow.case import CONFIG, LAYERS, Case, one_line, tiny_model_tensors, write_model

pytestmark = pytest.mark.slow

PATHS = {
    "teacher.f32",
    "candidate.f32",
    "candidate.int8-dot",
    "candidate.llama.cpp",
    "teacher.transformers",
}


def document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_every_path_is_replayed_and_clean(finished: Case) -> None:
    local = document(finished.report)["divergence"]["local"]
    assert {path["path"] for path in local["paths"] if path["status"] == "done"} == PATHS
    assert local["fault"] is None
    assert local["flagged"] == 0
    # 17 ops a layer, two of them tested as q, k and v; then the embedding, the last norm and the head.
    of_ours = next(path for path in local["paths"] if path["path"] == "candidate.int8-dot")
    assert of_ours["tested"] == LAYERS * (17 + 2 * 2) + 3
    rows = pl.read_parquet(finished.results / "replay/candidate.int8-dot.parquet")
    assert rows.filter(pl.col("component") == "engine")["energy"].max() == 0.0
    theirs = pl.read_parquet(finished.results / "replay/candidate.llama.cpp.parquet")
    assert 0.0 < float(theirs.filter(pl.col("component") == "engine")["nmse"].max() or 0.0) < 1e-6


def test_the_error_of_every_path_is_split(finished: Case) -> None:
    rows = pl.read_parquet(finished.results / "propagation.parquet")
    assert set(rows["pair"]) == {f"teacher.f32|{path}" for path in PATHS - {"teacher.f32"}}
    whole = rows["energy_out"].to_numpy()
    assert np.all(np.abs(rows["unexplained"].to_numpy()) <= 1e-12 * np.maximum(whole, 1e-300))


def test_a_fault_in_the_file_is_named(case: Case) -> None:
    """Gate and up of the second layer exchanged: the same shapes, so that everything loads."""
    tensors = tiny_model_tensors()
    gate, up = "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    write_model(case.folder / "config/models/faulty.gguf", tensors)
    case.configure(models={**CONFIG["models"], "candidate": {"source": "file:models/faulty.gguf"}})
    case.lock()
    path = "candidate.llama.cpp"
    done = case.snakemake(f"results/tiny/replay/{path}.json")
    assert done.returncode == 0, done.stderr
    first = document(case.results / f"replay/{path}.json")["first"]
    place = (first["layer"], first["tap"], first["component"], first["class"])
    assert place == (1, "ffn_gate", "model", "gate-up-swapped")


def divergence(case: Case, other: str) -> tuple[str, ...]:
    return (
        *("stage", "divergence", "--teacher", "results/tiny/models/teacher.json"),
        *("--trace", "a=results/tiny/trace/teacher.f32/trace.json", "--trace", f"b={other}/trace.json"),
        *("--pair", "a|b", "--part", "0/1", "--out", str(case.folder / "out.parquet")),
    )


def half_a_trace(case: Case, **changes: Any) -> str:
    """A trace of the candidate that keeps the first chunk of layers only."""
    folder = case.results / "trace/candidate.f32"
    about = document(folder / "trace.json")
    about |= {"files": [name for name in about["files"] if name == "taps_0.safetensors"], **changes}
    (folder / "trace.json").write_text(json.dumps(about), encoding="utf-8")
    return str(folder)


def test_a_tap_that_one_side_lacks_without_a_word_is_refused(case: Case) -> None:
    line = one_line(case.driftscope(*divergence(case, half_a_trace(case))))
    assert "layers.1.attn_norm is kept on one side only" in line
    assert not (case.folder / "out.parquet").exists()


def test_a_tap_that_one_side_declares_absent_is_left_out(case: Case) -> None:
    taps = document(case.results / "trace/candidate.f32/trace.json")["taps"]
    absent = {tap: {**about, "absent": "not kept"} for tap, about in taps.items()}
    done = case.driftscope(*divergence(case, half_a_trace(case, taps=absent)))
    assert done.returncode == 0, done.stderr
    assert pl.read_parquet(case.folder / "out.parquet")["layer"].max() == 0


def test_traces_of_other_tokens_are_refused(case: Case) -> None:
    about = document(case.results / "trace/candidate.f32/trace.json")
    about["prompts"][0]["ids"][0] += 1
    line = one_line(case.driftscope(*divergence(case, half_a_trace(case, prompts=about["prompts"]))))
    assert "the token ids differ" in line
