"""Planted faults of RoPE are called by their names, and their numbers are found again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.analysis.explanations.planted import (
    F32,
    LAYER,
    artifact,
    at,
    edited,
    explained,
    prompts,
    with_config,
)

from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass

LONG = prompts(200, 3, 40)


class Turning(ForwardPass):
    """RoPE in float64, in the arithmetic of torch; faults override its steps."""

    theta = 10000.0

    def positions(self, batch: TokenBatch) -> np.ndarray:
        return batch.positions.astype(np.float64)

    def rates(self) -> np.ndarray:
        dim = self.config.head_dim
        return self.theta ** -(np.arange(0, dim, 2) / dim)

    def angles(self, batch: TokenBatch) -> np.ndarray:
        return self.positions(batch)[:, None] * self.rates()[None, :]

    def turned(self, layer: int, site: str, y: F32, batch: TokenBatch) -> F32:
        if not at(layer):
            return super().turned(layer, site, y, batch)
        angles = self.angles(batch)[:, None, :]
        heads = y.reshape(len(y), -1, self.config.head_dim).astype(np.float64)
        half = self.config.head_dim // 2
        a, b = heads[..., :half], heads[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1).reshape(y.shape).astype(np.float32)


class Interleaved(Turning):
    def turned(self, layer: int, site: str, y: F32, batch: TokenBatch) -> F32:
        if not at(layer):
            return super().turned(layer, site, y, batch)
        heads = y.reshape(len(y), -1, self.config.head_dim).astype(np.float64)
        turned = (heads[..., ::2] + 1j * heads[..., 1::2]) * np.exp(1j * self.angles(batch))[:, None, :]
        return np.stack([turned.real, turned.imag], -1).reshape(y.shape).astype(np.float32)


class Theta(Turning):
    theta = 100000.0


class OddTheta(Turning):
    theta = 23456.0


class Shifted(Turning):
    def positions(self, batch: TokenBatch) -> np.ndarray:
        return batch.positions + 5.0


class NotRestarted(Turning):
    def positions(self, batch: TokenBatch) -> np.ndarray:
        return np.arange(batch.n_tokens, dtype=np.float64)


class StaleFromTen(Turning):
    def positions(self, batch: TokenBatch) -> np.ndarray:
        return np.where(batch.positions >= 10, batch.positions + 3.0, batch.positions)


class Linear(Turning):
    def rates(self) -> np.ndarray:
        return super().rates() / 4


class SomeFaster(Turning):
    def rates(self) -> np.ndarray:
        rates = super().rates()
        rates[len(rates) // 2 :] *= 1.7
        return rates


class Unturned(Turning):
    def rates(self) -> np.ndarray:
        return 0 * super().rates()


class RoundedAngles(Turning):
    def angles(self, batch: TokenBatch) -> np.ndarray:
        return torch.tensor(super().angles(batch)).to(torch.float32).bfloat16().double().numpy()


class RoundedPositions(Turning):
    def positions(self, batch: TokenBatch) -> np.ndarray:
        return torch.tensor(batch.positions).bfloat16().double().numpy()


class HalfAngles(Turning):
    def angles(self, batch: TokenBatch) -> np.ndarray:
        return torch.tensor(super().angles(batch)).to(torch.float32).half().double().numpy()


@pytest.mark.parametrize(
    ("fault", "class_"),
    [
        (Interleaved, "rope-pairing"),
        (Theta, "rope-theta"),
        (OddTheta, "rope-theta"),
        (Shifted, "position-shift"),
        (NotRestarted, "position-shift"),
        (StaleFromTen, "position-shift"),
        (Linear, "rope-factors"),
        (SomeFaster, "rope-factors"),
        (Unturned, "rope-missing"),
        (RoundedAngles, "rope-precision"),
        (HalfAngles, "rope-precision"),
    ],
)
@pytest.mark.parametrize("tap", ["q_post_rope", "k_post_rope"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_fault_of_the_turn(
    fault: type[ForwardPass], class_: str, tap: str, name: str, tmp_path: Path
) -> None:
    found = explained(tmp_path, artifact(name), (LAYER, tap, ""), fault, given=LONG)
    assert found[0].class_ == class_, found


def test_short_prompts_are_enough(tmp_path: Path) -> None:
    for fault, class_ in ((Interleaved, "rope-pairing"), (Theta, "rope-theta"), (Shifted, "position-shift")):
        folder = tmp_path / class_
        folder.mkdir()
        own = artifact("llama")
        found = explained(folder, own, (LAYER, "k_post_rope", ""), fault, given=prompts(6))
        assert found[0].class_ == class_, found


def test_numbers_are_found_again(tmp_path: Path) -> None:
    (tmp_path / "theta").mkdir()
    own = artifact("llama")
    found = explained(tmp_path / "theta", own, (LAYER, "q_post_rope", ""), OddTheta, given=LONG)
    assert found[0].evidence["theta"] == pytest.approx(23456.0, rel=1e-3)
    found = explained(tmp_path, own, (LAYER, "q_post_rope", ""), Shifted, given=LONG)
    assert found[0].evidence["shift"] == 5


def test_positions_rounded_to_bf16_show_past_256(tmp_path: Path) -> None:
    own = artifact("llama", max_position_embeddings=512)
    given = prompts(330)
    found = explained(tmp_path, own, (LAYER, "q_post_rope", ""), RoundedPositions, given=given)
    assert found[0].class_ == "rope-precision"
    assert found[0].evidence["rounded"] == ["positions"]


def test_theta_of_the_artifact_against_the_reference(tmp_path: Path) -> None:
    reference = artifact("qwen2")
    own = with_config(reference, rope_theta=123456.0)
    found = explained(tmp_path, own, (LAYER, "k_post_rope", ""), reference=reference)
    assert found[0].class_ == "rope-theta"
    assert found[0].evidence["theta"] == pytest.approx(123456.0, rel=1e-3)


def test_factors_that_the_artifact_lacks(tmp_path: Path) -> None:
    reference = artifact("llama-3-scaling")
    own = edited(
        tmp_path / "own",
        reference,
        lambda tensors: None,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    found = explained(tmp_path, own, (LAYER, "k_post_rope", ""), reference=reference, given=LONG)
    assert found[0].class_ == "rope-factors", found


def test_factors_that_the_engine_drops(tmp_path: Path) -> None:
    class Dropping(Turning):
        theta = 500.0

    own = artifact("llama-3-scaling")
    found = explained(tmp_path, own, (LAYER, "k_post_rope", ""), Dropping, given=LONG)
    assert found[0].class_ == "rope-factors", found
    assert found[0].evidence["ratio_high"] == pytest.approx(8.0)


def test_llama_3_factors_that_should_not_be(tmp_path: Path) -> None:
    reference = artifact("llama")
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    own = dataclasses.replace(reference, config=dataclasses.replace(reference.config, rope_scaling=scaling))
    found = explained(tmp_path, own, (LAYER, "k_post_rope", ""), reference=reference, given=LONG)
    assert found[0].class_ == "rope-factors", found
