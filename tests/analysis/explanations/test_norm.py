"""Planted faults of norms are called by their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.analysis.explanations.planted import F32, LAYER, artifact, at, edited, explained, with_config

from driftscope.forward.model import ForwardPass


def norm(x: F32, weight: np.ndarray, eps: float, *, centred: bool = False, outside: bool = False) -> F32:
    """RMSNorm and its relatives in float64."""
    y = x.astype(np.float64)
    if centred:
        y = y - y.mean(axis=1, keepdims=True)
    root = np.sqrt((y * y).mean(axis=1, keepdims=True) + (0.0 if outside else eps))
    return (y / (root + (eps if outside else 0.0)) * weight).astype(np.float32)


def weight(forward: ForwardPass, layer: int) -> np.ndarray:
    """The weight of the norm before the attention."""
    ref = forward._weights["model"].artifact.tensors[f"model.layers.{layer}.input_layernorm.weight"]
    return ref.raw().reshape(-1).view("<f4").astype(np.float64)


class PlusOne(ForwardPass):
    def attn_norm(self, layer: int, x: F32) -> F32:
        w = weight(self, layer)
        return norm(x, w + 1.0, 1e-5) if at(layer) else super().attn_norm(layer, x)


class MinusOne(ForwardPass):
    def attn_norm(self, layer: int, x: F32) -> F32:
        w = weight(self, layer)
        return norm(x, w - 1.0, 1e-5) if at(layer) else super().attn_norm(layer, x)


class TenTimesEps(ForwardPass):
    def attn_norm(self, layer: int, x: F32) -> F32:
        return norm(x, weight(self, layer), 1e-4) if at(layer) else super().attn_norm(layer, x)


class OddEps(ForwardPass):
    def attn_norm(self, layer: int, x: F32) -> F32:
        return norm(x, weight(self, layer), 0.0317) if at(layer) else super().attn_norm(layer, x)


class EpsOutside(ForwardPass):
    def attn_norm(self, layer: int, x: F32) -> F32:
        if not at(layer):
            return super().attn_norm(layer, x)
        return norm(x, weight(self, layer), 1e-2, outside=True)


class Unweighted(ForwardPass):
    def attn_norm(self, layer: int, x: F32) -> F32:
        return norm(x, np.ones(x.shape[1]), 1e-5) if at(layer) else super().attn_norm(layer, x)


class Centred(ForwardPass):
    def attn_norm(self, layer: int, x: F32) -> F32:
        return norm(x, weight(self, layer), 1e-5, centred=True) if at(layer) else super().attn_norm(layer, x)


class OfOtherLayer(ForwardPass):
    def attn_norm(self, layer: int, x: F32) -> F32:
        return norm(x, weight(self, 0), 1e-5) if at(layer) else super().attn_norm(layer, x)


@pytest.mark.parametrize(
    ("fault", "class_"),
    [
        (PlusOne, "norm-offset"),
        (MinusOne, "norm-offset"),
        (TenTimesEps, "norm-eps"),
        (OddEps, "norm-eps"),
        (EpsOutside, "norm-eps"),
        (Unweighted, "missing-tensor"),
        (Centred, "norm-mean"),
        (OfOtherLayer, "other-layer"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_fault_of_a_norm(fault: type[ForwardPass], class_: str, name: str, tmp_path: Path) -> None:
    found = explained(tmp_path, artifact(name), (LAYER, "attn_norm", ""), fault)
    assert found[0].class_ == class_, found


def test_the_eps_is_named(tmp_path: Path) -> None:
    found = explained(tmp_path, artifact("llama"), (LAYER, "attn_norm", ""), OddEps)
    assert found[0].evidence["eps"] == pytest.approx(0.0317, rel=1e-3)
    assert found[0].evidence["expected_eps"] == 1e-5


def test_the_eps_of_the_artifact_against_the_reference(tmp_path: Path) -> None:
    reference = artifact("llama")
    own = with_config(reference, rms_norm_eps=1e-4)
    for tap, layer in (("attn_norm", 0), ("ffn_norm", LAYER), ("final_norm", -1)):
        folder = tmp_path / tap
        folder.mkdir()
        found = explained(folder, own, (layer, tap, ""), reference=reference)
        assert found[0].class_ == "norm-eps"
        assert found[0].evidence["eps"] == pytest.approx(1e-4)


@pytest.mark.parametrize("offset", [1.0, -1.0])
def test_the_weight_of_the_artifact_against_the_reference(offset: float, tmp_path: Path) -> None:
    reference = artifact("llama")

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"] += np.float32(offset)

    own = edited(tmp_path / "own", reference, edit)
    found = explained(tmp_path, own, (-1, "final_norm", ""), reference=reference)
    assert found[0].class_ == "norm-offset"
    assert found[0].evidence["offset"] == offset


def test_a_norm_of_each_head(tmp_path: Path) -> None:
    reference = artifact("qwen3")

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"model.layers.{LAYER}.self_attn.q_norm.weight"] -= np.float32(1)

    own = edited(tmp_path / "own", reference, edit)
    found = explained(tmp_path, own, (LAYER, "q_post_rope", ""), reference=reference)
    assert found[0].class_ == "norm-offset", found


def test_a_layer_that_the_final_norm_does_not_see(tmp_path: Path) -> None:
    class Skipping(ForwardPass):
        def final_norm(self, x: F32) -> F32:
            return super().final_norm(self.kept)

        def attn_norm(self, layer: int, x: F32) -> F32:
            self.kept = x
            return super().attn_norm(layer, x)

    found = explained(tmp_path, artifact("llama"), (-1, "final_norm", ""), Skipping)
    assert found[0].class_ == "layer-skipped"
    assert found[0].evidence["layer"] == 1


def test_one_channel_is_named(tmp_path: Path) -> None:
    class Flipped(ForwardPass):
        def attn_norm(self, layer: int, x: F32) -> F32:
            y = super().attn_norm(layer, x)
            if at(layer):
                y[:, 17] *= np.float32(1.5)
            return y

    found = explained(tmp_path, artifact("llama"), (LAYER, "attn_norm", ""), Flipped)
    assert found[0].class_ == "corrupt-block"
    assert found[0].evidence["row"] == 17
