"""An error is found where it was put."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.analysis.explanations.planted import F32, LAYER, artifact, at, trace_of

from driftscope.analysis.explanations import Context, localise
from driftscope.analysis.replay import Replayer
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass


class OneChannel(ForwardPass):
    def project(self, layer: int, site: str, x: F32) -> F32:
        y = super().project(layer, site, x)
        if at(layer) and site == "down":
            y[:, 41] += 3.0
            y += np.float32(1e-3)
        return y


class OneHead(ForwardPass):
    def attend(self, layer: int, q: F32, k: F32, v: F32, batch: TokenBatch) -> F32:
        y = super().attend(layer, q, k, v, batch)
        if at(layer):
            y[:, 2 * self.config.head_dim : 3 * self.config.head_dim] += 1.0
        return y


class OnePosition(ForwardPass):
    def activated(self, layer: int, gate: F32) -> F32:
        y = super().activated(layer, gate)
        if at(layer):
            y[7] += 1.0
        return y


class OneBlock(ForwardPass):
    def activated(self, layer: int, gate: F32) -> F32:
        y = super().activated(layer, gate)
        if at(layer):
            y[:, 64:96] += 1.0
        return y


class OneHeadOfScores(ForwardPass):
    def scores(self, layer: int, q: F32, k: F32) -> F32:
        y = super().scores(layer, q, k)
        if at(layer):
            y[:, 3 * len(q) : 4 * len(q)] += 1.0
        return y


@pytest.mark.parametrize(
    ("fault", "tap", "kind", "index", "sentence"),
    [
        (OneChannel, "ffn_out", "channel", 41, "in channel 41"),
        (OneHead, "attention", "head", 2, "in head 2"),
        (OnePosition, "ffn_silu", "position", 7, "in position 7"),
        (OneBlock, "ffn_silu", "block32", 2, "in the block of 32 channels from 64"),
        (OneHeadOfScores, "attn_scores", "head", 3, "in head 3"),
    ],
)
def test_where_the_error_lies(
    fault: type[ForwardPass], tap: str, kind: str, index: int, sentence: str, tmp_path: Path
) -> None:
    own = artifact("llama")
    trace = trace_of(tmp_path, own, fault)
    replayer = Replayer(trace, own)
    op = replayer.op(LAYER, tap)
    found = localise(op, Context(own, None, trace))
    assert found[kind]["top"][0]["index"] == index
    assert found[kind]["top"][0]["share"] > 0.99
    assert sentence in found["sentence"]
    assert found["non_finite"] == 0


def test_shares_add_up_and_need_no_context(tmp_path: Path) -> None:
    own = artifact("llama")
    replayer = Replayer(trace_of(tmp_path, own, OneBlock), own)
    found = localise(replayer.op(LAYER, "ffn_silu"))
    assert found["block32"]["count"] == 5
    assert sum(item["share"] for item in found["block32"]["top"]) == pytest.approx(1.0)
    assert found["energy"] == pytest.approx(38 * 32, rel=1e-3)


def test_no_error(tmp_path: Path) -> None:
    own = artifact("llama")
    replayer = Replayer(trace_of(tmp_path, own), own)
    found = localise(replayer.op(LAYER, "ffn_silu"))
    assert found["sentence"] == "There is no error."
