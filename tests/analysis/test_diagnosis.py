"""From a trace to the sentence that says where it starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.analysis.test_comparison import rewritten
from tests.forward.models import write_model

from driftscope.analysis.diagnosis import diagnose, local_map, replay_rows, replayer_of
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.engines import own, transformers
from driftscope.engines.trace import Trace
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.model import ForwardPass

PROMPTS = [("a", [5, 9, 200, 7, 7, 41, 300, 2]), ("b", [3, 17, 90, 12])]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("models")
    teacher = open_artifact(write_model(folder / "teacher", "qwen2", hidden_size=224))
    write_candidate(teacher, folder / "candidate.gguf", scheme="Q8_0")
    return {"teacher": teacher, "candidate": open_artifact(folder / "candidate.gguf")}


@pytest.fixture(scope="module")
def clean(models: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Trace:
    arithmetic = Arithmetic.of("int8-dot", kv_type="f16")
    return own.trace(models["candidate"], PROMPTS, tmp_path_factory.mktemp("clean"), arithmetic)


class Swapped(ForwardPass):
    """Gate and up change places in the layer 1."""

    def project(self, layer: int, site: str, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        other = {"gate": "up", "up": "gate"}.get(site, site)
        return super().project(layer, other if layer == 1 else site, x)


def test_a_clean_trace_is_clean(models: dict[str, Artifact], clean: Trace) -> None:
    found = diagnose(clean, models["candidate"], models["teacher"], path="candidate.int8-dot")
    json.dumps(found, allow_nan=False)
    assert (found["status"], found["path"], found["prompts"]) == ("done", "candidate.int8-dot", 2)
    assert found["tested"] == 3 + 3 * 21
    assert found["flagged"] == found["capture_points"] == []
    assert found["first"] is None
    assert found["arithmetic"]["path"] == "int8-dot"


def test_a_faulty_engine(models: dict[str, Artifact], tmp_path: Path) -> None:
    arithmetic = Arithmetic.of("int8-dot", kv_type="f16")
    faulty = Swapped({"model": models["candidate"]}, arithmetic.policy)
    trace = own.record(faulty, PROMPTS, tmp_path, declared=arithmetic)
    found = diagnose(trace, models["candidate"], models["teacher"])
    json.dumps(found, allow_nan=False)
    first = found["first"]
    assert (first["layer"], first["tap"], first["component"]) == (1, "ffn_gate", "engine")
    assert first["class"] == "gate-up-swapped"
    assert first["statement"]
    assert {(flag["layer"], flag["tap"]) for flag in found["flagged"]} == {(1, "ffn_gate"), (1, "ffn_up")}
    assert found["fits_better"] is None


def test_faulty_weights(models: dict[str, Artifact], tmp_path: Path) -> None:
    """The engine does what its file says; the file is not the reference."""
    other = open_artifact(write_model(tmp_path / "other", "qwen2", hidden_size=224, rms_norm_eps=1e-2))
    trace = own.trace(other, PROMPTS, tmp_path / "trace", Arithmetic.of())
    found = diagnose(trace, other, models["teacher"])
    first = found["first"]
    assert (first["layer"], first["tap"], first["component"]) == (0, "attn_norm", "model")
    assert first["class"] == "norm-eps"
    assert all(flag["component"] == "model" for flag in found["flagged"])
    assert diagnose(trace, other)["first"] is None


def test_a_tap_captured_elsewhere_is_no_divergence(models: dict[str, Artifact], tmp_path: Path) -> None:
    plain = own.trace(models["teacher"], PROMPTS, tmp_path / "plain", Arithmetic.of())

    def changed(key: str, array: Any) -> Any:
        layer = key.split(".")[1] if key.startswith("layers.") else ""
        return plain.tap(int(layer), "qkv_matmul") if key.endswith(".qkv_bias") else array

    found = diagnose(rewritten(plain, tmp_path / "changed", changed), models["teacher"])
    assert found["flagged"] == []
    assert found["first"] is None
    assert "qkv_bias" in {item["tap"] for item in found["capture_points"]}
    assert all(item["statement"] for item in found["capture_points"])


def test_another_engine(models: dict[str, Artifact], tmp_path: Path) -> None:
    options = transformers.TransformersOptions(dtype="bf16")
    trace = transformers.trace(models["teacher"].path, PROMPTS, tmp_path, options)
    found = diagnose(trace, models["teacher"])
    assert found["engine"]["name"] == "transformers"
    assert found["first"] is None


def test_the_wrong_arithmetic_is_told(models: dict[str, Artifact], clean: Trace) -> None:
    """Every matmul is off, and one arithmetic explains them all."""
    found = diagnose(clean, models["candidate"], arithmetic=Arithmetic.of())
    assert found["first"]["tap"] == "qkv_matmul"
    assert found["first"]["statement"].startswith("the matmuls are of another arithmetic")
    assert found["capture_points"] == []
    assert found["fits_better"]["arithmetic"] == clean.manifest.arithmetic.to_dict()  # type: ignore[union-attr]
    assert diagnose(clean, models["candidate"])["fits_better"] is None


def test_rows_that_are_there_are_used(models: dict[str, Artifact], clean: Trace) -> None:
    candidate, teacher = models["candidate"], models["teacher"]
    done: list[tuple[int, int]] = []
    rows = replay_rows(replayer_of(clean, candidate, teacher), progress=lambda *at: done.append(at))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert diagnose(clean, candidate, teacher, rows=rows) == diagnose(clean, candidate, teacher)


def test_only_some_layers(models: dict[str, Artifact], clean: Trace) -> None:
    found = diagnose(clean, models["candidate"], layers=[1])
    assert {item["layer"] for item in found["map"]} == {1}
    assert found["tested"] == 21


def test_the_map_is_the_median_over_prompts() -> None:
    def row(
        prompt: str, part: str, component: str, energy: float, signal: float, predicted: float
    ) -> dict[str, Any]:
        place = {"layer": 0, "tap": "qkv_matmul", "part": part, "prompt": prompt, "component": component}
        return {**place, "energy": energy, "signal_energy": signal, "predicted_energy": predicted}

    rows = [
        *(row("a", "q", "engine", 1.0, 10.0, 2.0), row("a", "k", "engine", 2.0, 20.0, 1.0)),
        *(row("b", "q", "engine", 9.0, 20.0, 3.0), row("b", "k", "engine", 9.0, 10.0, 3.0)),
        *(row("c", "q", "engine", 6.0, 30.0, 1.0), row("a", "q", "model", 3.0, 30.0, 3.0)),
    ]
    (found,) = local_map(rows)
    assert found["engine"] == pytest.approx(0.2)  # of 3/30, 18/30, 6/30
    assert found["model"] == pytest.approx(0.1)
    assert found["arithmetic"] is None
    assert found["total"] == pytest.approx(0.3)
    assert found["predicted"] == pytest.approx(0.2)  # of 3/30 + 3/30, 6/30, 1/30


def test_another_model_is_inadmissible(clean: Trace, tmp_path: Path) -> None:
    other = open_artifact(write_model(tmp_path, "qwen2"))
    found = diagnose(clean, other)
    assert found["status"] == "inadmissible"
    assert "channels" in found["reason"]


def test_a_trace_without_a_single_op_is_inadmissible(
    models: dict[str, Artifact], clean: Trace, tmp_path: Path
) -> None:
    trace = rewritten(clean, tmp_path, lambda key, array: array)
    for file in trace.folder.glob("*.safetensors"):
        file.unlink()
    (trace.folder / "trace.json").write_text(
        json.dumps(dataclasses.replace(clean.manifest, files=(), arrays_sha256="").to_dict())
    )
    found = diagnose(Trace(trace.folder), models["candidate"])
    assert (found["status"], found["reason"]) == (
        "inadmissible",
        "no op has both its output and its inputs in the trace: nothing was tested",
    )
