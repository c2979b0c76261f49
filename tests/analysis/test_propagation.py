"""Injected and inherited error: the parts add up, and agree with torch's own layers and their derivative."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.forward.models import write_model

from driftscope.analysis import propagation as module
from driftscope.analysis.propagation import by_layer, propagation
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.engines import own
from driftscope.engines import transformers as transformers_engine
from driftscope.engines.trace import Trace
from driftscope.errors import InputError
from driftscope.evidence.schemas import frame_of, validate
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.model import ForwardPass

PROMPTS = [("a", [5, 9, 200, 7, 7, 41, 300, 2]), ("b", [3])]
IDENTITY = ("injected", "inherited", "remainder", "cross")


def trace(artifact: Artifact, folder: Path, arithmetic: Arithmetic | None = None) -> Trace:
    return own.trace(artifact, PROMPTS, folder, arithmetic or Arithmetic.of())


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Trace]:
    folder = tmp_path_factory.mktemp("qwen2")
    artifact = open_artifact(write_model(folder / "model", "qwen2"))
    return artifact, trace(artifact, folder / "trace")


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_the_parts_add_up(name: str, tmp_path: Path) -> None:
    teacher = open_artifact(write_model(tmp_path / "teacher", name))
    write_candidate(teacher, tmp_path / "model.gguf", scheme="Q8_0")
    candidate = open_artifact(tmp_path / "model.gguf")
    a = trace(teacher, tmp_path / "a")
    b = trace(candidate, tmp_path / "b", Arithmetic.of("int8-dot", kv_type="f16"))
    rows = propagation(a, b, teacher, pair="a|b")
    validate(frame_of(rows, "propagation"), "propagation", tmp_path)
    assert {(row["layer"], row["tap"]) for row in rows} == {
        *((layer, "post_ffn_residual") for layer in range(3)),
        *((-1, "embedding"), (-1, "lm_head")),
    }
    for row in rows:
        size = sum(abs(row[name]) for name in IDENTITY)
        assert row["energy_out"] > 0
        assert abs(row["unexplained"]) <= 1e-12 * size
        # The reference's own layers from its own inputs give its own outputs.
        assert row["remainder"] == 0.0
        if row["tap"] != "embedding":
            assert row["gain"] == row["inherited"] / row["energy_in"]
    assert all(row["inherited"] == 0 and row["gain"] is None for row in rows if row["tap"] == "embedding")


def test_scopes_add_up_token_by_token(qwen2: tuple[Artifact, Trace], tmp_path: Path) -> None:
    artifact, a = qwen2
    b = trace(artifact, tmp_path / "b", Arithmetic.of("f32", activation="bf16"))
    rows = [row for row in propagation(a, b, artifact) if row["prompt"] == "a"]
    for layer in range(3):
        at = [row for row in rows if row["layer"] == layer]
        tokens = [row for row in at if row["scope"] == "token"]
        for scope, first in (("all", 0), ("all-but-first", 1), ("last", 7)):
            (row,) = (row for row in at if row["scope"] == scope)
            for name in (*IDENTITY, "energy_in", "energy_out", "signal_energy"):
                assert row[name] == pytest.approx(sum(t[name] for t in tokens[first:]), rel=1e-12)


class Louder(ForwardPass):
    """A pass whose MLP is 10 % too loud in the layer 1."""

    def project(self, layer: int, site: str, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        found = super().project(layer, site, x)
        return found * np.float32(1.1) if (layer, site) == (1, "down") else found


def test_a_fault_is_injected_where_it_is_and_inherited_behind(
    qwen2: tuple[Artifact, Trace], tmp_path: Path
) -> None:
    artifact, a = qwen2
    b = own.record(Louder({"model": artifact}, Arithmetic.of().policy), PROMPTS, tmp_path / "b")
    found = {(row["layer"], row["tap"]): row for row in by_layer(propagation(a, b, artifact), "all")}
    clean = ((-1, "embedding"), (0, "post_ffn_residual"))
    assert all(found[place]["energy_out"] == 0.0 for place in clean)
    fault = found[1, "post_ffn_residual"]
    assert fault["injected"] == fault["energy_out"] > 0
    assert fault["inherited"] == fault["energy_in"] == 0.0
    down = a.tap(1, "ffn_out").astype(np.float64)
    assert fault["injected"] == pytest.approx(0.01 * np.square(down).sum(), rel=1e-5)
    for place in ((2, "post_ffn_residual"), (-1, "lm_head")):
        assert found[place]["injected"] == 0.0
        assert found[place]["inherited"] == found[place]["energy_out"] > 0


def test_the_gain_is_that_of_torch_and_of_its_derivative(tmp_path: Path) -> None:
    """Inherited error is L(B_in) - L(A_in); for a small error that is the layer's derivative times it."""
    folder = write_model(tmp_path / "model", "llama")
    artifact = open_artifact(folder)
    a = trace(artifact, tmp_path / "a")
    b = own.record(Shifted({"model": artifact}, Arithmetic.of().policy), PROMPTS, tmp_path / "b")
    (row,) = (
        row
        for row in propagation(a, b, artifact, layers=[1])
        if row["prompt"] == "a" and row["scope"] == "all"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    tokens = len(PROMPTS[0][1])
    positions = torch.arange(tokens)[None]
    mask = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)[None, None]

    def layer(x: torch.Tensor) -> torch.Tensor:
        embeddings = model.model.rotary_emb(x, positions)
        found = model.model.layers[1](x, attention_mask=mask, position_embeddings=embeddings)
        return found[0] if isinstance(found, tuple) else found

    x, y = (torch.tensor(t.tap(0, "post_ffn_residual")[:tokens].astype(np.float64))[None] for t in (a, b))
    error = y - x
    assert row["energy_in"] == pytest.approx(float(error.square().sum()), rel=1e-12)
    with torch.no_grad():
        inherited = float((layer(y) - layer(x)).square().sum())
    assert row["inherited"] == pytest.approx(inherited, rel=1e-4)
    _, derivative = torch.autograd.functional.jvp(layer, x, error)
    assert row["gain"] == pytest.approx(float(derivative.square().sum() / error.square().sum()), rel=0.02)


