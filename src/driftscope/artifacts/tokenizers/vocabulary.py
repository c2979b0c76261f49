"""The vocabulary of a tokenizer, and how GGUF files carry it.

Two kinds: byte-level BPE with merges (``tokenizer.ggml.model`` is ``gpt2``), and SentencePiece's BPE with
scores (``llama``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from driftscope.artifacts.tokenizers.pretokenizers import pre_tokenizer
from driftscope.artifacts.tokenizers.token_types import BYTE, NORMAL, SPECIAL_TYPES, effective_types
from driftscope.errors import InputError

# Hugging Face's name of a special token, and GGUF's.
SPECIAL_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}

# Ids that llama.cpp assumes where a SentencePiece vocabulary names none.
_SPM_DEFAULTS = {"unk_token": 0, "bos_token": 1, "eos_token": 2}

# Merges are found by trying every cut of every token.
MAX_SPM_TOKEN_CHARACTERS = 1024

# The kinds of vocabulary: byte-level BPE, and SentencePiece's BPE.
BPE, SPM = "bpe", "spm"


_PHI3_KEEPS_SPACES = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens, merges or scores, and special tokens.

    Attributes:
        pre: GGUF name of the pre-tokenizer; ``default`` for SentencePiece, which has none.
        tokens: text of each id. Ordinary tokens are in GPT-2's printable byte alphabet (`BPE`), or have
            U+2581 for a space (`SPM`).
        types: GGUF token type of each id.
        merges: pairs in the order in which they are applied; none for `SPM`.
        special: Hugging Face's name (``bos_token`` ...) to id.
        add_bos: a beginning-of-sequence token belongs in front of every text.
        add_eos: an end-of-sequence token belongs behind every text.
        chat_template: Jinja source, or None.
        kind: `BPE` or `SPM`.
        scores: of each id; neighbours that give the token of the highest score merge first. None for `BPE`.
        add_space_prefix: a space belongs in front of a text (`SPM`).
        strip_right: special tokens that swallow the spaces behind them (`SPM`).
    """

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[tuple[str, str], ...] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    kind: str = BPE
    scores: tuple[float, ...] = ()
    add_space_prefix: bool = False
    strip_right: frozenset[int] = frozenset()

    def check(self, vocab_size: int, where: str) -> Vocabulary:
        """Return self if it is consistent with itself and with the model.

        Args:
            vocab_size: rows of the embedding.
            where: the file, for the message.

        Raises:
            InputError: tokens, types, scores, merges or special ids do not fit together.
        """
        if len(self.tokens) > vocab_size:
            raise InputError(f"{where}: {len(self.tokens)} tokens, but the model has {vocab_size} embeddings")
        if len(self.types) != len(self.tokens):
            raise InputError(f"{where}: {len(self.types)} token types for {len(self.tokens)} tokens")
        ids = {text: index for index, text in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            second = next(i for i, text in enumerate(self.tokens) if ids[text] != i)
            raise InputError(
                f"{where}: token {self.tokens[second][:40]!r} is there twice, "
                f"as {second} and as {ids[self.tokens[second]]}"
            )
        if self.kind == SPM:
            self._check_spm(where)
        for rank, (left, right) in enumerate(self.merges):
            for part in (left, right, left + right):
                if part not in ids:
                    raise InputError(
                        f"{where}: merge {rank} ({left!r} {right!r}) needs the unknown token {part!r}"
                    )
        for name, index in self.special.items():
            if not 0 <= index < len(self.tokens):
                raise InputError(
                    f"{where}: {name} is {index}, outside of the vocabulary of {len(self.tokens)} tokens"
                )
        return self

    def _check_spm(self, where: str) -> None:
        if len(self.scores) != len(self.tokens):
            raise InputError(f"{where}: {len(self.scores)} token scores for {len(self.tokens)} tokens")
        for index, (text, score, kind) in enumerate(zip(self.tokens, self.scores, self.types, strict=True)):
            if not math.isfinite(score):
                raise InputError(f"{where}: the score of token {index} ({text[:40]!r}) is {score}")
            if len(text) > MAX_SPM_TOKEN_CHARACTERS:
                raise InputError(
                    f"{where}: token {index} has {len(text)} characters; "
                    f"expected at most {MAX_SPM_TOKEN_CHARACTERS}"
                )
            if kind == BYTE and not is_byte_text(text):
                raise InputError(f"{where}: byte token {index} is {text[:40]!r}; expected <0x00> to <0xFF>")

    def special_text(self, name: str) -> str | None:
        """Text of a special token (``bos_token`` ...), or None."""
        index = self.special.get(name)
        return None if index is None else self.tokens[index]


def vocabulary_from_gguf(metadata: Mapping[str, Any], vocab_size: int, where: str) -> Vocabulary:
    """Read the vocabulary in a GGUF file's metadata.

    Args:
        metadata: key-values of the file.
        vocab_size: rows of the embedding.
        where: the file, for messages.

    Raises:
        InputError: missing, of a kind that is not supported, or inconsistent.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise InputError(f"{where}: the file has no tokenizer (tokenizer.ggml.model)")
    if model not in ("gpt2", "llama"):
        raise InputError(
            f"{where}: tokenizer model {model!r} is not supported; "
            "expected 'gpt2' (byte-level BPE) or 'llama' (SentencePiece)"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens", where)
    if len(tokens) != vocab_size:
        raise InputError(f"{where}: {len(tokens)} tokens, but the model has {vocab_size} embeddings")
    # llama.cpp's name for a token without text.
    tokens = tuple(text or f"[EMPTY_{index}]" for index, text in enumerate(tokens))
    types = _types(metadata, len(tokens), where)
    if len(types) == len(tokens):
        types = effective_types(tokens, types)
    special = {}
    for name, key in SPECIAL_KEYS.items():
        if key in metadata:
            special[name] = _integer(metadata[key], key, where)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{where}: tokenizer.chat_template is not a string")
    read = _bpe if model == "gpt2" else _spm
    return read(metadata, tokens, types, special, template, where).check(vocab_size, where)


def _bpe(
    metadata: Mapping[str, Any],
    tokens: tuple[str, ...],
    types: tuple[int, ...],
    special: dict[str, int],
    template: str | None,
    where: str,
) -> Vocabulary:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str):
        raise InputError(f"{where}: tokenizer.ggml.pre is not a string")
    rule = pre_tokenizer(pre, where)
    merges = []
    for rank, line in enumerate(_strings(metadata, "tokenizer.ggml.merges", where)):
        left, space, right = line[1:].partition(" ")
        if not space or not right:
            raise InputError(
                f"{where}: merge {rank} is {line!r}; expected two tokens and a space between them"
            )
        merges.append((line[0] + left, right))
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=tuple(merges),
        special=special,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", rule.add_bos)),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=template,
    )


def _spm(
    metadata: Mapping[str, Any],
    tokens: tuple[str, ...],
    types: tuple[int, ...],
    special: dict[str, int],
    template: str | None,
    where: str,
) -> Vocabulary:
    defaults = {name: index for name, index in _SPM_DEFAULTS.items() if index < len(tokens)}
    return Vocabulary(
        pre="default",
        tokens=tokens,
        types=types,
        special=defaults | special,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", True)),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=template,
        kind=SPM,
        scores=_scores(metadata, len(tokens), where),
        add_space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        strip_right=_strip_right(metadata, tokens, types),
    )


def _strip_right(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> frozenset[int]:
    """The tokens that swallow the spaces behind them.

    GGUF cannot say so; llama.cpp assumes it of models with phi-3's name (src/llama-vocab.cpp, "per token
    attributes").
    """
    name = metadata.get("general.name")
    if not isinstance(name, str) or not any(part in name.lower() for part in ("phi-3", "phi3")):
        return frozenset()
    return strip_right_of_phi3(tokens, types)


def strip_right_of_phi3(tokens: Sequence[str], types: Sequence[int]) -> frozenset[int]:
    """The tokens of a model with phi-3's name that swallow spaces behind them: the special ones but three.

    llama.cpp does not load such a model without the three; there are none then.
    """
    if not set(_PHI3_KEEPS_SPACES) <= set(tokens):
        return frozenset()
    return frozenset(
        index
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in SPECIAL_TYPES and text not in _PHI3_KEEPS_SPACES
    )


def is_byte_text(text: str) -> bool:
    """Whether a token is SentencePiece's name of a byte, ``<0x00>`` to ``<0xFF>``."""
    digits = text[3:5]
    return len(text) == 6 and text == f"<0x{digits}>" and set(digits) <= set("0123456789ABCDEF")


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = metadata.get(key)
    if values is None:
        raise InputError(f"{where}: {key} is missing")
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(f"{where}: {key} is not a list of strings")
    result = tuple(values)
    if not all(isinstance(value, str) for value in result):
        raise InputError(f"{where}: {key} is not a list of strings")
    return result


def _types(metadata: Mapping[str, Any], count: int, where: str) -> tuple[int, ...]:
    values = metadata.get("tokenizer.ggml.token_type")
    if values is None:
        return (NORMAL,) * count
    try:
        types = tuple(int(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: tokenizer.ggml.token_type is not a list of integers") from error
    return types


def _integer(value: Any, key: str, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: {key} is {repr(value)[:120]}; expected an integer") from error


def _scores(metadata: Mapping[str, Any], count: int, where: str) -> tuple[float, ...]:
    values = metadata.get("tokenizer.ggml.scores")
    if values is None:
        return (0.0,) * count
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: tokenizer.ggml.scores is not a list of numbers") from error
