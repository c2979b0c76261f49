"""Prompts as token ids: from text, chat messages, a text file, or ids as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from driftscope.artifacts.chat import render_chat
from driftscope.artifacts.files import regular_file_size
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tokenizers.tokenizer import Tokenizer, load_tokenizer
from driftscope.errors import InputError

_MAX_FILE_BYTES = 16 * 2**20
KINDS = ("text", "chat", "ids", "file")


@dataclass(frozen=True)
class Prompt:
    """One encoded prompt.

    Attributes:
        id: its name in the configuration.
        kind: ``text``, ``chat``, ``ids`` or ``file``.
        text: what was encoded, the rendered template for a chat; None for ids.
        token_ids: at least one id.
    """

    id: str
    kind: str
    text: str | None
    token_ids: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Digest of the ids as little-endian int32."""
        return hashlib.sha256(np.array(self.token_ids, dtype="<i4").tobytes()).hexdigest()


def encode_prompts(
    specs: Sequence[Mapping[str, Any]], artifact: Artifact, *, folder: Path = Path()
) -> list[Prompt]:
    """Encode prompts with the tokenizer and the chat template of a model.

    Text begins with the model's beginning-of-sequence token where its tokenizer adds one; a chat holds
    what its template renders and nothing else.

    Args:
        specs: each has an ``id``, one of ``text``, ``chat``, ``ids`` and ``file``, and may have
            ``max_tokens``, which keeps the first ones.
        artifact: the model.
        folder: where relative files start.

    Raises:
        InputError: a prompt is empty or longer than the context, an id is outside of the vocabulary, the
            model has no chat template, or a file cannot be read.
    """
    tokenizer: Tokenizer | None = None
    prompts = []
    for spec in specs:
        kind = next((kind for kind in KINDS if spec.get(kind) is not None), None)
        if kind is None:
            raise InputError(f"prompt `{spec['id']}` has none of {', '.join(KINDS)}")
        text = None
        if kind == "ids":
            ids = [int(token) for token in spec["ids"]]
        else:
            tokenizer = tokenizer or load_tokenizer(artifact)
            text = _text(spec, kind, tokenizer, artifact, folder)
            ids = tokenizer.encode(text, add_special=kind != "chat") if text else []
        limit = spec.get("max_tokens")
        prompt = Prompt(str(spec["id"]), kind, text, tuple(ids[:limit]))
        _check(prompt, artifact)
        prompts.append(prompt)
    return prompts


def _text(spec: Mapping[str, Any], kind: str, tokenizer: Tokenizer, artifact: Artifact, folder: Path) -> str:
    if kind == "text":
        return str(spec["text"])
    if kind == "file":
        return _read(folder / str(spec["file"]))
    if tokenizer.chat_template is None:
        raise InputError(f"prompt `{spec['id']}` is a chat, but {artifact.path} has no chat template")
    try:
        return render_chat(
            tokenizer.chat_template,
            spec["chat"],
            bos_token=tokenizer.special.get("bos_token"),
            eos_token=tokenizer.special.get("eos_token"),
        )
    except InputError as error:
        raise InputError(f"prompt `{spec['id']}`: {error}") from error


def _read(path: Path) -> str:
    size = regular_file_size(path)
    if size > _MAX_FILE_BYTES:
        raise InputError(f"{path}: {size} bytes; expected a prompt of at most {_MAX_FILE_BYTES}")
    try:
        # Decoded as it is: reading in text mode would change line ends, and with them the tokens.
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not readable UTF-8 text: {error}") from error


def _check(prompt: Prompt, artifact: Artifact) -> None:
    config = artifact.config
    if not prompt.token_ids:
        raise InputError(f"prompt `{prompt.id}` is empty; expected at least one token")
    if len(prompt.token_ids) > config.context_length:
        raise InputError(
            f"prompt `{prompt.id}` has {len(prompt.token_ids)} tokens, but the context of {artifact.path} is "
            f"{config.context_length} tokens"
        )
    for token in prompt.token_ids:
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"prompt `{prompt.id}` has the token id {token}, but the vocabulary of {artifact.path} has "
                f"{config.vocab_size} tokens"
            )