class Shifted(ForwardPass):
    """A pass whose embedding is off by a thousandth of its values, with alternating signs."""

    def embedding(self, batch: object) -> np.ndarray:  # type: ignore[type-arg,override]
        found = super().embedding(batch)  # type: ignore[arg-type]
        signs = np.where(np.arange(found.size).reshape(found.shape) % 3, 1.0, -1.0).astype(np.float32)
        return found * (1 + np.float32(1e-3) * signs)


def test_the_remainder_is_what_our_computation_is_off_by(tmp_path: Path) -> None:
    """A reference whose trace is not what its declared arithmetic gives: the parts still add up."""
    artifact = open_artifact(write_model(tmp_path / "model", "qwen2"))
    a = own.trace(artifact, PROMPTS, tmp_path / "a", Arithmetic.of("f32", activation="bf16"))
    b = own.trace(artifact, PROMPTS, tmp_path / "b", Arithmetic.of())
    for row in propagation(a, b, artifact, arithmetic=Arithmetic.of()):
        size = sum(abs(row[name]) for name in IDENTITY)
        assert abs(row["unexplained"]) <= 1e-12 * max(size, 1e-30)
        assert (row["remainder"] != 0) == (row["tap"] != "embedding")
        assert row["injected"] == 0.0


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_reference_in_half_precision_is_rounded_op_by_op(dtype: str, tmp_path: Path) -> None:
    """Against float32 the rounding of every output is injected, and far above that of the sums."""
    artifact = open_artifact(write_model(tmp_path / "model", "llama"))
    a = trace(artifact, tmp_path / "a")
    rows = propagation(a, a, artifact, arithmetic=Arithmetic.of(dtype=dtype))
    unit = {"bf16": 2.0**-9, "f16": 2.0**-12}[dtype]
    for row in by_layer(rows, "all"):
        if row["tap"] == "post_ffn_residual":
            assert 0.1 < np.sqrt(row["injected"] / row["signal_energy"]) / unit < 10
            assert row["inherited"] == row["energy_out"] == 0.0


