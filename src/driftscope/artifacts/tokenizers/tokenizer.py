"""Text to token ids and back, from what an artifact carries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tokenizers.folder_tokenizer import (
    begin_and_end,
    read_chat_template,
    read_folder,
    special_tokens_of_config,
)
from driftscope.artifacts.tokenizers.pretokenizers import pre_tokenizer
from driftscope.artifacts.tokenizers.spm_encoder import SpmEncoder
from driftscope.artifacts.tokenizers.spm_json import bpe_model, decoder, escaping_normalizer, merges_of_scores
from driftscope.artifacts.tokenizers.token_types import SPECIAL_TYPES, USER_DEFINED
from driftscope.artifacts.tokenizers.vocabulary import SPM, Vocabulary, vocabulary_from_gguf
from driftscope.errors import InputError

_T = TypeVar("_T")


class Tokenizer:
    """A tokenizer with the special tokens and the chat template of its model.

    Attributes:
        chat_template: Jinja source, or None.
        special: Hugging Face's name of a special token (``bos_token`` ...) to its text.
    """

    def __init__(
        self,
        build: Callable[[], tokenizers.Tokenizer],
        chat_template: str | None,
        special: Mapping[str, str],
        *,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Keep what a tokenizer is made of.

        Args:
            build: makes the ``tokenizers`` object, when it is needed.
            chat_template: Jinja source, or None.
            special: Hugging Face's name of a special token to its text.
            vocabulary: of SentencePiece's kind, whose ids are llama.cpp's; others are encoded by what
                `build` makes.
        """
        self._build = build
        self._vocabulary = vocabulary
        self.chat_template = chat_template
        self.special = dict(special)

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        return self._build()

    @cached_property
    def _encoder(self) -> SpmEncoder | None:
        vocabulary = self._vocabulary
        if vocabulary is None:
            return None
        return SpmEncoder(
            vocabulary.tokens,
            vocabulary.scores,
            vocabulary.types,
            unknown=vocabulary.special.get("unk_token"),
            add_space_prefix=vocabulary.add_space_prefix,
            strip_right=vocabulary.strip_right,
        )

    @property
    def n_tokens(self) -> int:
        """Number of tokens, added ones included; the embedding may have more rows."""
        if self._vocabulary is not None:
            return len(self._vocabulary.tokens)
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
        if self._encoder is not None and self._vocabulary is not None:
            ids = self._encoder.encode(text, parse_special=parse_special)
            begin, end = _begin_and_end(self._vocabulary) if add_special else (None, None)
            return [*([] if begin is None else [begin]), *ids, *([] if end is None else [end])]
        backend = self._backend
        backend.encode_special_tokens = not parse_special
        return _guarded(
            lambda: list(backend.encode(text, add_special_tokens=add_special).ids), "text", "encoded"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, control tokens included."""
        listed = list(ids)
        backend = self._backend
        return _guarded(
            lambda: str(backend.decode(listed, skip_special_tokens=False)), "token ids", "decoded"
        )

    def to_json(self) -> str:
        """The tokenizer as a Hugging Face ``tokenizer.json``; the same vocabulary gives the same bytes."""
        self._backend.encode_special_tokens = False
        return str(self._backend.to_str(pretty=False))


def load_tokenizer(artifact: Artifact) -> Tokenizer:
    """The tokenizer that an artifact carries.

    Args:
        artifact: a GGUF or .apr file with a vocabulary, whose ids are llama.cpp's, or a safetensors model
            with ``tokenizer.json`` or ``tokenizer.model`` beside it, whose ids are transformers'.

    Raises:
        InputError: missing, inconsistent, or of a kind that is not supported.
    """
    if artifact.container != "safetensors":
        where = str(artifact.path)
        return tokenizer_from_vocabulary(
            vocabulary_from_gguf(artifact.metadata, artifact.config.vocab_size, where), where
        )
    return tokenizer_from_folder(
        model_folder(artifact), artifact.config.vocab_size, artifact.config.architecture
    )


def model_folder(artifact: Artifact) -> Path:
    """The folder that holds a safetensors artifact's ``config.json`` and ``tokenizer.json``."""
    return artifact.path if artifact.path.is_dir() else artifact.path.parent


def tokenizer_from_folder(folder: Path, vocab_size: int, architecture: str | None = None) -> Tokenizer:
    """Load ``tokenizer.json`` or ``tokenizer.model``, with what ``tokenizer_config.json`` adds to it.

    Args:
        folder: the model's.
        vocab_size: rows of the embedding.
        architecture: ``model_type`` of the model, where known.

    Raises:
        InputError: missing, malformed, or with ids that the model has no embedding for.
    """
    document, config, path = read_folder(folder, vocab_size, architecture)
    backend = _load(json.dumps(document), str(path))
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise InputError(
            f"{path}: the largest token id is {largest}, but the model has {vocab_size} embeddings"
        )
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(lambda: backend, read_chat_template(folder, config), special_tokens_of_config(config))


def tokenizer_from_vocabulary(vocabulary: Vocabulary, where: str) -> Tokenizer:
    """Build the tokenizer of a GGUF vocabulary.

    Args:
        vocabulary: checked tokens and merges.
        where: the file, for messages.
    """
    special = {name: vocabulary.tokens[index] for name, index in vocabulary.special.items()}
    _begin_and_end(vocabulary, where)
    if vocabulary.kind == SPM:
        return Tokenizer(
            lambda: _load(json.dumps(_spm_document(vocabulary, where)), where),
            vocabulary.chat_template,
            special,
            vocabulary=vocabulary,
        )
    backend = _load(json.dumps(_document(vocabulary, where), ensure_ascii=False), where)
    return Tokenizer(lambda: backend, vocabulary.chat_template, special)


def _spm_document(vocabulary: Vocabulary, where: str) -> dict[str, Any]:
    """The ``tokenizer.json`` of a SentencePiece vocabulary, as a dictionary."""
    ids = {text: index for index, text in enumerate(vocabulary.tokens)}
    merges = merges_of_scores(vocabulary.tokens, vocabulary.scores)
    complete = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    unknown = vocabulary.special_text("unk_token")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": escaping_normalizer(add_space_prefix=vocabulary.add_space_prefix),
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary, where),
        "decoder": decoder(strip_prefix=vocabulary.add_space_prefix),
        "model": bpe_model(ids, merges, unknown, byte_fallback=complete),
    }


