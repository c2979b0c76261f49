"""Engines with one wrong op, and sound ones: whether judging finds the op, and only that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.analysis.recorded import LENGTHS, model, recorded, shape

from driftscope.analysis.clean_engines import ORDERS, CleanEngine, Habits
from driftscope.analysis.first_divergence import FirstDivergence, first_divergence, flags
from driftscope.analysis.floors import Floors
from driftscope.analysis.random_models import random_weights, write_random_model
from driftscope.analysis.replay import Replayer
from driftscope.artifacts.model import Artifact
from driftscope.engines.trace import Trace
from driftscope.forward.arithmetic import Arithmetic
from driftscope.kernels.forward import gelu

pytestmark = pytest.mark.slow

ARITHMETICS = {
    "F32": Arithmetic.of("f32"),
    "Q8_0": Arithmetic.of("f32"),
    "Q4_K": Arithmetic.of("int8-dot", kv_type="f16"),
    "Q4_1": Arithmetic.of("int8-dot"),
    "BF16": Arithmetic.of("f32", dtype="bf16"),
}


def judged(
    trace: Trace, artifact: Artifact, floors: Floors, reference: Artifact | None = None
) -> FirstDivergence | None:
    replayer = Replayer(trace, artifact, reference=reference, components=("engine", "model"))
    rows = replayer.rows()
    return first_divergence(flags(rows, floors, arithmetic=replayer.arithmetic), rows)


class DoubledResidual(CleanEngine):
    place, tap = (1, "post_attn_residual", ""), "post_attn_residual"

    def add(self, layer: int, tap: str, residual: Any, x: Any) -> Any:
        twice = layer == 1 and tap == self.tap
        return super().add(layer, tap, residual, x + residual if twice else x)


class Gelu(CleanEngine):
    place = (0, "ffn_silu", "")

    def activated(self, layer: int, gate: Any) -> Any:
        return self._rounded(gelu(gate))


class Shifted(CleanEngine):
    place = (0, "ffn_swiglu", "")

    def gated(self, layer: int, activated: Any, up: Any) -> Any:
        return super().gated(layer, activated, np.roll(up, 1, axis=1))


class TiledHeads(CleanEngine):
    """Heads dealt out to the keys' heads in turn instead of in groups; the rest is as it should be."""

    place = (1, "attn_scores", "")

    def scores(self, layer: int, q: Any, k: Any) -> Any:
        if layer == 1:
            heads = k.reshape(k.shape[0], self.config.num_kv_heads, -1)
            k = np.ascontiguousarray(heads[:, ::-1].reshape(k.shape))
        return super().scores(layer, q, k)


class HalfPrecisionScores(CleanEngine):
    place = (0, "attn_scores", "")

    def scores(self, layer: int, q: Any, k: Any) -> Any:
        return super().scores(layer, q, k).astype(np.float16).astype(np.float32)


class NoBias(CleanEngine):
    place = (0, "qkv_bias", "q")

    def biased(self, layer: int, site: str, y: Any) -> Any:
        return y


class OtherGate(CleanEngine):
    place = (1, "ffn_gate", "")

    def project(self, layer: int, site: str, x: Any) -> Any:
        return super().project(layer, "up" if (layer, site) == (1, "gate") else site, x)


class FewRows(CleanEngine):
    """A kernel that is wrong for two rows: the first prompt has two tokens, and lies before the others."""

    place = (0, "ffn_out", "")

    def project(self, layer: int, site: str, x: Any) -> Any:
        y = super().project(layer, site, x)
        if site == "down":
            y = y.copy()
            y[:2] *= np.float32(1.001)
        return y


class NotANumber(CleanEngine):
    place = (1, "ffn_up", "")

    def project(self, layer: int, site: str, x: Any) -> Any:
        y = super().project(layer, site, x)
        if (layer, site) == (1, "up"):
            y = y.copy()
            y[-1, 7] = np.nan
        return y