def test_a_channel_that_is_not_finite_is_left_out(qwen2: tuple[Artifact, Trace], tmp_path: Path) -> None:
    artifact, a = qwen2
    b = own.record(Broken({"model": artifact}, Arithmetic.of().policy), PROMPTS, tmp_path / "b")
    rows = {
        (row["layer"], row["position"]): row
        for row in propagation(a, b, artifact, layers=[2])
        if row["prompt"] == "a" and row["scope"] == "token"
    }
    assert rows[2, 1]["compared_count"] == 112
    assert rows[2, 2]["compared_count"] == 111
    assert all(np.isfinite(row["energy_out"]) for row in rows.values())


class Broken(ForwardPass):
    """A pass that puts a NaN into one channel of one token behind the last layer."""

    def add(self, layer: int, tap: str, residual: np.ndarray, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        found = super().add(layer, tap, residual, x)
        if (layer, tap) == (2, "post_ffn_residual"):
            found[2, 5] = np.nan
        return found


def test_what_a_trace_does_not_have_is_left_out(qwen2: tuple[Artifact, Trace], tmp_path: Path) -> None:
    artifact, a = qwen2
    b = own.trace(artifact, PROMPTS, tmp_path / "b", Arithmetic.of(), wanted=lambda layer, tap: layer != 1)
    found = {(row["layer"], row["tap"]) for row in propagation(a, b, artifact)}
    assert found == {(-1, "embedding"), (0, "post_ffn_residual"), (-1, "lm_head")}


def test_other_tokens_are_refused(qwen2: tuple[Artifact, Trace], tmp_path: Path) -> None:
    artifact, a = qwen2
    b = own.trace(artifact, [("a", [1, 2])], tmp_path / "b", Arithmetic.of())
    with pytest.raises(InputError, match="is not over the prompts and token ids"):
        propagation(a, b, artifact)


def test_another_model_is_refused(qwen2: tuple[Artifact, Trace], tmp_path: Path) -> None:
    _, a = qwen2
    other = open_artifact(write_model(tmp_path / "other", "llama"))
    with pytest.raises(InputError, match="112 channels; expected the model's 96"):
        propagation(a, a, other)


def test_only_some_layers(qwen2: tuple[Artifact, Trace]) -> None:
    artifact, a = qwen2
    for layers, expected in (
        ([1], {(1, "post_ffn_residual")}),
        ([-1, 9], {(-1, "embedding"), (-1, "lm_head")}),
    ):
        found = propagation(a, a, artifact, layers=layers)
        assert {(row["layer"], row["tap"]) for row in found} == expected


def test_tokens_are_split_one_by_one_alike(
    qwen2: tuple[Artifact, Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, a = qwen2
    b = trace(artifact, tmp_path, Arithmetic.of("f32", activation="bf16"))
    whole = propagation(a, b, artifact)
    monkeypatch.setattr(module, "_CHUNK", 1)
    assert propagation(a, b, artifact) == whole


def test_the_remainder_of_another_engine_is_the_order_of_its_sums(
    qwen2: tuple[Artifact, Trace], tmp_path: Path
) -> None:
    artifact, _ = qwen2
    torch_trace = transformers_engine.trace(artifact.path, PROMPTS, tmp_path / "torch")
    b = own.record(Louder({"model": artifact}, Arithmetic.of().policy), PROMPTS, tmp_path / "b")
    for row in by_layer(propagation(torch_trace, b, artifact), "all"):
        if row["tap"] != "embedding" and row["layer"] != 0:
            assert abs(row["remainder"]) < 1e-5 * row["energy_out"]
