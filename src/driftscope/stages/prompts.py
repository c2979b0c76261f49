"""Prompts: text, chat messages or ids of the configuration become token ids, hashed into the evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from driftscope.config import Config
from driftscope.errors import InputError
from driftscope.evidence.digest import sha256_json
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.manifest import open_model
from driftscope.evidence.store import read_json, write_json

SETS = ("trace", "texts")


def encode(config: Config, manifest: Path, out: Path) -> None:
    """Encode both prompt sets of the configuration with the tokenizer of a model."""
    from driftscope.artifacts.prompts import encode_prompts

    artifact, digest = open_model(manifest)
    specs = {"trace": config.trace.prompts, "texts": config.decomposition.texts}
    document: dict[str, Any] = {}
    for name, prompts in specs.items():
        plain = [prompt.model_dump(exclude_none=True) for prompt in prompts]
        document[name] = [
            {
                "id": prompt.id,
                "kind": prompt.kind,
                "text": prompt.text,
                "tokens": len(prompt.token_ids),
                "sha256": prompt.sha256,
                "ids": list(prompt.token_ids),
            }
            for prompt in encode_prompts(plain, artifact, folder=config.folder)
        ]
    parameters = {name: [prompt["sha256"] for prompt in document[name]] for name in SETS}
    write_json(document, out, EvidenceHeader.of("prompts", {"tokenizer": digest}, parameters))


def prompt_set(path: Path, name: str) -> tuple[list[dict[str, Any]], str]:
    """Return the prompts of a set and the digest of all their token ids.

    Raises:
        InputError: the set is empty.
    """
    prompts: list[dict[str, Any]] = read_json(path)[name]
    if not prompts:
        raise InputError(f"{path}: there is no prompt under {name}")
    return prompts, sha256_json([[prompt["id"], prompt["sha256"]] for prompt in prompts])


def slices_of(prompts: list[dict[str, Any]]) -> list[tuple[str, slice]]:
    """Return the rows of each prompt's tokens in an array over all prompts, one after another."""
    ends = np.cumsum([prompt["tokens"] for prompt in prompts]).tolist()
    return [
        (prompt["id"], slice(end - prompt["tokens"], end)) for prompt, end in zip(prompts, ends, strict=True)
    ]
