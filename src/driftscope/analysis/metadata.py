"""What differs in the metadata of two models, and what of it changes an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from driftscope.artifacts.model import Artifact, ModelConfig

_CHANGES = {"context_length": "limit", "vocab_size": "tokens", "tie_word_embeddings": "storage"}
"""What a hyperparameter changes where that is not the forward pass."""

_MATTERS = ("forward-pass", "tokens", "prompt")


def metadata_differences(a: Artifact, b: Artifact) -> list[dict[str, Any]]:
    """Compare hyperparameters.

    Returns:
        ``{key, a, b, changes, matters}`` for each that differs. ``changes`` says what it changes:
        ``forward-pass``, ``tokens`` (text to ids and back), ``prompt`` (the chat template), ``limit`` or
        ``storage``; ``matters`` whether that changes an answer (the first three).
    """
    return _hyperparameters(a.config, b.config)


def _hyperparameters(a: ModelConfig, b: ModelConfig) -> list[dict[str, Any]]:
    found = []
    for field in fields(ModelConfig):
        left, right = _plain(getattr(a, field.name)), _plain(getattr(b, field.name))
        if _as_stored(left) != _as_stored(right):
            found.append(difference(field.name, left, right, _CHANGES.get(field.name, "forward-pass")))
    return found


def difference(key: str, a: Any, b: Any, changes: str) -> dict[str, Any]:
    """One difference, see `metadata_differences`."""
    return {"key": key, "a": a, "b": b, "changes": changes, "matters": changes in _MATTERS}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items())}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _as_stored(value: Any) -> Any:
    """Floats as f32: GGUF stores them so, where ``config.json`` has decimals."""
    if isinstance(value, dict):
        return {key: _as_stored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_stored(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value
