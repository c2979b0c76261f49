from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.analysis.recorded import model, recorded, rewritten

from driftscope.analysis.capture_points import CaptureReport, capture_points
from driftscope.analysis.clean_engines import CleanEngine
from driftscope.analysis.first_divergence import flags
from driftscope.analysis.floors import Floors
from driftscope.analysis.replay import Replayer
from driftscope.artifacts.model import Artifact
from driftscope.engines.trace import Trace
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.weights import Weights

pytestmark = pytest.mark.slow

LAYERS = (0, 1)


def report_of(trace: Trace, artifact: Artifact, floors: Floors) -> CaptureReport:
    replayer = Replayer(trace, artifact, components=("engine",))
    found = flags(replayer.rows(), floors, arithmetic=replayer.arithmetic)
    return capture_points(trace, replayer, found, floors)


def vector(artifact: Artifact, name: str) -> Any:
    ref = artifact.tensors[name]
    return Weights(artifact).vector(name, ref.shape[0])


def same_layer(tap: str) -> Callable[[Trace, Artifact, int], Any]:
    return lambda trace, artifact, layer: trace.tap(layer, tap)


def without_weight(trace: Trace, artifact: Artifact, layer: int) -> Any:
    return trace.tap(layer, "attn_norm") / vector(artifact, f"model.layers.{layer}.input_layernorm.weight")


def queries(trace: Trace, artifact: Artifact, layer: int) -> Any:
    config = artifact.config
    return trace.tap(layer, "qkv_bias")[:, : config.num_heads * config.head_dim]


def unscaled(trace: Trace, artifact: Artifact, layer: int) -> Any:
    factor = np.float32(artifact.config.head_dim**0.5)
    return [part * factor for part in trace.ragged(layer, "attn_scores")]


def before_the_layer(trace: Trace, artifact: Artifact, layer: int) -> Any:
    return trace.tap(-1, "embedding") if layer == 0 else trace.tap(layer - 1, "post_ffn_residual")


def halved(trace: Trace, artifact: Artifact, layer: int) -> Any:
    return trace.tap(layer, "ffn_up") / 2


ELSEWHERE: list[tuple[str, str, Callable[[Trace, Artifact, int], Any], str]] = [
    ("qwen2", "qkv_bias", same_layer("qkv_matmul"), "before the bias"),
    ("qwen2", "qkv_matmul", same_layer("qkv_bias"), "after the bias"),
    ("llama", "attn_out", same_layer("post_attn_residual"), "after the residual"),
    ("llama", "ffn_out", same_layer("post_ffn_residual"), "after the residual"),
    ("llama", "post_attn_residual", same_layer("attn_out"), "before the residual"),
    ("llama", "attn_norm", without_weight, "before the norm's weight"),
    ("llama", "q_post_rope", queries, "before RoPE"),
    ("qwen3", "q_post_rope", queries, "before RoPE"),
    ("mistral", "attn_scores", unscaled, "before the scale"),
    ("llama", "ffn_silu", same_layer("ffn_swiglu"), "after the product with ffn_up"),
    ("llama", "ffn_swiglu", same_layer("ffn_silu"), "before the product with ffn_up"),
    ("llama", "ffn_gate", same_layer("ffn_silu"), "after the activation"),
    ("llama", "post_ffn_residual", before_the_layer, "of the layer before"),
    ("llama", "ffn_up", halved, "times a factor of 0.5"),
]


@pytest.mark.parametrize(("architecture", "tap", "value", "where"), ELSEWHERE, ids=lambda x: str(x)[:24])
@pytest.mark.parametrize("fmt", ["F32", "Q4_K"])
def test_a_tap_recorded_elsewhere_is_a_finding_and_no_divergence(
    tmp_path: Path,
    floors: Floors,
    architecture: str,
    tap: str,
    value: Callable[[Trace, Artifact, int], Any],
    where: str,
    fmt: str,
) -> None:
    artifact = model(tmp_path, architecture, fmt)
    arithmetic = Arithmetic.of("f32") if fmt == "F32" else Arithmetic.of("int8-dot", kv_type="f16")
    trace = recorded(artifact, tmp_path / "sound", arithmetic=arithmetic)
    values = {(layer, tap): value(trace, artifact, layer) for layer in LAYERS}
    report = report_of(rewritten(trace, artifact, tmp_path / "elsewhere", values), artifact, floors)
    assert report.cleared
    assert report.remaining == []
    (finding,) = report.findings
    assert (finding["tap"], finding["layer"], finding["layers"]) == (tap, 0, [0, 1])
    if tap == "post_ffn_residual":
        # Of the first layer that is the input of the layer, too.
        assert finding["agreed_consumers"]
    else:
        assert finding["found"] == where
        assert "in all 2 layers" in finding["statement"]
    assert finding["evidence"]["nmse_as_found"] < 1e-3 < finding["evidence"]["nmse_as_declared"]


