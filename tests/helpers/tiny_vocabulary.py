"""A small byte-level vocabulary, trained by the tokenizers package, and the files that carry one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import gguf
import tokenizers

from driftscope.artifacts.tokenizers.token_types import CONTROL, NORMAL, USER_DEFINED
from driftscope.artifacts.tokenizers.vocabulary import SPM, Vocabulary
from tests.helpers.texts import varied_texts

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_TOKENS = ("<tool>", "    ")
SIZE = 1024


@cache
def _trained() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tokens and merges; words are not cut, so that merges reach over spaces, digits and signs."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE - len(CONTROL_TOKENS) - len(USER_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=8,
    )
    backend.train_from_iterator(varied_texts(2000, seed=99), trainer)
    ids = backend.get_vocab()
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merged = sorted((text for text in ids if text not in alphabet), key=ids.__getitem__)
    tokens = (*sorted(alphabet), *merged)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return tokens, tuple((left, right) for left, right in merges)


def tiny_vocabulary(pre: str, **changes: object) -> Vocabulary:
    """A consistent vocabulary of `SIZE` tokens for a pre-tokenizer.

    Args:
        pre: GGUF name.
        changes: fields that are to differ.
    """
    tokens, merges = _trained()
    fields: dict[str, object] = {
        "pre": pre,
        "tokens": (*CONTROL_TOKENS, *tokens, *USER_TOKENS),
        "types": (CONTROL,) * len(CONTROL_TOKENS)
        + (NORMAL,) * len(tokens)
        + (USER_DEFINED,) * len(USER_TOKENS),
        "merges": merges,
        "special": {"bos_token": 1, "eos_token": 2, "pad_token": 2},
    }
    return Vocabulary(**(fields | changes))  # type: ignore[arg-type]


def add_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """The keys of a tokenizer, written with the gguf package's own methods."""
    writer.add_tokenizer_model("llama" if vocabulary.kind == SPM else "gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == SPM:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
        writer.add_unk_token_id(vocabulary.special["unk_token"])
    else:
        writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
        writer.add_pad_token_id(vocabulary.special["pad_token"])
    writer.add_bos_token_id(vocabulary.special["bos_token"])
    writer.add_eos_token_id(vocabulary.special["eos_token"])
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def write_vocabulary_gguf(path: Path, vocabulary: Vocabulary, *, name: str | None = None) -> Path:
    """A GGUF file without tensors, as llama.cpp reads it with ``vocab_only``."""
    writer = gguf.GGUFWriter(path, "llama")
    if name is not None:
        writer.add_name(name)
    add_tokenizer(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata_of(vocabulary: Vocabulary) -> dict[str, object]:
    """The key-values of a vocabulary, as the reader gives them."""
    values: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.merges": _lines(vocabulary.merges),
        "tokenizer.ggml.bos_token_id": vocabulary.special["bos_token"],
        "tokenizer.ggml.eos_token_id": vocabulary.special["eos_token"],
    }
    return values


def _lines(merges: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{left} {right}" for left, right in merges)
