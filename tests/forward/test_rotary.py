from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from driftscope.artifacts.config import config_from_hf
from driftscope.artifacts.model import ModelConfig
from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch
from driftscope.forward.rotary import (
    Rotations,
    is_long,
    longest_sequence,
    rope_frequencies,
    rope_scale,
    turns_locally,
)
from driftscope.kernels.forward import rope_tables

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(theta: float, scaling: dict[str, Any] | None, head_dim: int = 128) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        hidden_size=head_dim,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        intermediate_size=8,
        vocab_size=8,
        context_length=131072,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
    )


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 1e6])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_frequencies_are_transformers(theta: float, scaling: dict[str, Any] | None) -> None:
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=128,
            num_attention_heads=1,
            max_position_embeddings=131072,
            rope_parameters=parameters,
        )
    )
    # torch's power is good to an ulp or two of float32.
    np.testing.assert_allclose(rope_frequencies(config(theta, scaling)), theirs.inv_freq.numpy(), rtol=2.5e-7)


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("given", [{}, {"attention_factor": 1.25}])
def test_longrope_is_transformers(share: float, given: dict[str, float]) -> None:
    half = int(64 * share) // 2
    factors = {
        "short_factor": np.linspace(1.0, 1.3, half).tolist(),
        "long_factor": np.linspace(1.1, 40.0, half).tolist(),
    }
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": share,
        "original_max_position_embeddings": 4096,
        **factors,
        **given,
    }
    hf = Phi3Config(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=parameters,
    )
    theirs = Phi3RotaryEmbedding(hf)
    read = config_from_hf({**hf.to_dict(), "model_type": "phi3"}, "config.json")
    assert (read.rotary_dim or 64) == 2 * half
    # Kept as the shortest decimal of its f32, as GGUF has it.
    assert np.float32(rope_scale(read)) == np.float32(theirs.attention_scaling)
    for length in (4096, 4097):
        positions = torch.arange(length)[None]
        theirs(torch.zeros(1), positions)
        found = rope_frequencies(read, long=is_long(read, length))
        np.testing.assert_allclose(found, theirs.inv_freq.numpy(), rtol=2.5e-7)
    assert not np.allclose(rope_frequencies(read), rope_frequencies(read, long=True), rtol=0.05)


def test_layers_with_a_window_turn_by_their_own_theta_unscaled() -> None:
    base = config(1e6, {"rope_type": "linear", "factor": 8.0})
    mixed = dataclasses.replace(
        base, num_layers=3, sliding_window=8, sliding_layers=(0, 2), local_rope_theta=1e4
    )
    rotations = Rotations(mixed)
    batch = TokenBatch.of([[1, 2], [3]])
    for layer, expected in ((0, config(1e4, None)), (1, base), (2, config(1e4, None))):
        assert turns_locally(mixed, layer) == (layer != 1)
        wanted = np.broadcast_to(rope_frequencies(expected), (3, 64))
        assert np.array_equal(rotations.of_tokens(layer, batch), wanted)


def test_each_sequence_turns_by_the_factors_for_its_own_length() -> None:
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0, 2.0],
        "long_factor": [3.0, 4.0],
        "original_max_position_embeddings": 2,
        "attention_factor": 1.5,
    }
    rotations = Rotations(config(100.0, scaling, head_dim=4))
    batch = TokenBatch.of([[1, 2, 3], [4], [5, 6]])
    assert rotations.set_of(0, batch).tolist() == [1, 1, 1, 0, 0, 0]
    cosine, sine, rows = rotations.tables(0, batch, rope_tables)
    angles = np.array([0, 1, 2, 0, 0, 1])[:, None] * rotations.of_tokens(0, batch)
    np.testing.assert_allclose(cosine[rows], 1.5 * np.cos(angles), rtol=1e-6)
    np.testing.assert_allclose(sine[rows], 1.5 * np.sin(angles), rtol=1e-6)
    assert rotations.tables(0, batch, rope_tables)[0] is cosine
    # Other positions than the batch's turn by the same factors.
    moved = rotations.tables(0, batch, rope_tables, np.full(6, 7))
    np.testing.assert_allclose(moved[0][moved[2]], 1.5 * np.cos(7 * rotations.of_tokens(0, batch)), rtol=1e-5)


