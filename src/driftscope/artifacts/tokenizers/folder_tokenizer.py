"""The tokenizer of a Hugging Face model folder, as one ``tokenizer.json`` document.

A folder carries ``tokenizer.json``, or only SentencePiece's ``tokenizer.model``; beside it
``tokenizer_config.json`` with the special tokens, ``added_tokens.json`` and the chat template. The document
that comes out of them gives the ids that transformers gives.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from driftscope.artifacts.files import read_json_object, regular_file_size
from driftscope.artifacts.tokenizers.bounds import check_growth
from driftscope.artifacts.tokenizers.sentencepiece import (
    BPE_MODEL,
    UNIGRAM_MODEL,
    SentencePieceModel,
    read_sentencepiece,
)
from driftscope.artifacts.tokenizers.spm_json import (
    bpe_model,
    decoder,
    escaping_normalizer,
    merges_of_scores,
    metaspace,
)
from driftscope.artifacts.tokenizers.token_types import CONTROL, SPECIAL_TYPES, UNKNOWN
from driftscope.artifacts.tokenizers.vocabulary import MAX_SPM_TOKEN_CHARACTERS, SPECIAL_KEYS
from driftscope.errors import InputError

_MAX_TEMPLATE_BYTES = 16 * 2**20
# Flags of an added token, and their values where a file leaves them out.
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder carries a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def read_folder(
    folder: Path, vocab_size: int, architecture: str | None = None
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Read the tokenizer of a model folder.

    Args:
        folder: the model's.
        vocab_size: rows of the embedding.
        architecture: ``model_type`` of the model, where known.

    Returns:
        The document, ``tokenizer_config.json`` with the special tokens of a ``tokenizer.model`` added where
        it names none, and the file that the tokens come from.

    Raises:
        InputError: missing or malformed.
    """
    config = read_tokenizer_config(folder)
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / "tokenizer.model").is_file():
        path = folder / "tokenizer.model"
        model = read_sentencepiece(path)
        _check_pieces(model, vocab_size, path)
        document = _document(model, path)
        named = {"bos_token": model.begin, "eos_token": model.end, "unk_token": model.unknown}
        for name, index in named.items():
            if index is not None and name not in config:
                config[name] = model.pieces[index]
    else:
        document = read_json_object(path)
        check_growth(document, str(path))
    model_part = document.get("model")
    if isinstance(model_part, dict) and model_part.get("continuing_subword_prefix"):
        # The library panics where a merge has none, and no language model's tokenizer has one.
        raise InputError(f"{path}: a continuing_subword_prefix is not supported")
    _add_tokens(document, folder, config, path)
    if architecture == "llama" and config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
        _as_llama_tokenizer(document, config)
    if path.name == "tokenizer.model":
        # Beside a tokenizer.json, whose post-processor says it, transformers ignores the flags.
        _add_flagged(document, config)
    return document, config, path


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of a model folder, or an empty dictionary where there is none.

    As in transformers, ``special_tokens_map.json`` of older folders goes before it, unless it lists the
    added tokens itself.
    """
    path = folder / "tokenizer_config.json"
    config = read_json_object(path) if path.is_file() else {}
    named = folder / "special_tokens_map.json"
    if named.is_file() and "added_tokens_decoder" not in config:
        config |= {name: value for name, value in read_json_object(named).items() if name in SPECIAL_KEYS}
    return config


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template of a model folder, or None.

    Newer folders hold it in ``chat_template.jinja``, which wins; older ones in ``tokenizer_config.json``
    as a string or as a list of named templates.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        size = regular_file_size(path)
        if size > _MAX_TEMPLATE_BYTES:
            raise InputError(f"{path}: {size} bytes; expected at most {_MAX_TEMPLATE_BYTES}")
        try:
            return path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {
            name: item.get("template")
            for item in template
            if isinstance(item, Mapping) and isinstance(name := item.get("name"), str)
        }
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is not a string")
    return template


def special_tokens_of_config(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens named in a ``tokenizer_config.json``: Hugging Face's name to text."""
    texts = {name: token_text(config.get(name)) for name in SPECIAL_KEYS}
    return {name: text for name, text in texts.items() if text is not None}


