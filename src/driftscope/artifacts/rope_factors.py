"""Divisors of the rotary frequencies, which GGUF stores as tensors and Hugging Face in ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import GGUF_ARCHITECTURES, ROPE_FREQS, ROPE_LONG, ROPE_SHORT
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.values import count, positive, shortest
from driftscope.errors import InputError

# The scaling of a model whose stored divisors follow no known formula. Nothing can compute them from a
# configuration; the tensor alone says what they are.
STORED_FACTORS: Mapping[str, Any] = {"rope_type": "stored_factors"}

# All published Llama 3 models share these; only the factor differs (8 or 32).
_LOW, _HIGH, _ORIGINAL_LENGTH = 1.0, 4.0, 8192

# llama.cpp's converter computes in float32.
_TOLERANCE = 1e-4


def llama3_factors(
    theta: float, head_dim: int, *, factor: float, low: float, high: float, original_length: int
) -> NDArray[np.float64]:
    """Divisors of the rotary frequencies as ``float64[head_dim / 2]`` (Llama 3.1, ``rope_type: llama3``).

    Wavelengths above ``original_length / low`` tokens are divided by `factor`, those below
    ``original_length / high`` by one, and those between by the interpolation of the two in frequency.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original_length / wavelengths - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth))


def without_stored_factors(artifact: Artifact) -> Artifact:
    """The artifact without the tensors of divisors, where its configuration says the same.

    Raises:
        InputError: only a tensor says what the divisors are, so that a copy would lose them.
    """
    if artifact.config.rope_scaling == STORED_FACTORS:
        raise InputError(
            f"{artifact.path}: the divisors in {ROPE_FREQS} follow no known RoPE scaling and cannot be copied"
        )
    computed = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
    tensors = {name: tensor for name, tensor in artifact.tensors.items() if name not in computed}
    return replace(artifact, tensors=tensors)


def with_stored_factors(
    config: ModelConfig, tensors: Mapping[str, TensorRef], metadata: Mapping[str, Any], where: str
) -> ModelConfig:
    """The hyperparameters of a GGUF file with the scaling that its tensors of divisors stand for.

    Args:
        config: from the metadata.
        tensors: canonical name to tensor.
        metadata: the key-values, of which LongRoPE needs two more.
        where: the file, for messages.

    Raises:
        InputError: two scalings at once, or divisors that make no sense.
    """
    stored = [name for name in (ROPE_FREQS, ROPE_LONG, ROPE_SHORT) if name in tensors]
    if not stored:
        return config
    if config.rope_scaling is not None:
        kind = config.rope_scaling["rope_type"]
        raise InputError(f"{where}: both {stored[0]} and a RoPE scaling of kind {kind!r}")
    if stored[0] == ROPE_FREQS:
        return replace(config, rope_scaling=scaling_of_factors(tensors[ROPE_FREQS], config))
    if stored != [ROPE_LONG, ROPE_SHORT]:
        raise InputError(f"{where}: {stored[0]} alone; expected {ROPE_LONG} and {ROPE_SHORT}")
    prefix = f"{GGUF_ARCHITECTURES[config.architecture]}.rope.scaling"
    length, factor = f"{prefix}.original_context_length", f"{prefix}.attn_factor"
    scaling = {
        "rope_type": "longrope",
        "short_factor": [shortest(float(x)) for x in _divisors(tensors[ROPE_SHORT], config)],
        "long_factor": [shortest(float(x)) for x in _divisors(tensors[ROPE_LONG], config)],
        "original_max_position_embeddings": count(metadata, length, where, default=config.context_length),
        "attention_factor": shortest(positive(metadata, factor, where, default=1.0)),
    }
    return replace(config, rope_scaling=scaling)


def scaling_of_factors(tensor: TensorRef, config: ModelConfig) -> Mapping[str, Any] | None:
    """Hugging Face's ``rope_scaling`` for stored divisors; None where all are one.

    Args:
        tensor: the stored divisors, ``rope_freqs.weight``.
        config: gives theta and the head size.

    Raises:
        InputError: not ``head_dim / 2`` positive float32 numbers.
    """
    factors = _divisors(tensor, config)
    if (factors == 1).all():
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL_LENGTH,
    }
    expected = llama3_factors(
        config.rope_theta,
        config.head_dim,
        factor=float(factors.max()),
        low=_LOW,
        high=_HIGH,
        original_length=_ORIGINAL_LENGTH,
    )
    return scaling if np.allclose(factors, expected, rtol=_TOLERANCE, atol=0) else STORED_FACTORS


def _divisors(tensor: TensorRef, config: ModelConfig) -> NDArray[np.float64]:
    """Stored divisors as ``float64[rotary_dim / 2]``."""
    half = (config.rotary_dim or config.head_dim) // 2
    if tensor.dtype != "F32" or tensor.n_elements != half:
        shape = "x".join(map(str, tensor.shape))
        raise InputError(
            f"{tensor.file}: {tensor.stored_name} is {tensor.dtype} {shape}; expected F32 {half}"
        )
    factors = tensor.raw().reshape(-1).view("<f4").astype(np.float64)
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise InputError(f"{tensor.file}: {tensor.stored_name} holds values that are not positive numbers")
    return factors