@pytest.mark.parametrize(
    "engine", [DoubledResidual, Gelu, Shifted, TiledHeads, HalfPrecisionScores, NoBias, OtherGate, NotANumber]
)
@pytest.mark.parametrize("fmt", ARITHMETICS)
def test_a_wrong_op_comes_first(tmp_path: Path, floors: Floors, engine: Any, fmt: str) -> None:
    artifact = model(tmp_path, "qwen2", fmt)
    trace = recorded(artifact, tmp_path / "trace", engine=engine, arithmetic=ARITHMETICS[fmt])
    first = judged(trace, artifact, floors)
    if engine is HalfPrecisionScores and fmt == "BF16":
        # float16 is finer than what is declared, so that there is nothing to find.
        assert first is None
        return
    assert first is not None
    assert first.flag.place == engine.place
    assert first.flag.component == "engine"
    if engine is not NotANumber:
        # A prompt of few tokens may well not show it: half of its scores are to come.
        assert {f"p{n}" for n in LENGTHS[2:]} <= set(first.prompts[0])


def test_a_kernel_that_is_wrong_for_two_rows_is_noted(tmp_path: Path, floors: Floors) -> None:
    artifact = model(tmp_path, "llama", "Q4_K")
    trace = recorded(artifact, tmp_path / "trace", engine=FewRows, arithmetic=ARITHMETICS["Q4_K"])
    first = judged(trace, artifact, floors)
    assert first is not None
    assert (first.flag.place, first.prompts[0], first.note) == (FewRows.place, ("p2",), "row-count")


@pytest.mark.parametrize(
    ("change", "tap"),
    [({"rope_theta": 5e5}, "q_post_rope"), ({"rms_norm_eps": 1e-4}, "attn_norm")],
)
@pytest.mark.parametrize("fmt", ["F32", "Q4_K"])
def test_a_wrong_hyperparameter_of_the_engine_comes_first(
    tmp_path: Path, floors: Floors, change: dict[str, float], tap: str, fmt: str
) -> None:
    """The engine runs the same bytes with another setting."""
    artifact = model(tmp_path, "llama", fmt)
    other = replace(artifact, config=replace(artifact.config, **change))
    trace = recorded(other, tmp_path / "trace", arithmetic=ARITHMETICS[fmt])
    first = judged(trace, artifact, floors)
    assert first is not None
    assert (first.flag.layer, first.flag.tap, first.flag.component) == (0, tap, "engine")


@pytest.mark.parametrize("fmt", ["F32", "Q8_0", "Q4_K", "Q6_K"])
def test_wrong_weights_are_the_models_and_not_the_engines(tmp_path: Path, floors: Floors, fmt: str) -> None:
    """Two layers' down projections are swapped in the artifact that runs."""
    weights = random_weights(shape("llama"), 1)
    reference = model(tmp_path / "truth")
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    swapped = {**weights, names[0]: weights[names[1]], names[1]: weights[names[0]]}
    own = write_random_model(tmp_path / "own.bin", reference.config, swapped, fmt)
    trace = recorded(own, tmp_path / "trace", arithmetic=ARITHMETICS.get(fmt, ARITHMETICS["Q4_K"]))
    first = judged(trace, own, floors, reference)
    assert first is not None
    assert (*first.flag.place, first.flag.component) == (0, "ffn_out", "", "model")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("fmt", ARITHMETICS)
@pytest.mark.parametrize("order", list(ORDERS)[::4])
def test_a_sound_engine_is_not_flagged(
    tmp_path: Path, floors: Floors, architecture: str, fmt: str, order: str
) -> None:
    reference = model(tmp_path / "truth", architecture, seed=21)
    own = model(tmp_path, architecture, fmt, seed=21)
    trace = recorded(own, tmp_path / "trace", arithmetic=ARITHMETICS[fmt], habits=Habits(order, powers=True))
    assert judged(trace, own, floors, reference) is None
