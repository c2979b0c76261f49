"""All that a model on disk says of itself, as one document."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from driftscope.analysis.metadata.facts import (
    TokenizerFacts,
    formats_by_size,
    template_facts,
    tokenizer_facts,
)
from driftscope.analysis.metadata.oddities import oddities
from driftscope.artifacts.model import Artifact

SCHEMA_VERSION = 1


def overview(artifact: Artifact, *, facts: TokenizerFacts | None = None) -> dict[str, Any]:
    """Describe a model: size, formats, hyperparameters, tokenizer, chat template, oddities.

    Args:
        artifact: the model.
        facts: what it says of its tokenizer, where that has been read already.

    Returns:
        The document of ``report/inspect.schema.json``.
    """
    facts = facts or tokenizer_facts(artifact)
    template = facts.chat_template
    tensors = artifact.tensors.values()
    return {
        "schema_version": SCHEMA_VERSION,
        "path": str(artifact.path),
        "container": artifact.container,
        "architecture": artifact.config.architecture,
        "parameters": sum(tensor.n_elements for tensor in tensors),
        "tensors": len(artifact.tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": {item.pop("format"): item for item in formats_by_size(artifact)},
        "config": _plain(asdict(artifact.config)),
        "tokenizer": {
            "kind": facts.kind,
            "pre": facts.pre,
            "tokens": len(facts.tokens),
            "special": {
                name: {"id": token, "text": facts.text(token)} for name, token in facts.special.items()
            },
            "add_bos": facts.add_bos,
            "add_eos": facts.add_eos,
            "problem": facts.problem,
        },
        "chat_template": None if template is None else {"text": template, **template_facts(template, facts)},
        "oddities": [asdict(oddity) for oddity in oddities(artifact, facts)],
        "unmapped": list(artifact.unmapped),
    }


def _plain(value: Any) -> Any:
    """Hyperparameters as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