def test_longrope_without_its_factors() -> None:
    with pytest.raises(InputError, match="lacks short_factor"):
        rope_frequencies(config(1e4, {"rope_type": "longrope"}))
    with pytest.raises(InputError, match="3 values; expected 64"):
        rope_frequencies(config(1e4, {"rope_type": "longrope", "short_factor": [1.0, 1.0, 1.0]}))


def test_ggufs_factors_stand_in_for_the_scaling_in_the_configuration() -> None:
    plain = rope_frequencies(config(5e5, None))
    scaled = rope_frequencies(config(5e5, LLAMA3))
    found = rope_frequencies(config(5e5, LLAMA3), plain / scaled)
    np.testing.assert_allclose(found, scaled, rtol=2e-7)


def test_stored_factors_must_be_there() -> None:
    with pytest.raises(InputError, match=r"rope_freqs\.weight is missing"):
        rope_frequencies(config(1e4, {"rope_type": "stored_factors"}))
    factors = np.full(64, 2.0, dtype=np.float32)
    found = rope_frequencies(config(1e4, {"rope_type": "stored_factors"}), factors)
    assert np.array_equal(found, rope_frequencies(config(1e4, None)) / 2)


def test_factors_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="32 values, expected 64"):
        rope_frequencies(config(1e4, None), np.ones(32, dtype=np.float32))


YARN: dict[str, dict[str, Any]] = {
    "plain": {"original_max_position_embeddings": 8192},
    "no trained length": {},
    "betas": {"original_max_position_embeddings": 4096, "beta_fast": 24.0, "beta_slow": 2.5},
    "attention factor": {"original_max_position_embeddings": 4096, "attention_factor": 1.25},
    "mscales": {"original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.3},
    "one mscale": {"original_max_position_embeddings": 4096, "mscale": 0.707},
    "not truncated": {"original_max_position_embeddings": 4096, "truncate": False},
    "no range": {
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "short": {"original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
@pytest.mark.parametrize("name", sorted(YARN))
def test_yarn_is_transformers(theta: float, factor: float, name: str) -> None:
    scaling = {"rope_type": "yarn", "factor": factor, **YARN[name]}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=128,
            num_attention_heads=1,
            max_position_embeddings=131072,
            rope_parameters={**scaling, "rope_theta": theta},
        )
    )
    ours = config(theta, scaling)
    np.testing.assert_allclose(rope_frequencies(ours), theirs.inv_freq.numpy(), rtol=5e-7)
    assert rope_scale(ours) == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_yarn_makes_room_for_longer_sequences() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    assert longest_sequence(config(1e4, None)) == 131072
    assert longest_sequence(config(1e4, scaling)) == 4 * 131072
    assert longest_sequence(config(1e4, {**scaling, "original_max_position_embeddings": 4096})) == 131072


@pytest.mark.parametrize("change", [{"beta_fast": 1e308}, {"extrapolation_factor": 0.5}])
def test_nonsensical_yarn_is_an_input_error(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match="RoPE scaling"):
        rope_frequencies(config(1e4, {"rope_type": "yarn", "factor": 4.0, **change}))


def test_yarn_needs_a_theta_whose_powers_differ() -> None:
    with pytest.raises(InputError, match="theta"):
        rope_frequencies(config(1.0, {"rope_type": "yarn", "factor": 4.0}))


def test_an_unimplemented_scaling_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'dynamic' has no forward pass"):
        rope_frequencies(config(1e4, {"rope_type": "dynamic", "factor": 4.0}))
