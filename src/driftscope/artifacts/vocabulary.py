"""The vocabulary of a byte-level BPE tokenizer, from and to the two forms in which models carry it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driftscope.artifacts.files import read_json_object
from driftscope.artifacts.pretokenizers import find_name, pre_tokenizer
from driftscope.errors import InputError

# Token types of GGUF (llama.h, llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Hugging Face's name of a special token, and GGUF's.
SPECIAL_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}

# Key of tokenizer_config.json that keeps the GGUF name of the pre-tokenizer.
PRE_NAME_KEY = "driftscope_pre_tokenizer"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens, merges and special tokens.

    Attributes:
        pre: GGUF name of the pre-tokenizer.
        tokens: text of each id; ordinary tokens in GPT-2's printable byte alphabet.
        types: GGUF token type of each id.
        merges: pairs in the order in which they are applied.
        special: Hugging Face's name (``bos_token`` ...) to id.
        add_bos: a beginning-of-sequence token belongs in front of every text.
        add_eos: an end-of-sequence token belongs behind every text.
        chat_template: Jinja source, or None.
    """

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[tuple[str, str], ...]
    special: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None

    def check(self, vocab_size: int, where: str) -> Vocabulary:
        """Return self if it is consistent with itself and with the model.

        Args:
            vocab_size: rows of the embedding.
            where: the file, for the message.

        Raises:
            InputError: tokens, types, merges or special ids do not fit together.
        """
        if len(self.tokens) > vocab_size:
            raise InputError(f"{where}: {len(self.tokens)} tokens, but the model has {vocab_size} embeddings")
        if len(self.types) != len(self.tokens):
            raise InputError(f"{where}: {len(self.types)} token types for {len(self.tokens)} tokens")
        ids = {text: index for index, text in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            second = next(i for i, text in enumerate(self.tokens) if ids[text] != i)
            raise InputError(
                f"{where}: token {self.tokens[second]!r} is there twice, "
                f"as {second} and as {ids[self.tokens[second]]}"
            )
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
    if model != "gpt2":
        raise InputError(
            f"{where}: tokenizer model {model!r} is not supported; expected 'gpt2' (byte-level BPE)"
        )
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str):
        raise InputError(f"{where}: tokenizer.ggml.pre is not a string")
    rule = pre_tokenizer(pre, where)
    tokens = _strings(metadata, "tokenizer.ggml.tokens", where)
    # llama.cpp's name for a token without text.
    tokens = tuple(text or f"[EMPTY_{index}]" for index, text in enumerate(tokens))
    if len(tokens) != vocab_size:
        raise InputError(f"{where}: {len(tokens)} tokens, but the model has {vocab_size} embeddings")
    merges = []
    for rank, line in enumerate(_strings(metadata, "tokenizer.ggml.merges", where)):
        left, space, right = line[1:].partition(" ")
        if not space or not right:
            raise InputError(
                f"{where}: merge {rank} is {line!r}; expected two tokens and a space between them"
            )
        merges.append((line[0] + left, right))
    special = {}
    for name, key in SPECIAL_KEYS.items():
        if key in metadata:
            special[name] = _integer(metadata[key], key, where)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{where}: tokenizer.chat_template is not a string")
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=_types(metadata, len(tokens), where),
        merges=tuple(merges),
        special=special,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", rule.add_bos)),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=template,
    ).check(vocab_size, where)


def vocabulary_from_folder(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the vocabulary beside a safetensors model: ``tokenizer.json`` and ``tokenizer_config.json``.

    Ids without a token, up to `vocab_size`, become unused padding tokens, as in llama.cpp's converter.

    Raises:
        InputError: missing, malformed, not byte-level BPE, or with a pre-tokenizer that GGUF has no
            name for.
    """
    path = folder / "tokenizer.json"
    document = read_json_object(path)
    config = read_tokenizer_config(folder)
    model = document.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else None
        raise InputError(
            f"{path}: tokenizer model {kind!r} cannot be written to GGUF; expected byte-level BPE"
        )
    preferred = config.get(PRE_NAME_KEY)
    pre = find_name(document, preferred if isinstance(preferred, str) else None)
    if pre is None:
        raise InputError(f"{path}: GGUF has no name for this pre-tokenizer")
    ids, types = _ids_and_types(document, model, vocab_size, path)
    texts = {index: text for text, index in ids.items()}
    if len(texts) != len(ids):
        raise InputError(f"{path}: two tokens have the same id")
    tokens = tuple(texts.get(index, f"[PAD{index}]") for index in range(vocab_size))
    special = {}
    for name in SPECIAL_KEYS:
        text = _token_text(config.get(name))
        if text is not None and text in ids:
            special[name] = ids[text]
    begin, end = _added_by_post_processor(document)
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=tuple(types.get(index, UNUSED) for index in range(vocab_size)),
        merges=_pairs(model.get("merges", []), path),
        special=special,
        add_bos=begin,
        add_eos=end,
        chat_template=read_chat_template(folder, config),
    ).check(vocab_size, str(path))


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of a model folder, or an empty dictionary where there is none."""
    path = folder / "tokenizer_config.json"
    return read_json_object(path) if path.is_file() else {}


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template of a model folder, or None.

    Newer folders hold it in ``chat_template.jinja``, which wins; older ones in ``tokenizer_config.json``
    as a string or as a list of named templates.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is not a string")
    return template


def special_tokens_of_config(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens named in a ``tokenizer_config.json``: Hugging Face's name to text."""
    texts = {name: _token_text(config.get(name)) for name in SPECIAL_KEYS}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


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
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: tokenizer.ggml.token_type is not a list of integers") from error
    return types


def _integer(value: Any, key: str, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {key} is {value!r}; expected an integer") from error


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


def _ids_and_types(
    document: Mapping[str, Any], model: Mapping[str, Any], vocab_size: int, path: Path
) -> tuple[dict[str, int], dict[int, int]]:
    """Token text to id, and id to GGUF type, of a parsed ``tokenizer.json``."""
    vocab = model.get("vocab")
    added = document.get("added_tokens") or []
    if not isinstance(vocab, Mapping) or not isinstance(added, list):
        raise InputError(f"{path}: expected model.vocab and added_tokens")
    ids = dict(vocab)
    types = {}
    for token in added:
        if not isinstance(token, Mapping) or not isinstance(token.get("content"), str):
            raise InputError(f"{path}: an added token has no content")
        ids[token["content"]] = token.get("id")
        types[token["content"]] = CONTROL if token.get("special") else USER_DEFINED
    for text, index in ids.items():
        if not isinstance(index, int) or not 0 <= index < vocab_size:
            raise InputError(
                f"{path}: token {text!r} has the id {index!r}, but the model has {vocab_size} embeddings"
            )
    return ids, {index: types.get(text, NORMAL) for text, index in ids.items()}


def _added_by_post_processor(document: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the post-processor puts a special token in front of and behind a text."""
    processor = document.get("post_processor")
    steps = [processor] if isinstance(processor, Mapping) else []
    if steps and steps[0].get("type") == "Sequence":
        steps = [step for step in steps[0].get("processors", []) if isinstance(step, Mapping)]
    for step in steps:
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            return "SpecialToken" in single[0], "SpecialToken" in single[-1]
    return False, False
