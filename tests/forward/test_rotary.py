from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from driftscope.artifacts.model import ModelConfig
from driftscope.errors import InputError
from driftscope.forward.rotary import longest_sequence, rope_frequencies, rope_scale

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