def token_text(value: Any) -> str | None:
    """The text of a special token that is given as a string or as an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _check_pieces(model: SentencePieceModel, vocab_size: int, path: Path) -> None:
    if len(model.pieces) > vocab_size:
        raise InputError(f"{path}: {len(model.pieces)} tokens, but the model has {vocab_size} embeddings")
    if len(set(model.pieces)) != len(model.pieces):
        raise InputError(f"{path}: a piece is there twice")
    if max(map(len, model.pieces)) > MAX_SPM_TOKEN_CHARACTERS:
        raise InputError(f"{path}: a piece has more than {MAX_SPM_TOKEN_CHARACTERS} characters")
    if model.model_type not in (UNIGRAM_MODEL, BPE_MODEL):
        raise InputError(f"{path}: a {model.model_name} model is not supported; expected BPE or unigram")


def _document(model: SentencePieceModel, path: Path) -> dict[str, Any]:
    """The ``tokenizer.json`` of a ``tokenizer.model``."""
    if any(score != score or abs(score) == float("inf") for score in model.scores):
        raise InputError(f"{path}: the score of a piece is not a finite number")
    unknown = model.pieces[model.unknown]
    if model.model_type == BPE_MODEL:
        ids = {piece: index for index, piece in enumerate(model.pieces)}
        merges = merges_of_scores(model.pieces, model.scores)
        core = bpe_model(ids, merges, unknown, byte_fallback=model.byte_fallback)
    else:
        core = {
            "type": "Unigram",
            "unk_id": model.unknown,
            "vocab": [list(pair) for pair in zip(model.pieces, model.scores, strict=True)],
            "byte_fallback": model.byte_fallback,
        }
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        steps.append(
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode("ascii")}
        )
    if model.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    steps.extend(escaping_normalizer(add_space_prefix=model.add_dummy_prefix)["normalizers"])
    added = [
        {
            "id": index,
            "content": piece,
            **_FLAGS,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for index, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True))
        if kind in SPECIAL_TYPES
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": decoder(strip_prefix=model.add_dummy_prefix),
        "model": core,
    }


def _add_tokens(document: dict[str, Any], folder: Path, config: Mapping[str, Any], path: Path) -> None:
    """Add the tokens of ``tokenizer_config.json`` and ``added_tokens.json`` that the document lacks.

    The flags of ``tokenizer_config.json`` go before those of the document, as in transformers.
    """
    listed = document.get("added_tokens") or []
    if not isinstance(listed, list):
        raise InputError(f"{path}: added_tokens is not a list")
    added = {
        token["content"]: dict(token)
        for token in listed
        if isinstance(token, Mapping) and isinstance(token.get("content"), str)
    }
    if len(added) != len(listed):
        raise InputError(f"{path}: an added token has no content, or two have the same")
    if not all(type(token.get("id")) is int for token in added.values()):
        raise InputError(f"{path}: an added token has no id")
    stated = config.get("added_tokens_decoder")
    if isinstance(stated, Mapping):
        where = folder / "tokenizer_config.json"
        entries = [(_index(key, where), value) for key, value in stated.items()]
        for index, value in entries:
            content = token_text(value)
            if content is None or not isinstance(value, Mapping):
                raise InputError(f"{where}: added token {index} has no content")
            flags = {name: bool(value.get(name, default)) for name, default in _FLAGS.items()}
            special = bool(value.get("special", False))
            token = {
                "id": index,
                "content": content,
                **flags,
                "normalized": bool(value.get("normalized", not special)),
                "special": special,
            }
            added[content] = token | {"id": added.get(content, token)["id"]}
    elif (folder / "added_tokens.json").is_file():
        where = folder / "added_tokens.json"
        named = set(special_tokens_of_config(config).values())
        for content, value in read_json_object(where).items():
            special = content in named
            token = {
                "id": _index(value, where),
                "content": content,
                **_FLAGS,
                "normalized": not special,
                "special": special,
            }
            added.setdefault(content, token)
    document["added_tokens"] = sorted(added.values(), key=lambda token: int(token["id"]))


def _index(value: Any, where: Path) -> int:
    try:
        index = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: an added token has the id {str(value)[:40]!r}") from error
    if not 0 <= index < 2**31:
        raise InputError(f"{where}: an added token has the id {index}")
    return index


def _as_llama_tokenizer(document: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Cut text as transformers' class LlamaTokenizer does.

    It takes tokens and merges from the file and nothing else (transformers 5,
    ``models/llama/tokenization_llama.py``): a space is put in front of a text that does not begin with one,
    and, where the configuration says ``legacy``, in front of what follows a special token. A byte-level
    tokenizer, as Llama 3's, is taken as it stands.
    """
    parts = json.dumps([document.get("pre_tokenizer"), document.get("decoder")])
    if '"ByteLevel"' in parts or not isinstance(document.get("model"), dict):
        return
    wanted = config.get("add_prefix_space")
    prefix = wanted is None or bool(wanted)
    document["normalizer"] = None
    scheme = "never" if not prefix else "always" if config.get("legacy", False) else "first"
    document["pre_tokenizer"] = metaspace(scheme)
    document["decoder"] = decoder(strip_prefix=prefix)
    document["model"] |= {"unk_token": None, "fuse_unk": True, "byte_fallback": True}


def _add_flagged(document: dict[str, Any], config: Mapping[str, Any]) -> None:
    """The tokens that begin and end a sequence, where ``tokenizer_config.json`` says whether they do."""
    ids = {token["content"]: token["id"] for token in document["added_tokens"]}
    vocab = document["model"].get("vocab") if isinstance(document.get("model"), dict) else None
    known = {**vocab, **ids} if isinstance(vocab, dict) else ids
    found: list[int | None] = []
    texts: list[str | None] = []
    for name in ("bos_token", "eos_token"):
        text = token_text(config.get(name)) if config.get(f"add_{name}") else None
        index = known.get(text) if text is not None else None
        texts.append(text if isinstance(index, int) else None)
        found.append(index if isinstance(index, int) else None)
    document["post_processor"] = begin_and_end((texts[0], found[0]), (texts[1], found[1]))


def begin_and_end(
    begin: tuple[str | None, int | None], end: tuple[str | None, int | None]
) -> dict[str, Any] | None:
    """A post-processor that adds a token in front of a text and one behind it, each where it is given."""
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    tokens: dict[str, Any] = {}
    for place, (text, index) in enumerate((begin, end)):
        if text is None:
            continue
        tokens[text] = {"id": text, "ids": [index], "tokens": [text]}
        piece = {"SpecialToken": {"id": text, "type_id": 0}}
        single = [piece, *single] if place == 0 else [*single, piece]
    if not tokens:
        return None
    pair = [*single, *({key: {**value, "type_id": 1} for key, value in step.items()} for step in single)]
    pair = [
        {"Sequence": {"id": "B", "type_id": 1}} if i >= len(single) and "Sequence" in step else step
        for i, step in enumerate(pair)
    ]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
