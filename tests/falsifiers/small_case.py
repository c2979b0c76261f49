"""A case in memory: small random models and prompts, as a measurement reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.helpers.tiny_models import save_tiny_model

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact

PROMPTS: dict[str, Any] = {
    "trace": [
        {"id": "two", "kind": "text", "ids": [3, 1, 4, 1, 5, 9, 2, 6]},
        {"id": "chat", "kind": "chat", "ids": [1, 7, 1, 8, 2, 8, 1, 8, 2, 8]},
    ],
    "texts": [{"id": "text", "kind": "text", "ids": list(range(10, 90))}],
}


@dataclass
class SmallCase:
    """Evidence in memory.

    Attributes:
        models: role to artifact.
        documents: name to JSON document.
        texts: name to text file.
    """

    models: Mapping[str, Artifact]
    documents: dict[str, Any] = field(default_factory=lambda: {"prompts.json": PROMPTS})
    texts: dict[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.documents or name in self.texts or self._role(name) in self.models

    def document(self, name: str) -> dict[str, Any]:
        document: dict[str, Any] = self.documents[name]
        return document

    def text(self, name: str) -> str:
        return self.texts[name]

    def model(self, name: str) -> Artifact:
        return self.models[self._role(name)]

    def table(self, name: str, schema: str) -> Any:
        raise AssertionError(name)

    @staticmethod
    def _role(name: str) -> str:
        return name.removeprefix("models/").removesuffix(".json")


def small_models(folder: Path, **options: Any) -> dict[str, Artifact]:
    """A teacher in float32, the same as source, and the same in bfloat16 as candidate."""
    save_tiny_model(folder / "teacher", "llama", seed=5, **options)
    save_tiny_model(folder / "candidate", "llama", seed=5, dtype=torch.bfloat16, **options)
    teacher = open_artifact(folder / "teacher")
    return {"teacher": teacher, "source": teacher, "candidate": open_artifact(folder / "candidate")}
