"""Small SentencePiece models, trained by the sentencepiece package, and the vocabularies made of them."""

from __future__ import annotations

import io
from collections import Counter
from functools import cache

import sentencepiece

from driftscope.artifacts.tokenizers.token_types import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from driftscope.artifacts.tokenizers.vocabulary import SPM, Vocabulary
from tests.helpers.texts import varied_texts

SPACE = "\u2581"
CONTROL_TOKENS = ("<start_of_turn>", "<end_of_turn>")
USER_TOKENS = ("<tool>", "\n\n", "\n\n\n", SPACE * 2, SPACE * 3, SPACE * 4, SPACE * 5)
SIZE = 800


@cache
def trained(
    model_type: str = "bpe",
    *,
    byte_fallback: bool = True,
    dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
    normalization: str = "identity",
    symbols: bool = False,
) -> bytes:
    """A ``tokenizer.model`` of `SIZE` pieces.

    Args:
        model_type: ``bpe``, ``unigram``, ``char`` or ``word``.
        byte_fallback: with a piece for every byte.
        dummy_prefix: a space is put in front of a text.
        remove_extra_whitespaces: runs of spaces become one.
        normalization: ``identity`` or ``nmt_nfkc``.
        symbols: with `CONTROL_TOKENS` and `USER_TOKENS`.
    """
    file = io.BytesIO()
    lines = [line for text in varied_texts(3000, seed=41) for line in text.split("\n") if "\0" not in line]
    counts = Counter("".join(lines))
    # A rare character has no piece, so that its bytes are used.
    texts = [line for line in lines if all(counts[character] > 30 for character in line)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        model_type=model_type,
        vocab_size=SIZE,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        character_coverage=1.0,
        normalization_rule_name=normalization,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        control_symbols=list(CONTROL_TOKENS) if symbols else [],
        user_defined_symbols=list(USER_TOKENS) if symbols else [],
        num_threads=1,
        minloglevel=2,
    )
    return file.getvalue()


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The sentencepiece package's own tokenizer."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def spm_vocabulary(model: bytes, *, symbols: bool = False, **changes: object) -> Vocabulary:
    """The vocabulary of a model as llama.cpp's converter writes it (conversion/base.py).

    Args:
        model: a ``tokenizer.model``.
        symbols: whether it was trained with them.
        changes: fields that are to differ.
    """
    source = processor(model)
    kinds = []
    tokens = []
    for index in range(source.get_piece_size()):
        piece = source.id_to_piece(index)
        kind = NORMAL
        for test, result in (
            (source.is_unknown, UNKNOWN),
            (source.is_control, CONTROL),
            (source.is_unused, UNUSED),
            (source.is_byte, BYTE),
        ):
            if test(index):
                kind = result
        if symbols and piece in USER_TOKENS:
            kind, piece = USER_DEFINED, piece.replace(SPACE, " ")
        kinds.append(kind)
        tokens.append(piece)
    fields: dict[str, object] = {
        "pre": "default",
        "kind": SPM,
        "tokens": tuple(tokens),
        "types": tuple(kinds),
        "scores": tuple(source.get_score(index) for index in range(len(tokens))),
        "special": {"bos_token": 1, "eos_token": 2, "unk_token": 0},
        "add_bos": True,
        "add_space_prefix": True,
    }
    return Vocabulary(**(fields | changes))  # type: ignore[arg-type]
