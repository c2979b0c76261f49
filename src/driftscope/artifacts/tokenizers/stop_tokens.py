"""The tokens at which a model's answer ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driftscope.artifacts.files import read_json_object
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tokenizers.token_types import TURN_ENDS
from driftscope.artifacts.tokenizers.tokenizer import Tokenizer, model_folder
from driftscope.errors import InputError

# What GGUF names of the tokens that end a text, a turn, and a message of a turn.
_GGUF_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_KEY = "eos_token_id"


def stop_tokens(artifact: Artifact, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end an answer.

    A model folder lists them: the tokenizer's end token, ``eos_token_id`` of ``config.json`` and of
    ``generation_config.json``, which is where transformers looks. A GGUF file names few of them, so that
    tokens known to end a turn (``<end_of_turn>``, ``<|end|>`` ...) count as well, as in llama.cpp.

    Args:
        artifact: the model.
        tokenizer: its tokenizer.

    Raises:
        InputError: a listed id is not a token of the model.
    """
    texts = [tokenizer.special.get("eos_token")]
    if artifact.container == "safetensors":
        listed = _listed(artifact.metadata, _KEY, str(artifact.path))
        file = model_folder(artifact) / "generation_config.json"
        if file.exists():
            listed += _listed(read_json_object(file), _KEY, str(file))
    else:
        texts += sorted(TURN_ENDS)
        listed = [id_ for key in _GGUF_KEYS for id_ in _listed(artifact.metadata, key, str(artifact.path))]
    for token in listed:
        if not 0 <= token < artifact.config.vocab_size:
            raise InputError(
                f"{artifact.path}: {_KEY} {token} is outside of the vocabulary of "
                f"{artifact.config.vocab_size} tokens"
            )
    return frozenset(listed).union(*(_token(text, tokenizer) for text in texts))


def _token(text: str | None, tokenizer: Tokenizer) -> list[int]:
    """The id of a token, if the text is one."""
    ids = [] if text is None else tokenizer.encode(text)
    return ids if len(ids) == 1 else []


def _listed(document: Mapping[str, Any], key: str, where: str) -> list[int]:
    value = document.get(key)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise InputError(f"{where}: {key} is {value!r}; expected a token id or a list of them")
    return list(ids)
