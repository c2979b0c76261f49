"""Planted faults of attention are called by their names, whichever of its taps were recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.analysis.explanations.planted import F32, LAYER, artifact, at, explained, prompts

from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass

TWO = prompts(40, 3)


class Plain(ForwardPass):
    """Attention in torch's float64; faults override its steps."""

    ahead: int | None = 0
    now = False

    def attend(self, layer: int, q: F32, k: F32, v: F32, batch: TokenBatch) -> F32:
        if not at(layer):
            return super().attend(layer, q, k, v, batch)
        found = []
        for tokens in batch.slices:
            weights = self.softmax(layer, self.scores(layer, q[tokens], k[tokens]))
            found.append(self.summed(weights, v[tokens]))
        return np.concatenate(found)

    def scores(self, layer: int, q: F32, k: F32) -> F32:
        if not at(layer):
            return super().scores(layer, q, k)
        left = self.split(q, self.config.num_heads)
        right = self.split(k, self.config.num_kv_heads)[:, self.key_heads()]
        return self.flat(self.adjusted(torch.einsum("ihc,jhc->ihj", left, right) * self.factor()))

    def softmax(self, layer: int, scores: F32) -> F32:
        if not at(layer):
            return super().softmax(layer, scores)
        length = len(scores)
        values = torch.tensor(scores, dtype=torch.float64).reshape(length, -1, length)
        query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
        seen = torch.ones(length, length, dtype=torch.bool)
        if self.ahead is not None:
            seen &= key <= query + self.ahead
        if self.width():
            seen &= key > query - self.width()
        return self.flat(torch.softmax(values.masked_fill(~seen[:, None, :], -torch.inf), -1))

    def summed(self, weights: F32, v: F32) -> F32:
        length = len(v)
        values = self.split(v, self.config.num_kv_heads)[:, self.value_heads()]
        found = torch.einsum(
            "ihj,jhc->ihc", torch.tensor(weights, dtype=torch.float64).reshape(length, -1, length), values
        )
        return self.flat(found)

    def split(self, x: F32, heads: int) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.float64).reshape(len(x), heads, -1)

    def flat(self, x: torch.Tensor) -> F32:
        return x.reshape(len(x), -1).to(torch.float32).numpy()

    def repeated(self) -> torch.Tensor:
        return torch.arange(self.config.num_heads) // (self.config.num_heads // self.config.num_kv_heads)

    key_heads = value_heads = repeated

    def factor(self) -> float:
        return self.config.head_dim**-0.5

    def adjusted(self, scores: torch.Tensor) -> torch.Tensor:
        return scores

    def width(self) -> int:
        return self.config.sliding_window or 0


class Tiled(Plain):
    def key_heads(self) -> torch.Tensor:
        return torch.arange(self.config.num_heads) % self.config.num_kv_heads

    value_heads = key_heads


class TiledValues(Plain):
    def value_heads(self) -> torch.Tensor:
        return torch.arange(self.config.num_heads) % self.config.num_kv_heads


class Unscaled(Plain):
    def factor(self) -> float:
        return 1.0


class Louder(Plain):
    def factor(self) -> float:
        return 1.37 * super().factor()


class CappedScores(Plain):
    def adjusted(self, scores: torch.Tensor) -> torch.Tensor:
        return 2.5 * torch.tanh(scores / 2.5)


class SeesNext(Plain):
    ahead = 1


class SeesAll(Plain):
    ahead = None


class WiderWindow(Plain):
    def width(self) -> int:
        return super().width() + 1


class NoWindow(Plain):
    def width(self) -> int:
        return 0


class NewWindow(Plain):
    def width(self) -> int:
        return 9


class HalfFactors(Plain):
    def split(self, x: F32, heads: int) -> torch.Tensor:
        return super().split(x, heads).half().double()


class HalfSums(Plain):
    """Products summed in float16 from the last channel to the first."""

    def scores(self, layer: int, q: F32, k: F32) -> F32:
        if not at(layer):
            return super().scores(layer, q, k)
        left, right = self.split(q, self.config.num_heads), self.split(k, self.config.num_kv_heads)
        right = right[:, self.key_heads()]
        total = torch.zeros(len(q), self.config.num_heads, len(q), dtype=torch.float16)
        for c in reversed(range(left.shape[2])):
            total = total + (left[:, None, :, c] * right[None, :, :, c]).swapaxes(1, 2).half()
        return self.flat(total.double() * self.factor())


class ShiftedKeys(Plain):
    def scores(self, layer: int, q: F32, k: F32) -> F32:
        return super().scores(layer, q, np.roll(k, 5, axis=0) if at(layer) else k)


