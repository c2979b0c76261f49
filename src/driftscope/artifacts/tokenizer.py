"""Text to token ids and back, from what an artifact carries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from driftscope.artifacts.files import read_json_object
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.pretokenizers import pre_tokenizer
from driftscope.artifacts.vocabulary import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    read_chat_template,
    read_tokenizer_config,
    special_tokens_of_config,
    vocabulary_from_gguf,
)
from driftscope.errors import InputError


class Tokenizer:
    """A tokenizer with the special tokens and the chat template of its model.

    Attributes:
        chat_template: Jinja source, or None.
        special: Hugging Face's name of a special token (``bos_token`` ...) to its text.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, chat_template: str | None, special: Mapping[str, str]
    ) -> None:
        self._backend = backend
        self.chat_template = chat_template
        self.special = dict(special)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, added ones included; the embedding may have more rows."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text that UTF-8 can hold.
            add_special: add the tokens that the model wants in front of and behind a text.
            parse_special: the text of a control token (``<|im_end|>``) becomes that token; otherwise it
                is text like any other. User-defined tokens are found either way, as in llama.cpp.

        Raises:
            InputError: the text holds a lone surrogate.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: character {error.start} is a lone surrogate, which UTF-8 cannot hold"
            ) from error
        self._backend.encode_special_tokens = not parse_special
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, control tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def to_json(self) -> str:
        """The tokenizer as a Hugging Face ``tokenizer.json``; the same vocabulary gives the same bytes."""
        self._backend.encode_special_tokens = False
        return str(self._backend.to_str(pretty=False))


def load_tokenizer(artifact: Artifact) -> Tokenizer:
    """The tokenizer that an artifact carries.

    Args:
        artifact: a GGUF file with a vocabulary, or a safetensors model with ``tokenizer.json`` beside it.

    Raises:
        InputError: missing, inconsistent, or of a kind that is not supported.
    """
    if artifact.container == "gguf":
        where = str(artifact.path)
        return tokenizer_from_vocabulary(
            vocabulary_from_gguf(artifact.metadata, artifact.config.vocab_size, where), where
        )
    return tokenizer_from_folder(model_folder(artifact), artifact.config.vocab_size)


def model_folder(artifact: Artifact) -> Path:
    """The folder that holds a safetensors artifact's ``config.json`` and ``tokenizer.json``."""
    return artifact.path if artifact.path.is_dir() else artifact.path.parent


def tokenizer_from_folder(folder: Path, vocab_size: int) -> Tokenizer:
    """Load ``tokenizer.json``, with the special tokens and the template of ``tokenizer_config.json``.

    Raises:
        InputError: missing, malformed, or with ids that the model has no embedding for.
    """
    path = folder / "tokenizer.json"
    document = read_json_object(path)
    config = read_tokenizer_config(folder)
    backend = _load(json.dumps(document), str(path))
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise InputError(
            f"{path}: the largest token id is {largest}, but the model has {vocab_size} embeddings"
        )
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, read_chat_template(folder, config), special_tokens_of_config(config))


def tokenizer_from_vocabulary(vocabulary: Vocabulary, where: str) -> Tokenizer:
    """Build the tokenizer of a GGUF vocabulary.

    Args:
        vocabulary: checked tokens and merges.
        where: the file, for messages.
    """
    special = {name: vocabulary.tokens[index] for name, index in vocabulary.special.items()}
    backend = _load(json.dumps(_document(vocabulary, where), ensure_ascii=False), where)
    return Tokenizer(backend, vocabulary.chat_template, special)


def _document(vocabulary: Vocabulary, where: str) -> dict[str, Any]:
    """The ``tokenizer.json`` of a vocabulary, as a dictionary."""
    rule = pre_tokenizer(vocabulary.pre, where)
    added = [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            # llama.cpp leaves user-defined tokens whole even where it does not parse control tokens.
            "special": kind != USER_DEFINED,
        }
        for index, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": rule.normalizer,
        "pre_tokenizer": rule.config,
        "post_processor": _post_processor(vocabulary, where),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            # A byte without a token is dropped, as in the original tokenizers and in llama.cpp; an unknown
            # token here would change ids. The original drops it before pairs are merged, so that its
            # neighbours may merge; llama.cpp does so afterwards. SmolLM2 lacks bytes that only code points
            # from U+40000 to U+7FFFF have, of which none is assigned.
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.ignore_merges,
            "vocab": {text: index for index, text in enumerate(vocabulary.tokens)},
            "merges": [list(pair) for pair in vocabulary.merges],
        },
    }


def _post_processor(vocabulary: Vocabulary, where: str) -> dict[str, Any] | None:
    """Adds the beginning and the end of sequence where the model wants them."""
    template: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    tokens: dict[str, Any] = {}
    for name, wanted in (("bos_token", vocabulary.add_bos), ("eos_token", vocabulary.add_eos)):
        if not wanted:
            continue
        text = vocabulary.special_text(name)
        if text is None:
            raise InputError(f"{where}: the vocabulary wants a {name} with every text but names none")
        tokens[text] = {"id": text, "ids": [vocabulary.special[name]], "tokens": [text]}
        piece = {"SpecialToken": {"id": text, "type_id": 0}}
        template = [piece, *template] if name == "bos_token" else [*template, piece]
    if not tokens:
        return None
    pair = [*template, *({key: {**value, "type_id": 1} for key, value in step.items()} for step in template)]
    pair = [
        {"Sequence": {"id": "B", "type_id": 1}} if i >= len(template) and "Sequence" in step else step
        for i, step in enumerate(pair)
    ]
    return {"type": "TemplateProcessing", "single": template, "pair": pair, "special_tokens": tokens}


def _load(text: str, where: str) -> tokenizers.Tokenizer:
    """Parse a ``tokenizer.json``; the library raises plain exceptions and, where it panics, BaseException."""
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{where}: not a usable tokenizer ({error})") from error
