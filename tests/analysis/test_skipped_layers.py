"""Layers without taps: left out of the run, or only out of the recording."""

from __future__ import annotations

import pytest

from driftscope.analysis.diagnosis import diagnose, replayer_of
from driftscope.analysis.floors import Floors
from driftscope.analysis.skipped_layers import skipped_layers
from driftscope.faultbench.engine import SkippedLayer
from driftscope.faultbench.injection import Site
from driftscope.faultbench.subjects import Subject, Workbench
from driftscope.faultbench.trace_in_memory import record
from driftscope.forward.model import ForwardPass

INTEGER = Subject("qwen2-square", "Q4_K_M", "int8-dot")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_did_not_run_is_found(bench: Workbench, layer: int) -> None:
    site = bench.site(INTEGER)
    engine = SkippedLayer(Site(site.artifact, site.teacher, site.arithmetic, layer))
    trace = record(engine, bench.prompts("qwen2-square", "rows"), site.arithmetic)

    first = diagnose(trace, site.artifact)["first"]

    reader = (-1, "final_norm") if layer == 2 else (layer + 1, "attn_norm")
    assert (first["layer"], first["tap"], first["class"]) == (*reader, "layer-skipped")


@pytest.mark.parametrize("hidden", [{0}, {1}, {2}, {0, 1}])
def test_a_layer_that_was_only_not_recorded_is_not_flagged(bench: Workbench, hidden: set[int]) -> None:
    site = bench.site(INTEGER)
    engine = ForwardPass({"model": site.artifact}, site.arithmetic.policy)
    prompts = bench.prompts("qwen2-square", "rows")
    trace = record(engine, prompts, site.arithmetic, layers={0, 1, 2} - hidden)
    replayer = replayer_of(trace, site.artifact)

    assert skipped_layers(replayer, replayer.rows(), Floors({}), 0.001) == []


def test_no_gap_no_question(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    site = bench.site(INTEGER)
    engine = ForwardPass({"model": site.artifact}, site.arithmetic.policy)
    trace = record(engine, bench.prompts("qwen2-square", "short"), site.arithmetic)
    replayer = replayer_of(trace, site.artifact)
    rows = replayer.rows()
    monkeypatch.setattr("driftscope.analysis.replay.Replayer.rows", lambda *_: pytest.fail("replayed again"))

    assert skipped_layers(replayer, rows, Floors({}), 0.001) == []