class TurnedKeys(Plain):
    def scores(self, layer: int, q: F32, k: F32) -> F32:
        if at(layer):
            half = self.config.head_dim // 2
            keys = k.reshape(len(k), -1, 2, half).astype(np.float64)
            angle = 5 * 10000.0 ** -(np.arange(half) / half)
            z = (keys[:, :, 0] + 1j * keys[:, :, 1]) * np.exp(1j * angle)
            k = np.stack([z.real, z.imag], 2).reshape(k.shape).astype(np.float32)
        return super().scores(layer, q, k)


SCORES = (
    (Unscaled, "score-scale"),
    (Louder, "score-scale"),
    (CappedScores, "soft-cap"),
    (HalfFactors, "score-precision"),
    (HalfSums, "score-precision"),
    (ShiftedKeys, "position-shift"),
    (TurnedKeys, "position-shift"),
    (Tiled, "head-mapping"),
)
MASKS = ((SeesNext, "causal-mask"), (SeesAll, "causal-mask"), (NewWindow, "window"))
MAPS = ("attn_scores", "attn_softmax")


@pytest.mark.parametrize(("fault", "class_"), SCORES)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("tap", "without"),
    [("attn_scores", ()), ("attn_softmax", ("attn_scores",)), ("attention", MAPS)],
)
def test_a_fault_of_the_scores(
    tap: str, without: tuple[str, ...], name: str, fault: type[ForwardPass], class_: str, tmp_path: Path
) -> None:
    own = artifact(name)
    found = explained(tmp_path, own, (LAYER, tap, ""), fault, without=without, given=TWO)
    assert found[0].class_ == class_, found


@pytest.mark.parametrize(("fault", "class_"), MASKS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize(("tap", "without"), [("attn_softmax", ()), ("attention", MAPS)])
def test_a_fault_of_the_mask(
    tap: str, without: tuple[str, ...], name: str, fault: type[ForwardPass], class_: str, tmp_path: Path
) -> None:
    own = artifact(name)
    found = explained(tmp_path, own, (LAYER, tap, ""), fault, without=without, given=TWO)
    assert found[0].class_ == class_, found


@pytest.mark.parametrize("fault", [WiderWindow, NoWindow])
@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window"])
@pytest.mark.parametrize(("tap", "without"), [("attn_softmax", ()), ("attention", MAPS)])
def test_a_fault_of_the_window(
    tap: str, without: tuple[str, ...], name: str, fault: type[ForwardPass], tmp_path: Path
) -> None:
    own = artifact(name)
    found = explained(tmp_path, own, (LAYER, tap, ""), fault, without=without, given=TWO)
    assert found[0].class_ == "window", found
    expected = None if fault is NoWindow else {"mistral-window": 12, "qwen2-window": 8}[name]
    assert found[0].evidence["window"] == expected


@pytest.mark.parametrize("without", [(), MAPS])
def test_values_of_other_heads(without: tuple[str, ...], tmp_path: Path) -> None:
    own = artifact("llama")
    found = explained(tmp_path, own, (LAYER, "attention", ""), TiledValues, without=without, given=TWO)
    assert found[0].class_ == "head-mapping", found
    assert found[0].evidence["heads"] == "value"


def test_numbers_are_found_again(tmp_path: Path) -> None:
    for fault, key, value in ((Louder, "ratio", 1.37), (CappedScores, "cap", 2.5)):
        for tap, without in (("attn_scores", ()), ("attention", MAPS)):
            folder = tmp_path / f"{key}-{tap}"
            folder.mkdir()
            place = (LAYER, tap, "")
            found = explained(folder, artifact("llama"), place, fault, without=without, given=TWO)
            assert found[0].evidence[key] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-window"])
@pytest.mark.parametrize(("tap", "without"), [("attn_softmax", ()), ("attention", MAPS), ("attention", ())])
def test_nothing_is_made_of_noise(tap: str, without: tuple[str, ...], name: str, tmp_path: Path) -> None:
    """An error that is none of the faults is given no name."""

    class Noisy(Plain):
        def attend(self, layer: int, q: F32, k: F32, v: F32, batch: TokenBatch) -> F32:
            y = super().attend(layer, q, k, v, batch)
            return self.rough(y) if at(layer) else y

        def softmax(self, layer: int, scores: F32) -> F32:
            y = super().softmax(layer, scores)
            return self.rough(y) if at(layer) else y

        def rough(self, y: F32) -> F32:
            noise = np.random.Generator(np.random.Philox(2)).standard_normal(y.shape)
            return (y * (1 + 0.03 * noise)).astype(np.float32)

    found = explained(tmp_path, artifact(name), (LAYER, tap, ""), Noisy, without=without, given=TWO)
    assert found[0].class_ == "unexplained", found