def _document(vocabulary: Vocabulary, where: str) -> dict[str, Any]:
    """The ``tokenizer.json`` of a vocabulary, as a dictionary."""
    rule = pre_tokenizer(vocabulary.pre, where)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
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


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The tokens that are found in a text before anything else is done with it."""
    return [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": index in vocabulary.strip_right,
            "normalized": False,
            # llama.cpp leaves user-defined tokens whole even where it does not parse control tokens.
            "special": kind != USER_DEFINED,
        }
        for index, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in SPECIAL_TYPES
    ]


def _begin_and_end(vocabulary: Vocabulary, where: str = "vocabulary") -> tuple[int | None, int | None]:
    """The ids that begin and end a sequence, where the model wants them."""
    found: list[int | None] = []
    for name, wanted in (("bos_token", vocabulary.add_bos), ("eos_token", vocabulary.add_eos)):
        if wanted and name not in vocabulary.special:
            raise InputError(f"{where}: the vocabulary wants a {name} with every text but names none")
        found.append(vocabulary.special[name] if wanted else None)
    return found[0], found[1]


def _post_processor(vocabulary: Vocabulary, where: str) -> dict[str, Any] | None:
    """Adds the beginning and the end of sequence where the model wants them."""
    begin, end = _begin_and_end(vocabulary, where)
    return begin_and_end(
        (None if begin is None else vocabulary.tokens[begin], begin),
        (None if end is None else vocabulary.tokens[end], end),
    )


def _load(text: str, where: str) -> tokenizers.Tokenizer:
    """Parse a ``tokenizer.json``."""
    return _guarded(lambda: tokenizers.Tokenizer.from_str(text), where, "used as a tokenizer")


def _guarded(call: Callable[[], _T], what: str, done: str) -> _T:
    """Call the library, which raises plain exceptions and, where it panics, BaseException."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{what}: cannot be {done} ({reason})") from error
