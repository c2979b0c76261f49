"""The tokenizer of a Hugging Face model folder in the terms of GGUF."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from driftscope.artifacts.tokenizers.folder_tokenizer import (
    read_chat_template,
    read_folder,
    special_tokens_of_config,
)
from driftscope.artifacts.tokenizers.pretokenizers import find_name
from driftscope.artifacts.tokenizers.spm_encoder import SPACE
from driftscope.artifacts.tokenizers.spm_json import scores_of_merges
from driftscope.artifacts.tokenizers.token_types import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from driftscope.artifacts.tokenizers.vocabulary import SPM, Vocabulary, is_byte_text
from driftscope.errors import InputError

# Key of tokenizer_config.json that keeps the GGUF name of the pre-tokenizer.
PRE_NAME_KEY = "driftscope_pre_tokenizer"

# llama.cpp's converter gives it to tokens that nothing merges into.
_UNUSED_SCORE = -10000.0


def vocabulary_from_folder(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the vocabulary beside a safetensors model, as far as GGUF can hold it.

    Ids without a token, up to `vocab_size`, become unused padding tokens, as in llama.cpp's converter.

    Raises:
        InputError: missing, malformed, neither byte-level nor SentencePiece's BPE, with a pre-tokenizer
            that GGUF has no name for, or with merges that scores cannot say.
    """
    document, config, path = read_folder(folder, vocab_size)
    model = document.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else None
        raise InputError(
            f"{path}: tokenizer model {kind!r} cannot be written to GGUF; "
            "expected byte-level BPE or SentencePiece's BPE"
        )
    ids = _ids(document, model, vocab_size, path)
    texts = {index: text for text, index in ids.items()}
    if len(texts) != len(ids):
        raise InputError(f"{path}: two tokens have the same id")
    tokens = tuple(texts.get(index, f"[PAD{index}]") for index in range(vocab_size))
    special = {name: ids[text] for name, text in special_tokens_of_config(config).items() if text in ids}
    begin, end = _added_by_post_processor(document)
    common: dict[str, Any] = {
        "tokens": tokens,
        "special": special,
        "add_bos": begin,
        "add_eos": end,
        "chat_template": read_chat_template(folder, config),
    }
    added = _added_types(document)
    if _is_spm(document):
        vocabulary = _spm(document, ids, added, common, path)
    else:
        preferred = config.get(PRE_NAME_KEY)
        pre = find_name(document, preferred if isinstance(preferred, str) else None)
        if pre is None:
            raise InputError(f"{path}: GGUF has no name for this pre-tokenizer")
        types = {index: added.get(text, NORMAL) for text, index in ids.items()}
        vocabulary = Vocabulary(
            pre=pre,
            types=tuple(types.get(index, UNUSED) for index in range(vocab_size)),
            merges=_pairs(model.get("merges", []), path),
            **common,
        )
    return vocabulary.check(vocab_size, str(path))


def _is_spm(document: Mapping[str, Any]) -> bool:
    """Whether spaces are U+2581 and other bytes have tokens of their own, and not GPT-2's alphabet."""
    parts = json.dumps([document.get("normalizer"), document.get("pre_tokenizer")], ensure_ascii=False)
    return '"ByteLevel"' not in parts and (SPACE in parts or bool(document["model"].get("byte_fallback")))


