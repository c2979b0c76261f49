from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from driftscope.artifacts.model import ModelConfig
from driftscope.errors import InputError
from driftscope.forward.rotary import rope_frequencies

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


def test_an_unimplemented_scaling_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'yarn' has no forward pass"):
        rope_frequencies(config(1e4, {"rope_type": "yarn", "factor": 4.0}))
