"""The tokens at which a model's answer ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driftscope.artifacts.files import read_json_object
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tokenizer import Tokenizer, model_folder
from driftscope.errors import InputError

_NAMES = ("eos_token", "eot_token")
_KEY = "eos_token_id"


def stop_tokens(artifact: Artifact, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's end tokens, and those that a model folder lists.

    Args:
        artifact: a safetensors model's ``config.json`` and ``generation_config.json`` may list more.
        tokenizer: its tokenizer.

    Raises:
        InputError: a listed id is not a token of the model.
    """
    found = {
        token
        for name in _NAMES
        if name in tokenizer.special
        for token in tokenizer.encode(tokenizer.special[name])
    }
    if artifact.container == "safetensors":
        listed = [*_listed(artifact.metadata, str(artifact.path))]
        file = model_folder(artifact) / "generation_config.json"
        if file.exists():
            listed += _listed(read_json_object(file), str(file))
        for token in listed:
            if not 0 <= token < artifact.config.vocab_size:
                raise InputError(
                    f"{artifact.path}: {_KEY} {token} is outside of the vocabulary of "
                    f"{artifact.config.vocab_size} tokens"
                )
        found |= set(listed)
    return frozenset(found)


def _listed(document: Mapping[str, Any], where: str) -> list[int]:
    value = document.get(_KEY)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise InputError(f"{where}: {_KEY} is {value!r}; expected a token id or a list of them")
    return list(ids)