def _spm(
    document: Mapping[str, Any],
    ids: Mapping[str, int],
    added: Mapping[str, int],
    common: Mapping[str, Any],
    path: Path,
) -> Vocabulary:
    model = document["model"]
    prefix = _space_prefix(document, path)
    # Found by merging, like any other token: an added token is looked for before spaces become U+2581.
    free = {text: kind for text, kind in added.items() if kind == CONTROL or SPACE not in text}
    scores = scores_of_merges(ids, _pairs(model.get("merges", []), path), added, str(path))
    unknown = model.get("unk_token")
    kinds = []
    for index, text in enumerate(common["tokens"]):
        if ids.get(text) != index:
            kinds.append(UNUSED)
        elif text == unknown:
            kinds.append(UNKNOWN)
        elif text in free:
            kinds.append(free[text])
        else:
            kinds.append(BYTE if is_byte_text(text) else NORMAL)
    special = dict(common["special"])
    if isinstance(unknown, str) and unknown in ids:
        special.setdefault("unk_token", ids[unknown])
    return Vocabulary(
        pre="default",
        kind=SPM,
        types=tuple(kinds),
        scores=tuple(
            _UNUSED_SCORE if kind == UNUSED else scores.get(text, 0.0)
            for text, kind in zip(common["tokens"], kinds, strict=True)
        ),
        add_space_prefix=prefix,
        strip_right=frozenset(
            token["id"]
            for token in document["added_tokens"]
            if token.get("rstrip") and token["content"] in free
        ),
        **{**common, "special": special},
    )


def _space_prefix(document: Mapping[str, Any], path: Path) -> bool:
    """Whether a space is put in front of a text; what else is done to a text GGUF cannot say.

    Raises:
        InputError: something else is done to a text.
    """
    prefix = False
    for step in (*_steps(document.get("normalizer"), "normalizers"),
                 *_steps(document.get("pre_tokenizer"), "pretokenizers")):  # fmt: skip
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE and step.get("split") is False:
            prefix |= step.get("prepend_scheme") != "never"
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            pass
        elif kind == "Split" and step.get("pattern") == {"String": " "}:
            # There are no spaces any more where Gemma splits at them.
            pass
        else:
            raise InputError(f"{path}: GGUF's SentencePiece vocabularies have no step {str(kind)[:40]!r}")
    return prefix


def _steps(value: Any, parts: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence."""
    if not isinstance(value, Mapping):
        return []
    inner = value.get(parts) if value.get("type") == "Sequence" else [value]
    return [step for step in inner if isinstance(step, Mapping)] if isinstance(inner, list) else []


def _pairs(merges: Any, path: Path) -> tuple[tuple[str, str], ...]:
    pairs = []
    if not isinstance(merges, list):
        raise InputError(f"{path}: merges is not a list")
    for rank, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
            raise InputError(f"{path}: merge {rank} is {merge!r}; expected two tokens")
        pairs.append((parts[0], parts[1]))
    return tuple(pairs)


def _ids(
    document: Mapping[str, Any], model: Mapping[str, Any], vocab_size: int, path: Path
) -> dict[str, int]:
    """Token text to id of a parsed ``tokenizer.json``."""
    vocab = model.get("vocab")
    if not isinstance(vocab, Mapping):
        raise InputError(f"{path}: expected model.vocab")
    ids = dict(vocab) | {token["content"]: token["id"] for token in document["added_tokens"]}
    for text, index in ids.items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < vocab_size:
            raise InputError(
                f"{path}: token {text[:40]!r} has the id {str(index)[:40]}, "
                f"but the model has {vocab_size} embeddings"
            )
    return ids


def _added_types(document: Mapping[str, Any]) -> dict[str, int]:
    """Text of each added token to its GGUF type."""
    return {
        token["content"]: CONTROL if token.get("special") else USER_DEFINED
        for token in document["added_tokens"]
    }


def _added_by_post_processor(document: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the post-processor puts a special token in front of and behind a text."""
    processor = document.get("post_processor")
    steps = [processor] if isinstance(processor, Mapping) else []
    if steps and steps[0].get("type") == "Sequence":
        inner = steps[0].get("processors", [])
        steps = [step for step in inner if isinstance(step, Mapping)] if isinstance(inner, list) else []
    for step in steps:
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            ends = (single[0], single[-1])
            begin, end = (isinstance(piece, Mapping) and "SpecialToken" in piece for piece in ends)
            return begin, end
    return False, False