def test_two_taps_recorded_elsewhere_are_two_findings(tmp_path: Path, floors: Floors) -> None:
    artifact = model(tmp_path, "qwen2")
    trace = recorded(artifact, tmp_path / "sound")
    values = {
        place: trace.tap(layer, source)
        for layer in LAYERS
        for place, source in (
            ((layer, "qkv_bias"), "qkv_matmul"),
            ((layer, "attn_out"), "post_attn_residual"),
        )
    }
    report = report_of(rewritten(trace, artifact, tmp_path / "elsewhere", values), artifact, floors)
    assert report.remaining == []
    assert {finding["tap"] for finding in report.findings} == {"qkv_bias", "attn_out"}


def test_consumers_are_found_past_taps_that_were_not_recorded(tmp_path: Path, floors: Floors) -> None:
    artifact = model(tmp_path)
    trace = recorded(artifact, tmp_path / "sound", wanted=lambda _, tap: tap != "post_attn_residual")
    values = {(1, "attn_out"): trace.tap(1, "attn_out") + trace.tap(0, "post_ffn_residual")}
    report = report_of(rewritten(trace, artifact, tmp_path / "elsewhere", values), artifact, floors)
    assert report.remaining == []
    assert [finding["tap"] for finding in report.findings] == ["attn_out"]
    assert "layers.1.ffn_norm" in report.findings[0]["agreed_consumers"]


class DoubledResidual(CleanEngine):
    def add(self, layer: int, tap: str, residual: Any, x: Any) -> Any:
        return residual + residual + x if layer == 1 and tap == "post_attn_residual" else residual + x


class DroppedResidual(CleanEngine):
    def add(self, layer: int, tap: str, residual: Any, x: Any) -> Any:
        return x if layer == 1 and tap == "post_ffn_residual" else residual + x


class DroppedBias(CleanEngine):
    def biased(self, layer: int, site: str, y: Any) -> Any:
        return y


class Unscaled(CleanEngine):
    def scores(self, layer: int, q: Any, k: Any) -> Any:
        return super().scores(layer, q, k) * np.float32(self.config.head_dim**0.5)


class WithoutNormWeight(CleanEngine):
    def attn_norm(self, layer: int, x: Any) -> Any:
        return super().attn_norm(layer, x) / vector(
            self._artifact, f"model.layers.{layer}.input_layernorm.weight"
        )


class NoRope(CleanEngine):
    def turned(self, layer: int, site: str, y: Any, batch: Any) -> Any:
        return y


class NotActivated(CleanEngine):
    def activated(self, layer: int, gate: Any) -> Any:
        return gate


@pytest.mark.parametrize(
    ("engine", "tap"),
    [
        (DoubledResidual, "post_attn_residual"),
        (DroppedResidual, "post_ffn_residual"),
        (DroppedBias, "qkv_bias"),
        (Unscaled, "attn_scores"),
        (WithoutNormWeight, "attn_norm"),
        (NoRope, "q_post_rope"),
        (NotActivated, "ffn_silu"),
    ],
)
@pytest.mark.parametrize("fmt", ["F32", "Q4_K"])
def test_a_fault_of_the_engine_is_no_capture_point(
    tmp_path: Path, floors: Floors, engine: type[CleanEngine], tap: str, fmt: str
) -> None:
    """What was recorded is what a capture elsewhere would record, but the engine went on with it."""
    artifact = model(tmp_path, "qwen2", fmt)
    arithmetic = Arithmetic.of("f32") if fmt == "F32" else Arithmetic.of("int8-dot", kv_type="f16")
    trace = recorded(artifact, tmp_path / "trace", engine=engine, arithmetic=arithmetic)
    report = report_of(trace, artifact, floors)
    assert report.findings == []
    assert report.cleared == []
    assert report.remaining[0].tap == tap
