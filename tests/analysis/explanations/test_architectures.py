"""Faults of what gemma2, gemma3 and phi3 do otherwise are named, and no op of theirs is without an answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tests.analysis.explanations.planted import F32, PROMPTS, artifact, at, explained, prompts, trace_of
from tests.analysis.explanations.test_clean import found

from driftscope.analysis.capture_guess import guess_capture_points
from driftscope.analysis.explanations import CLASSES, Context, explain
from driftscope.analysis.replay import Replayer
from driftscope.engines import transformers
from driftscope.engines.trace import Trace
from driftscope.faultbench.trace_in_memory import MemoryTrace
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.batch import TokenBatch
from driftscope.forward.evaluate import Value
from driftscope.forward.model import ForwardPass
from driftscope.kernels.forward import rms_norm, silu

NAMES = ("gemma2", "gemma3", "phi3-partial", "phi3-longrope")
LONG = prompts(40, 3)


class Silu(ForwardPass):
    def activated(self, layer: int, gate: F32) -> F32:
        return silu(gate) if at(layer) else super().activated(layer, gate)


class WithoutOne(ForwardPass):
    def post_ffn_norm(self, layer: int, x: F32) -> F32:
        if not at(layer):
            return super().post_ffn_norm(layer, x)
        name = f"model.layers.{layer}.post_feedforward_layernorm.weight"
        weight = self._weights["model"].vector(name, x.shape[1])
        return rms_norm(x, weight, self.config.rms_norm_eps)


class Uncapped(ForwardPass):
    def scores(self, layer: int, q: F32, k: F32) -> F32:
        kept = self.config
        self.config = dataclasses.replace(kept, attention_softcap=None)
        try:
            return super().scores(layer, q, k)
        finally:
            self.config = kept


class OfTheWholeModel(ForwardPass):
    """Layers with a window turn by the theta of those without."""

    def turned(self, layer: int, site: str, y: F32, batch: TokenBatch) -> F32:
        if layer != 2:
            return super().turned(layer, site, y, batch)
        y = self._norm(y, layer, f"{site}_post_rope", self.config.head_dim)
        return self._turn(0, y, batch)


class HeadSize(ForwardPass):
    def scores(self, layer: int, q: F32, k: F32) -> F32:
        return super().scores(layer, q, k) * np.float32((10 / 16) ** 0.5)


class OtherList(ForwardPass):
    """LongRoPE's two lists exchanged."""

    def turned(self, layer: int, site: str, y: F32, batch: TokenBatch) -> F32:
        if layer != 1:
            return super().turned(layer, site, y, batch)
        kept = self._rotations
        self._rotations = kept.times(np.float32(1))
        self._rotations.sets = {False: kept.sets[False][::-1].copy()}
        try:
            return super().turned(layer, site, y, batch)
        finally:
            self._rotations = kept


class Interleaved(ForwardPass):
    def turned(self, layer: int, site: str, y: F32, batch: TokenBatch) -> F32:
        return self._turn(layer, y, batch, interleaved=at(layer))


class Unscaled(ForwardPass):
    """Without LongRoPE's attention factor."""

    def turned(self, layer: int, site: str, y: F32, batch: TokenBatch) -> F32:
        found = super().turned(layer, site, y, batch)
        if not at(layer):
            return found
        dim = self.config.rotary_dim
        assert dim is not None
        heads = found.reshape(len(found), -1, self.config.head_dim).copy()
        heads[:, :, :dim] /= np.float32(self._rotations.scale(layer))
        return heads.reshape(found.shape)


@pytest.mark.parametrize("length", [24, 40])
@pytest.mark.parametrize(
    ("fault", "class_", "said"),
    [
        (OtherList, "rope-factors", "LongRoPE's factors for"),
        (Interleaved, "rope-pairing", "turned together"),
        (Unscaled, "rope-factors", "LongRoPE's attention factor is left out"),
    ],
)
def test_faults_of_heads_that_turn_in_part_and_by_length(
    fault: type[ForwardPass], class_: str, said: str, length: int, tmp_path: Path
) -> None:
    """24 tokens turn by the list for short texts, 40 by the other."""
    given = prompts(length)
    answers = explained(tmp_path, artifact("phi3-longrope"), (1, "q_post_rope", ""), fault, given=given)
    assert answers[0].class_ == class_, answers[0].statement
    assert said in answers[0].statement


