"""A case in memory: small random models and prompts, as a measurement reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.helpers.tiny_models import save_tiny_model
from tests.helpers.tiny_vocabulary import SIZE, tiny_vocabulary

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.tokenizer import tokenizer_from_vocabulary

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


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def speaking_models(
    folder: Path, *, chat_template: str | None = CHATML, **options: Any
) -> dict[str, Artifact]:
    """The same with a tokenizer beside the weights."""
    models = small_models(folder, vocab_size=SIZE, **options)
    tokenizer = tokenizer_from_vocabulary(tiny_vocabulary("gpt-2"), "tiny").to_json()
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    for role in ("teacher", "candidate"):
        (folder / role / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        (folder / role / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return models
