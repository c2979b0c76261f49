"""Predicted error energies against errors that were made: roundings, quantized factors, turned angles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.analysis.tiny_configs import llama
from tests.forward.models import write_model

from driftscope.analysis.noise import ROUND, Noise, Spread, energy_of, side_by_side
from driftscope.analysis.random_models import write_random_model
from driftscope.analysis.replay import Replayer
from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.engines.own import record
from driftscope.forward.arithmetic import Arithmetic, round_to
from driftscope.forward.batch import TokenBatch
from driftscope.forward.evaluate import DeclaredOps
from driftscope.forward.exact import ExactOps
from driftscope.forward.model import ForwardPass
from driftscope.forward.ops import Ops

BATCH = TokenBatch.of([list(range(40)), list(range(100, 124))])
PLAIN = Arithmetic.of()


def random(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def gaussian(channels: int, seed: int = 0) -> np.ndarray:
    return random(seed).standard_normal((BATCH.n_tokens, channels)).astype(np.float32)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("teacher")
    return open_artifact(write_model(folder, "qwen2", hidden_size=448, intermediate_size=512))


@pytest.fixture(scope="module", params=["Q8_0", "Q4_K_M", "F16"])
def own(
    request: pytest.FixtureRequest, teacher: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    path = tmp_path_factory.mktemp("own") / "model.gguf"
    write_candidate(teacher, path, scheme=request.param)
    return open_artifact(path)


def compared(found: Spread, error: Spread) -> tuple[float, float, float]:
    """Measured over predicted: pooled, and the extremes of channels."""
    ratios = error.per_channel / found.per_channel
    return error.total / found.total, float(ratios.min()), float(ratios.max())


def ops(artifact: Artifact, arithmetic: Arithmetic) -> DeclaredOps:
    roles = dict.fromkeys(arithmetic.policy.artifacts, artifact)
    return DeclaredOps(Ops(roles, arithmetic.policy), arithmetic.dtype)


@pytest.mark.parametrize(("dtype", "unit"), [("f16", 2.0**-11), ("bf16", 2.0**-8)])
def test_energy_of_roundings(dtype: str, unit: float) -> None:
    values = np.exp2(random().uniform(-4, 4, 100_000)).astype(np.float32)
    error = np.square(round_to(values, dtype).astype(np.float64) - values).sum()
    assert np.isclose(error / (unit**2 * np.square(values.astype(np.float64)).sum()), ROUND, rtol=0.1)


def test_energy_of_a_sum_of_products(teacher: Artifact) -> None:
    x = gaussian(448)
    inputs = {"ffn_norm": x}
    declared = ops(teacher, PLAIN).evaluate(1, "ffn_up", inputs, BATCH)
    exact = ExactOps(teacher).evaluate(1, "ffn_up", inputs, BATCH)
    assert not isinstance(declared, list)
    found = Noise(teacher, PLAIN, BATCH).predict(1, "ffn_up", "", inputs, declared, ["arithmetic"])
    pooled, low, high = compared(found["arithmetic"], energy_of(np.asarray(exact) - declared, BATCH))
    assert 0.5 < pooled < 2
    assert 0.25 < low < high < 4


@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_energy_of_a_quantized_activation(own: Artifact, site: str) -> None:
    arithmetic = Arithmetic.of("int8-dot")
    inputs = {"attn_norm": gaussian(448)}
    width = {"q": slice(0, 448), "k": slice(448, 512), "v": slice(512, 576)}[site]
    declared = np.asarray(ops(own, arithmetic).evaluate(1, "qkv_matmul", inputs, BATCH))[:, width]
    exact = np.asarray(ExactOps(own).evaluate(1, "qkv_matmul", inputs, BATCH))[:, width]
    found = Noise(own, arithmetic, BATCH).predict(1, "qkv_matmul", site, inputs, declared, ["arithmetic"])
    pooled, low, high = compared(found["arithmetic"], energy_of(exact - declared, BATCH))
    assert 0.75 < pooled < 1.33
    assert 0.5 < low < high < 2


def test_energy_of_quantized_weights(own: Artifact, teacher: Artifact) -> None:
    inputs = {"ffn_swiglu": gaussian(512)}
    exact = np.asarray(ExactOps(own).evaluate(1, "ffn_out", inputs, BATCH))
    reference = np.asarray(ExactOps(teacher).evaluate(1, "ffn_out", inputs, BATCH))
    output = exact.astype(np.float32)
    found = Noise(own, PLAIN, BATCH).predict(1, "ffn_out", "", inputs, output, ["model"])["model"]
    pooled, low, high = compared(found, energy_of(exact - reference, BATCH))
    assert 0.5 < pooled < 2
    assert 0.2 < low < high < 5
    tokens = energy_of(exact - reference, BATCH).per_token / found.per_token
    assert 0.3 < tokens.min() < tokens.max() < 3


def test_energy_of_quantized_embedding_rows(own: Artifact, teacher: Artifact) -> None:
    exact = np.asarray(ExactOps(own).evaluate(-1, "embedding", {}, BATCH))
    reference = np.asarray(ExactOps(teacher).evaluate(-1, "embedding", {}, BATCH))
    output = exact.astype(np.float32)
    found = Noise(own, PLAIN, BATCH).predict(-1, "embedding", "", {}, output, ["model"])["model"]
    pooled, _, _ = compared(found, energy_of(exact - reference, BATCH))
    assert 0.5 < pooled < 2


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_energy_of_attention(teacher: Artifact, kv_type: str) -> None:
    arithmetic = Arithmetic.of(kv_type=kv_type)
    declared, exact = ops(teacher, arithmetic), ExactOps(teacher)
    noise = Noise(teacher, arithmetic, BATCH)
    inputs: dict[str, object] = {
        "q_post_rope": gaussian(448, 1),
        "k_post_rope": gaussian(64, 2),
        "qkv_bias": gaussian(576, 3),
    }
    for tap in ("attn_scores", "attn_softmax", "attention"):
        given = declared.evaluate(1, tap, inputs, BATCH)  # type: ignore[arg-type]
        truth = exact.evaluate(1, tap, inputs, BATCH)
        if isinstance(given, list):
            error: object = [b - a for a, b in zip(given, truth, strict=True)]
        else:
            error = np.asarray(truth) - given
        found = noise.predict(1, tap, "", inputs, given, ["arithmetic"])["arithmetic"]  # type: ignore[arg-type]
        measured = energy_of(error, BATCH, heads=14)  # type: ignore[arg-type]
        if tap == "attn_scores":
            seen = [np.tile(np.tri(len(part), dtype=bool), 14) for part in given]
            kept = [np.where(mask, part, 0) for mask, part in zip(seen, error, strict=True)]  # type: ignore[call-overload]
            measured = energy_of(kept, BATCH, heads=14)
            shown = [np.where(mask, part, 0) for mask, part in zip(seen, given, strict=True)]
            found = noise.predict(1, tap, "", inputs, shown, ["arithmetic"])["arithmetic"]  # type: ignore[arg-type]
        # Ours are rounded less often than is expected of an engine.
        assert 0.02 < measured.total / found.total < 2, tap
        inputs[tap] = given


def test_angles_of_pairs_grow_with_the_position(teacher: Artifact) -> None:
    inputs = {"qkv_bias": gaussian(576)}
    declared = np.asarray(ops(teacher, PLAIN).evaluate(1, "q_post_rope", inputs, BATCH))
    exact = np.asarray(ExactOps(teacher).evaluate(1, "q_post_rope", inputs, BATCH))
    found = Noise(teacher, PLAIN, BATCH).predict(1, "q_post_rope", "", inputs, declared)["engine"]
    measured = energy_of(exact - declared, BATCH)
    assert 0.1 < measured.total / found.total < 2
    for spread in (found, measured):
        assert spread.per_token[30:40].mean() > 2 * spread.per_token[:5].mean()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_narrow_dtype_costs_its_roundings(teacher: Artifact, dtype: str) -> None:
    arithmetic = Arithmetic.of(dtype=dtype)
    inputs = {"ffn_gate": gaussian(512)}
    declared = np.asarray(ops(teacher, arithmetic).evaluate(1, "ffn_silu", inputs, BATCH))
    exact = np.asarray(ExactOps(teacher).evaluate(1, "ffn_silu", inputs, BATCH))
    found = Noise(teacher, arithmetic, BATCH).predict(1, "ffn_silu", "", inputs, declared)
    pooled, _, _ = compared(found["arithmetic"], energy_of(exact - declared, BATCH))
    assert 0.7 < pooled < 1.4


def test_what_a_recomputed_input_passes_on(teacher: Artifact) -> None:
    noise, inputs = Noise(teacher, PLAIN, BATCH), {"ffn_silu": gaussian(512), "ffn_up": gaussian(512, 1)}
    output = inputs["ffn_silu"] * inputs["ffn_up"]
    alone = noise.predict(1, "ffn_swiglu", "", inputs, output)["engine"]
    energy = energy_of(inputs["ffn_silu"], BATCH)
    errors = {"ffn_silu": {"engine": 1e-6 * energy}}
    found = noise.predict(1, "ffn_swiglu", "", inputs, output, inherited=errors)["engine"]
    added = found.total - alone.total
    assert np.isclose(added, 1e-6 * energy_of(output, BATCH).total, rtol=1e-3)


def test_a_flip_of_a_recomputed_activation_is_expected(own: Artifact) -> None:
    arithmetic, inputs = Arithmetic.of("int8-dot"), {"ffn_swiglu": gaussian(512)}
    declared = ops(own, arithmetic)
    output = np.asarray(declared.evaluate(1, "ffn_out", inputs, BATCH))
    # As if the activation came out of another order of operations: off by some last bits.
    wobble = 1.0 + random(9).standard_normal(inputs["ffn_swiglu"].shape) * 3e-7
    other = {"ffn_swiglu": (inputs["ffn_swiglu"] * wobble).astype(np.float32)}
    errors = {"ffn_swiglu": {"engine": energy_of(other["ffn_swiglu"] - inputs["ffn_swiglu"], BATCH)}}
    noise = Noise(own, arithmetic, BATCH)
    found = noise.predict(1, "ffn_out", "", inputs, output, ["engine"], inherited=errors)["engine"]
    flipped = np.asarray(declared.evaluate(1, "ffn_out", other, BATCH))
    measured = energy_of(flipped - output, BATCH)
    assert measured.total < 2 * found.total
    assert (measured.per_token < 10 * found.per_token).all()


def test_spreads() -> None:
    values = random().random((BATCH.n_tokens, 6))
    whole = Spread.of_values(values, BATCH)
    assert np.isclose(whole.total, values.sum())
    per_token, per_channel = whole.of_sequence(1, BATCH.slices[1])
    assert np.allclose(per_token, values[40:].sum(axis=1))
    assert np.allclose(per_channel, values[40:].sum(axis=0))
    both = side_by_side([Spread.of_values(values[:, :2], BATCH), Spread.of_values(values[:, 2:], BATCH)])
    assert np.allclose(both.per_channel, whole.per_channel)
    assert np.allclose(both.per_token, whole.per_token)
    # Without the channels of each sequence, they share as the tokens do.
    shared = replace(whole, by_sequence=None).of_sequence(1, BATCH.slices[1])[1]
    assert np.isclose(shared.sum(), values[40:].sum())
    assert np.allclose((2.0 * whole + whole).per_channel, 3 * whole.per_channel)


def test_what_is_not_finite_has_no_energy() -> None:
    values = np.array([[1.0, np.nan], [np.inf, 2.0]])
    found = energy_of(values, TokenBatch.of([[1, 2]]))
    assert found.per_token.tolist() == [1.0, 4.0]


def test_the_turn_mixes_what_storing_a_head_norm_leaves(tmp_path: Path) -> None:
    """Weights of one half of a head are exact in BF16, and the other half's error lies in both."""
    config = llama(
        architecture="gemma3_text", num_layers=1, qk_norm=True, post_norms=True, norm_offset=1.0, head_dim=32
    )
    random = np.random.Generator(np.random.Philox(3))
    weights = {}
    for name, shape in expected_shapes(config).items():
        values = random.standard_normal(shape, dtype=np.float32)
        weights[name] = values / np.float32(shape[-1] ** 0.5) if len(shape) == 2 else np.float32(0.2) * values
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name][:16] = np.float32(2.0**-12)
    teacher = write_random_model(tmp_path / "teacher.bin", config, weights)
    own = write_random_model(tmp_path / "own.bin", config, weights, "BF16")
    prompt = ("p", [int(token) for token in random.integers(0, config.vocab_size, size=40)])
    forward = ForwardPass({"model": own}, Arithmetic.of().policy)
    trace = record(forward, [prompt], tmp_path / "trace", declared=Arithmetic.of())
    replayer = Replayer(trace, own, reference=teacher, components=("model",))

    for tap in ("q_post_rope", "k_post_rope"):
        op = replayer.op(0, tap)
        assert op.exact is not None
        assert op.reference is not None
        measured = np.sum(np.square(op.exact - op.reference), axis=0)
        predicted = op.predicted["model"].per_channel
        assert measured.min() > 0
        assert (measured < 10 * predicted).all(), (measured / predicted).max()