class Doubled(ForwardPass):
    def project(self, layer: int, site: str, x: F32) -> F32:
        found = super().project(layer, site, x)
        return found * np.float32(2) if site == "lm_head" else found


def test_logits_that_are_scaled_before_their_cap(tmp_path: Path) -> None:
    answers = explained(tmp_path, artifact("gemma2"), (-1, "lm_head", ""), Doubled)
    assert answers[0].class_ == "output-scale", answers[0].statement
    assert "logits are multiplied by 2 before their cap" in answers[0].statement


@pytest.mark.parametrize(
    ("name", "tap", "other", "point"),
    [
        ("gemma2", "ffn_gate", "ffn_silu", "after the activation"),
        ("gemma2", "post_attn_norm", "attn_out", "before the norm"),
        ("gemma2", "post_ffn_residual", "post_ffn_norm", "before the residual"),
        ("gemma3", "ffn_silu", "ffn_gate", "before the activation"),
    ],
)
def test_taps_that_were_captured_elsewhere(
    name: str, tap: str, other: str, point: str, tmp_path: Path
) -> None:
    own = artifact(name)
    trace = trace_of(tmp_path, own)
    held = MemoryTrace(trace.manifest, {place: value_of(trace, *place) for place in trace.places})
    sound = guess_capture_points(held, own, Arithmetic.of(), [1])
    assert {answer.winner for answer in sound.values()} == {"standard"}

    moved = held.replaced({(1, tap): held.values[1, other]})
    assert guess_capture_points(moved, own, Arithmetic.of(), [1])[tap].winner == point


def value_of(trace: Trace, layer: int, tap: str) -> Value:
    """A tap as a trace in memory has it."""
    return trace.ragged(layer, tap) if tap in ("attn_scores", "attn_softmax") else trace.tap(layer, tap)


@pytest.mark.parametrize(
    ("name", "fault", "place", "class_"),
    [
        ("gemma2", Silu, (1, "ffn_silu", ""), "activation-function"),
        ("gemma2", WithoutOne, (1, "post_ffn_norm", ""), "norm-offset"),
        ("gemma2", Uncapped, (1, "attn_scores", ""), "soft-cap"),
        ("gemma3-capped", OfTheWholeModel, (2, "q_post_rope", ""), "rope-theta"),
        ("gemma3-capped", HeadSize, (1, "attn_scores", ""), "score-scale"),
    ],
)
def test_a_planted_fault_is_named(
    name: str, fault: type[ForwardPass], place: tuple[int, str, str], class_: str, tmp_path: Path
) -> None:
    answers = explained(tmp_path, artifact(name), place, fault)
    assert answers[0].class_ == class_, answers[0].statement


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transformers_noise_is_given_no_name(name: str, tmp_path: Path) -> None:
    own = artifact(name)
    trace = transformers.trace(own.path, PROMPTS, tmp_path / "trace")
    named = {place: item[0].statement for place, item in found(trace, own) if item[0].class_ != "unexplained"}
    assert named == {}


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_an_answer(name: str, tmp_path: Path) -> None:
    """Whatever op is wrong, something is said of it."""
    own = artifact(name)
    trace = trace_of(tmp_path, own, given=LONG)
    random = np.random.Generator(np.random.Philox(5))

    def wrong(array: F32) -> F32:
        noise = random.standard_normal(array.shape).astype(np.float32)
        return array * np.float32(1.5) + np.float32(0.1 * np.abs(array).mean()) * noise

    for layer, tap, part in Replayer(trace, own).places([-1, 1]):
        value = trace.ragged(layer, tap) if tap in ("attn_scores", "attn_softmax") else trace.tap(layer, tap)
        changed = [wrong(item) for item in value] if isinstance(value, list) else wrong(value)
        replayer = Replayer(trace, own, overrides={(layer, tap): changed})
        answers = explain(replayer.op(layer, tap, part), Context(own, None, trace, "engine", replayer))
        assert answers
        assert all(item.class_ in CLASSES for item in answers), (layer, tap, part)
