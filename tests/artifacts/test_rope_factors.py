"""Llama 3's rotary divisors, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.helpers.tiny_gguf import HEAD_DIM, add_hyperparameters, tiny_tensors, write_gguf
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.names import ROPE_FREQS
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.rope_factors import STORED_FACTORS, llama3_factors
from driftscope.errors import InputError


def scaling(factor: float) -> dict[str, object]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def factors_of_transformers(theta: float, head_dim: int, factor: float) -> NDArray[np.float32]:
    """Plain frequencies over llama3's, both from transformers."""
    parameters = scaling(factor) | {"rope_theta": theta}
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=parameters
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return np.asarray(plain / scaled, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_factors_are_those_of_transformers(factor: float, head_dim: int) -> None:
    ours = llama3_factors(500000.0, head_dim, factor=factor, low=1.0, high=4.0, original_length=8192)
    np.testing.assert_allclose(ours, factors_of_transformers(500000.0, head_dim, factor), rtol=1e-5)
    assert len(set(ours.tolist())) > 3


def stored(path: Path, factors: NDArray[np.float32]) -> Path:
    return write_gguf(path, "llama", tiny_tensors("llama") | {ROPE_FREQS: factors})


def test_scaling_is_recovered_from_a_gguf_file(tmp_path: Path) -> None:
    artifact = open_artifact(stored(tmp_path / "m.gguf", factors_of_transformers(10000.0, HEAD_DIM, 8.0)))
    assert artifact.config.rope_scaling == scaling(8.0)
    assert artifact.unmapped == ()
    assert list(artifact.tensors)[-1] == ROPE_FREQS


def test_copies_carry_the_scaling(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        tiny_tensors("llama") | {ROPE_FREQS: factors_of_transformers(10000.0, HEAD_DIM, 8.0)},
        keys=lambda writer: add_hyperparameters(writer, vocabulary=False),
    )
    source = open_artifact(path)
    write_teacher(source, tmp_path / "teacher")
    teacher = open_artifact(tmp_path / "teacher")
    assert teacher.config == source.config
    assert ROPE_FREQS not in teacher.tensors
    write_candidate(teacher, tmp_path / "copy.gguf", scheme="F32")
    copy = open_artifact(tmp_path / "copy.gguf")
    assert copy.config == source.config
    factors, expected = (a.tensors[ROPE_FREQS].raw().view(np.float32) for a in (copy, source))
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


def test_other_factors_are_not_copied(tmp_path: Path) -> None:
    source = open_artifact(stored(tmp_path / "m.gguf", np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32)))
    with pytest.raises(InputError, match="follow no known RoPE scaling"):
        write_teacher(source, tmp_path / "teacher")


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    path = stored(tmp_path / "m.gguf", np.ones(HEAD_DIM // 2, np.float32))
    assert open_artifact(path).config.rope_scaling is None


def test_other_factors_are_said_to_be_stored(tmp_path: Path) -> None:
    path = stored(tmp_path / "m.gguf", np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32))
    assert open_artifact(path).config.rope_scaling == STORED_FACTORS


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.ones(HEAD_DIM, np.float32), "rope_freqs.weight is F32 16; expected F32 8"),
        (np.zeros(HEAD_DIM // 2, np.float32), "values that are not positive"),
        (np.full(HEAD_DIM // 2, np.nan, np.float32), "values that are not positive"),
    ],
)
def test_factors_that_make_no_sense(tmp_path: Path, factors: NDArray[np.float32], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_artifact(stored(tmp_path / "m.gguf", factors))
