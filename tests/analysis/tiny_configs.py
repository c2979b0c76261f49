"""Configurations of small models."""

from __future__ import annotations

from typing import Any

from driftscope.artifacts.model import ModelConfig


def llama(**changes: Any) -> ModelConfig:
    """A llama of two layers."""
    values: dict[str, Any] = {
        "architecture": "llama",
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 80,
        "context_length": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return ModelConfig(**(values | changes))
