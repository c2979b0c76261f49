"""Planted faults of embedding, gate, residual stream and few rows; and values that are not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.analysis.explanations.planted import (
    F32,
    LAYER,
    PROMPTS,
    artifact,
    at,
    edited,
    explained,
    prompts,
)

from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass


class Gated(ForwardPass):
    """The gate in torch's float64; faults override its steps."""

    def activated(self, layer: int, gate: F32) -> F32:
        if not at(layer):
            return super().activated(layer, gate)
        return self.function(torch.tensor(gate, dtype=torch.float64)).to(torch.float32).numpy()

    def function(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x)


class TanhGelu(Gated):
    def function(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh")


class ErfGelu(Gated):
    def function(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x)


class QuickGelu(Gated):
    def function(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Relu(Gated):
    def function(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


class Identity(Gated):
    def function(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("fault", "function"),
    [
        (TanhGelu, "GELU with tanh"),
        (ErfGelu, "GELU with erf"),
        (QuickGelu, "quick GELU"),
        (Relu, "ReLU"),
        (Identity, "no function"),
    ],
)
@pytest.mark.parametrize(("tap", "without"), [("ffn_silu", ()), ("ffn_swiglu", ("ffn_silu",))])
def test_another_activation_function(
    tap: str, without: tuple[str, ...], fault: type[ForwardPass], function: str, tmp_path: Path
) -> None:
    own = artifact("qwen2")
    found = explained(tmp_path, own, (LAYER, tap, ""), fault, without=without)
    assert found[0].class_ == "activation-function", found
    assert found[0].evidence["function"] == function


class UpShifted(ForwardPass):
    def gated(self, layer: int, activated: F32, up: F32) -> F32:
        return activated * (np.roll(up, -1, axis=1) if at(layer) else up)


class UpCut(ForwardPass):
    def gated(self, layer: int, activated: F32, up: F32) -> F32:
        if not at(layer):
            return activated * up
        product = np.zeros_like(up)
        product[:, :-1] = activated[:, :-1] * up[:, 1:]
        return product


class AllShifted(ForwardPass):
    def gated(self, layer: int, activated: F32, up: F32) -> F32:
        return np.roll(activated * up, 1, axis=1) if at(layer) else activated * up


class UpActivated(ForwardPass):
    def _mlp_block(self, hidden, layer, tap):  # type: ignore[no-untyped-def]
        self.swap = at(layer)
        return super()._mlp_block(hidden, layer, tap)

    def project(self, layer: int, site: str, x: F32) -> F32:
        y = super().project(layer, site, x)
        if site in ("gate", "up"):
            setattr(self, site, y)
        return y

    def activated(self, layer: int, gate: F32) -> F32:
        return super().activated(layer, self.up if at(layer) else gate)  # type: ignore[attr-defined]

    def gated(self, layer: int, activated: F32, up: F32) -> F32:
        return activated * (self.gate if at(layer) else up)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fault", "tap", "without", "class_"),
    [
        (UpShifted, "ffn_swiglu", (), "swiglu-shift"),
        (UpCut, "ffn_swiglu", (), "swiglu-shift"),
        (AllShifted, "ffn_swiglu", (), "swiglu-shift"),
        (UpShifted, "ffn_swiglu", ("ffn_silu",), "swiglu-shift"),
        (UpActivated, "ffn_silu", (), "gate-up-swapped"),
        (UpActivated, "ffn_swiglu", ("ffn_silu",), "gate-up-swapped"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_fault_of_the_product(
    fault: type[ForwardPass], tap: str, without: tuple[str, ...], class_: str, name: str, tmp_path: Path
) -> None:
    found = explained(tmp_path, artifact(name), (LAYER, tap, ""), fault, without=without)
    assert found[0].class_ == class_, found


class Adding(ForwardPass):
    """The residual sums with other coefficients."""

    where, stream, block = "post_ffn_residual", 1.0, 1.0

    def add(self, layer: int, tap: str, residual: F32, x: F32) -> F32:
        if at(layer) and tap == self.where:
            return np.float32(self.stream) * residual + np.float32(self.block) * x
        return super().add(layer, tap, residual, x)


@pytest.mark.parametrize("where", ["post_attn_residual", "post_ffn_residual"])
@pytest.mark.parametrize(
    ("stream", "block", "class_"),
    [
        (0.0, 1.0, "residual"),
        (2.0, 1.0, "residual"),
        (1.0, 0.0, "residual"),
        (1.0, 2.0, "residual"),
        (1.0, 0.22, "output-scale"),
        (0.5, 1.0, "output-scale"),
    ],
)
def test_a_fault_of_the_residual(
    stream: float, block: float, class_: str, where: str, tmp_path: Path
) -> None:
    fault = type("Fault", (Adding,), {"where": where, "stream": stream, "block": block})
    found = explained(tmp_path, artifact("llama"), (LAYER, where, ""), fault)
    assert found[0].class_ == class_, found


class SkippingLayer(ForwardPass):
    """A layer gives back its input, though its taps are there."""

    def add(self, layer: int, tap: str, residual: F32, x: F32) -> F32:
        return residual if at(layer) else super().add(layer, tap, residual, x)


class NotRun(ForwardPass):
    """A layer does not run at all."""

    def run_layers(self, hidden, batch, layers, tap=None):  # type: ignore[no-untyped-def]
        return super().run_layers(hidden, batch, [layer for layer in layers if layer != LAYER], tap)


def test_a_layer_that_gives_back_its_input(tmp_path: Path) -> None:
    own = artifact("llama")
    found = explained(tmp_path, own, (LAYER, "post_attn_residual", ""), SkippingLayer)
    assert found[0].class_ == "layer-skipped", found


def test_a_layer_that_is_not_in_the_trace(tmp_path: Path) -> None:
    found = explained(tmp_path, artifact("llama"), (LAYER + 1, "attn_norm", ""), NotRun)
    assert found[0].class_ == "layer-skipped", found


class Embedding(ForwardPass):
    factor, offset = 1.0, 0

    def embedding(self, batch: TokenBatch) -> F32:
        other = TokenBatch((batch.ids + self.offset) % self.config.vocab_size, batch.starts)
        return super().embedding(other) * np.float32(self.factor)


@pytest.mark.parametrize(
    ("factor", "offset", "class_"),
    [(96**0.5, 0, "output-scale"), (12.0, 0, "output-scale"), (1.0, 1, "cross-match")],
)
def test_a_fault_of_the_embedding(factor: float, offset: int, class_: str, tmp_path: Path) -> None:
    fault = type("Fault", (Embedding,), {"factor": factor, "offset": offset})
    found = explained(tmp_path, artifact("llama"), (-1, "embedding", ""), fault)
    assert found[0].class_ == class_, found


def test_a_row_of_the_embedding(tmp_path: Path) -> None:
    reference = artifact("llama")
    token = PROMPTS[0][1][5]

    def edit(tensors: dict[str, NDArray[np.float32]]) -> None:
        tensors["model.embed_tokens.weight"][token, 7] *= -3

    own = edited(tmp_path / "own", reference, edit)
    found = explained(tmp_path, own, (-1, "embedding", ""), reference=reference)
    assert found[0].class_ == "corrupt-block", found
    assert found[0].evidence["row"] == token
    assert (found[0].evidence["first"], found[0].evidence["last"]) == (7, 7)


class FewRows(ForwardPass):
    """A kernel for two or three rows that leaves a part of the columns out."""

    def attend(self, layer: int, q: F32, k: F32, v: F32, batch: TokenBatch) -> F32:
        self.batch = batch
        return super().attend(layer, q, k, v, batch)

    def project(self, layer: int, site: str, x: F32) -> F32:
        y = super().project(layer, site, x)
        if at(layer) and site == "down":
            for tokens in self.batch.slices:
                if tokens.stop - tokens.start in (2, 3):
                    rough = x[tokens].copy()
                    rough[:, -32:] = 0
                    y[tokens] = super().project(layer, site, rough)
        return y


def test_a_kernel_for_few_rows(tmp_path: Path) -> None:
    given = prompts(1, 2, 3, 7, 24)
    found = explained(tmp_path, artifact("llama"), (LAYER, "ffn_out", ""), FewRows, given=given)
    assert found[0].class_ == "row-count", found
    assert found[0].evidence["wrong_counts"] == [2, 3]


def test_positions_are_not_taken_for_row_counts(tmp_path: Path) -> None:
    class Late(ForwardPass):
        """Wrong from the tenth position on, whatever the reason."""

        def project(self, layer: int, site: str, x: F32) -> F32:
            y = super().project(layer, site, x)
            if at(layer) and site == "down":
                y[10:24] *= np.linspace(1.1, 1.7, 14, dtype=np.float32)[:, None]
            return y

    given = prompts(24, 3, 5)
    found = explained(tmp_path, artifact("llama"), (LAYER, "ffn_out", ""), Late, given=given)
    assert found[0].class_ == "unexplained", found


class Overflowing(ForwardPass):
    """Products in float16 of activations that are large."""

    def gated(self, layer: int, activated: F32, up: F32) -> F32:
        return super().gated(layer, activated, up) * np.float32(300000)

    def project(self, layer: int, site: str, x: F32) -> F32:
        y = super().project(layer, site, x)
        if at(layer) and site == "down":
            with np.errstate(over="ignore"):
                y = y.astype(np.float16).astype(np.float32)
        return y


class OneRow(ForwardPass):
    def project(self, layer: int, site: str, x: F32) -> F32:
        y = super().project(layer, site, x)
        if at(layer) and site == "down":
            y[:, 23] = np.nan
        return y


def test_an_overflow_of_float16(tmp_path: Path) -> None:
    found = explained(tmp_path, artifact("llama"), (LAYER, "ffn_out", ""), Overflowing)
    assert found[0].class_ == "f16-overflow", found
    assert found[0].evidence["largest_magnitude"] > 65504


class Half(ForwardPass):
    def project(self, layer: int, site: str, x: F32) -> F32:
        if at(layer) and site == "down":
            ref = self._weights["model"].artifact.tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
            w = torch.tensor(np.array(ref.raw()).view("<f4")).half()
            return (torch.tensor(x).half() @ w.T).float().numpy()
        return super().project(layer, site, x)


def test_a_product_in_float16_that_did_not_overflow(tmp_path: Path) -> None:
    found = explained(tmp_path, artifact("llama"), (LAYER, "ffn_out", ""), Half)
    assert found[0].class_ == "f16-overflow", found
    assert found[0].evidence["largest_magnitude"] < 65504


def test_a_row_that_is_not_a_number(tmp_path: Path) -> None:
    found = explained(tmp_path, artifact("llama"), (LAYER, "ffn_out", ""), OneRow)
    assert found[0].class_ == "non-finite"
    assert (found[0].evidence["first_channel"], found[0].evidence["channels"]) == (23, 1)


def test_a_value_of_the_file_that_is_not_a_number(tmp_path: Path) -> None:
    reference = artifact("llama")

    def edit(tensors: dict[str, NDArray[np.float32]]) -> None:
        tensors[f"model.layers.{LAYER}.mlp.down_proj.weight"][31, 4] = np.inf

    own = edited(tmp_path / "own", reference, edit)
    found = explained(tmp_path, own, (LAYER, "ffn_out", ""), reference=reference)
    assert found[0].class_ == "non-finite", found
    assert found[0].evidence["first_channel"] == 31


@pytest.mark.parametrize(
    "tap", ["embedding", "attn_norm", "ffn_silu", "ffn_swiglu", "post_attn_residual", "ffn_out"]
)
def test_noise_is_given_no_name(tap: str, tmp_path: Path) -> None:
    """Noise of three percent, other at every value, is none of the faults."""
    random = np.random.Generator(np.random.Philox(9))

    def rough(x: F32) -> F32:
        return (x * (1 + 0.03 * random.standard_normal(x.shape))).astype(np.float32)

    class Noisy(ForwardPass):
        def embedding(self, batch: TokenBatch) -> F32:
            return rough(super().embedding(batch)) if tap == "embedding" else super().embedding(batch)

        def attn_norm(self, layer: int, x: F32) -> F32:
            return rough(super().attn_norm(layer, x)) if tap == "attn_norm" else super().attn_norm(layer, x)

        def activated(self, layer: int, gate: F32) -> F32:
            y = super().activated(layer, gate)
            return rough(y) if tap == "ffn_silu" else y

        def gated(self, layer: int, activated: F32, up: F32) -> F32:
            y = super().gated(layer, activated, up)
            return rough(y) if tap == "ffn_swiglu" else y

        def add(self, layer: int, name: str, residual: F32, x: F32) -> F32:
            y = super().add(layer, name, residual, x)
            return rough(y) if tap == name else y

        def project(self, layer: int, site: str, x: F32) -> F32:
            y = super().project(layer, site, x)
            return rough(y) if tap == "ffn_out" and site == "down" else y

    layer = -1 if tap == "embedding" else LAYER
    found = explained(tmp_path, artifact("llama"), (layer, tap, ""), Noisy)
    assert found[0].class_ == "unexplained", found
