"""What of the published investigation's material a case has: the weights that its figures are of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from driftscope.evidence.store import read_json
from driftscope.falsifiers.reader import ROLES, FolderReader

if TYPE_CHECKING:
    from driftscope.artifacts.model import ModelConfig

MODEL_7B = "model-7b"

_NAME = "qwen25coder7binstruct"
_SHAPE: Mapping[str, object] = {
    "architecture": "qwen2",
    "hidden_size": 3584,
    "num_layers": 28,
    "num_heads": 28,
    "num_kv_heads": 4,
    "intermediate_size": 18944,
}


def at_hand(results: Path) -> set[str]:
    """Say which `needs` of published figures a results folder meets.

    ``model-7b``: teacher and candidate have the shape of Qwen2.5-Coder-7B-Instruct, and one of the case's
    models carries its name, in its source or in its metadata; other models have the same shape.

    Raises:
        InputError: a manifest or a model is broken.
    """
    reader = FolderReader(results)
    manifests = [f"models/{role}.json" for role in ROLES]
    if not all(reader.has(name) for name in manifests):
        return set()
    names = [str(read_json(file).get("source", "")) for file in manifests_of(results)]
    for name in manifests:
        artifact = reader.model(name)
        if not _has_shape(artifact.config):
            return set()
        names += [str(artifact.metadata.get(key, "")) for key in ("general.name", "general.basename")]
    return {MODEL_7B} if any(_NAME in _plain(name) for name in names) else set()


def manifests_of(results: Path) -> list[Path]:
    """Return the manifests of all models of a case, in the order of their names."""
    files = sorted((results / "models").glob("*.json"))
    return [file for file in files if not file.name.endswith(".provenance.json")]


def _has_shape(config: ModelConfig) -> bool:
    return all(getattr(config, name) == value for name, value in _SHAPE.items())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
