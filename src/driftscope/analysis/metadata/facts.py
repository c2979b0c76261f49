"""What a model on disk says of itself beside its hyperparameters: formats by size, tokenizer, chat template.

Nothing here refuses a model: what is inconsistent is to be shown, not to end the look at it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driftscope.artifacts.model import Artifact
from driftscope.errors import InputError

# Hugging Face's name of a special token, and GGUF's key of its id.
SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "eot_token": "tokenizer.ggml.eot_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}
_KINDS = {
    "gpt2": "byte-level BPE",
    "llama": "SentencePiece",
    "bert": "WordPiece",
    "t5": "Unigram",
    "BPE": "byte-level BPE",
    "Unigram": "SentencePiece",
}
# Far above any vocabulary: an id past it is a broken one.
_MOST_TOKENS = 2**22
_CONVERSATIONS = {
    "user": [{"role": "user", "content": "USER"}],
    "system": [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "USER"}],
}


@dataclass(frozen=True)
class TokenizerFacts:
    """What a model says of its tokenizer.

    Attributes:
        kind: what it is, or None where the model carries none.
        pre: GGUF's name of the pre-tokenizer, where there is one.
        tokens: text of each id; None for an id without one.
        special: Hugging Face's name to id.
        add_bos: a beginning-of-sequence token goes in front of every text; None where nothing is said.
        add_eos: likewise an end-of-sequence token behind it.
        chat_template: Jinja source, or None.
        problem: why the tokenizer could not be read, or None.
    """

    kind: str | None = None
    pre: str | None = None
    tokens: Sequence[str | None] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    chat_template: str | None = None
    problem: str | None = None

    def text(self, token: int) -> str | None:
        """Text of an id, or None where it has none."""
        return self.tokens[token] if 0 <= token < len(self.tokens) else None


def formats_by_size(artifact: Artifact) -> list[dict[str, Any]]:
    """Formats with their tensors, values, bytes and share of the bytes, largest first."""
    sizes: dict[str, list[int]] = {}
    for tensor in artifact.tensors.values():
        entry = sizes.setdefault(stored_dtype(tensor), [0, 0, 0])
        for index, value in enumerate((1, tensor.n_elements, tensor.nbytes)):
            entry[index] += value
    total = sum(entry[2] for entry in sizes.values())
    return [
        {
            "format": name,
            "tensors": tensors,
            "values": values,
            "bytes": nbytes,
            "share": nbytes / total if total else 0.0,
        }
        for name, (tensors, values, nbytes) in sorted(sizes.items(), key=lambda item: -item[1][2])
    ]


def stored_dtype(tensor: Any) -> str:
    """The format that a tensor has on disk, also where it is decoded before it is read."""
    return str(getattr(tensor, "stored_dtype", tensor.dtype))


def tokenizer_facts(artifact: Artifact) -> TokenizerFacts:
    """What a model says of its tokenizer; what cannot be read is said in `problem`."""
    try:
        # The reader of .apr files gives a tokenizer's keys GGUF's names.
        if artifact.container in ("gguf", "apr"):
            return _of_gguf(artifact.metadata)
        folder = artifact.path if artifact.path.is_dir() else artifact.path.parent
        if artifact.container == "safetensors":
            return _of_folder(folder)
        return _of_any(artifact)
    except InputError as error:
        return TokenizerFacts(problem=str(error))


def template_facts(template: str, facts: TokenizerFacts) -> dict[str, Any]:
    """What a chat template does, by rendering it.

    Returns:
        ``lines`` and ``characters``; ``rendered``: two short conversations, without and with a system
        message, or None where the template fails on one; ``problem``: why; ``system``: ``used``, ``ignored``,
        ``refused``, ``added`` (a system message of its own where none is given) or ``unknown``.
    """
    from driftscope.artifacts.chat import render_chat

    rendered: dict[str, str | None] = {}
    problems = []
    for name, messages in _CONVERSATIONS.items():
        try:
            rendered[name] = render_chat(
                template,
                messages,
                bos_token=_special_text(facts, "bos_token"),
                eos_token=_special_text(facts, "eos_token"),
            )
        except InputError as error:
            rendered[name] = None
            problems.append(str(error))
    return {
        "lines": len(template.splitlines()),
        "characters": len(template),
        "rendered": rendered,
        "problem": problems[0] if problems else None,
        "system": _system_role(rendered["user"], rendered["system"]),
    }


def _system_role(plain: str | None, given: str | None) -> str:
    if plain is None:
        return "unknown"
    if given is None:
        return "refused"
    if "SYSTEM" not in given:
        return "ignored"
    # Without a system message the prompt begins as it does with one: the template has put in its own.
    head = given[: given.index("SYSTEM")]
    return "added" if len(head) > 8 and plain.startswith(head) and "USER" in plain[len(head) :] else "used"


def _special_text(facts: TokenizerFacts, name: str) -> str | None:
    token = facts.special.get(name)
    return None if token is None else facts.text(token)


def _of_gguf(metadata: Mapping[str, Any]) -> TokenizerFacts:
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    special = {
        name: metadata[key]
        for name, key in SPECIAL.items()
        if isinstance(metadata.get(key), int) and not isinstance(metadata[key], bool)
    }
    pre, template = metadata.get("tokenizer.ggml.pre"), metadata.get("tokenizer.chat_template")
    return TokenizerFacts(
        kind=None if model is None else f"{_KINDS.get(str(model), 'unknown')} ({model})",
        pre=pre if isinstance(pre, str) else None,
        tokens=() if isinstance(tokens, str) or not isinstance(tokens, Sequence) else tokens[:],
        special=special,
        add_bos=_flag(metadata.get("tokenizer.ggml.add_bos_token")),
        add_eos=_flag(metadata.get("tokenizer.ggml.add_eos_token")),
        chat_template=template if isinstance(template, str) else None,
    )


def _of_folder(folder: Path) -> TokenizerFacts:
    from driftscope.artifacts.tokenizers.folder_tokenizer import (
        has_tokenizer,
        read_chat_template,
        read_folder,
        read_tokenizer_config,
    )

    if not has_tokenizer(folder):
        return TokenizerFacts(chat_template=read_chat_template(folder, read_tokenizer_config(folder)))
    # Tokens without an embedding are to be shown, not refused.
    document, config, path = read_folder(folder, _MOST_TOKENS)
    model = document.get("model")
    model = model if isinstance(model, Mapping) else {}
    ids = _ids(model, document.get("added_tokens"))
    family = "SentencePiece" if _is_sentencepiece(document, path) else _KINDS.get(str(model.get("type")))
    return TokenizerFacts(
        kind=f"{family or 'unknown'} ({path.name}, {model.get('type')})",
        tokens=ids,
        special=_named_ids(config, ids),
        add_bos=_flag(config.get("add_bos_token")),
        add_eos=_flag(config.get("add_eos_token")),
        chat_template=read_chat_template(folder, config),
    )


def _is_sentencepiece(document: Mapping[str, Any], path: Path) -> bool:
    """Whether a ``tokenizer.json`` came from SentencePiece: a BPE of its kind falls back on bytes."""
    model = document.get("model")
    return path.name == "tokenizer.model" or (
        isinstance(model, Mapping) and model.get("type") == "BPE" and model.get("byte_fallback") is True
    )


def _of_any(artifact: Artifact) -> TokenizerFacts:
    """By the tokenizer itself, where it can be built."""
    from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(artifact)
    document = json.loads(tokenizer.to_json())
    ids = _ids(document.get("model", {}), document.get("added_tokens"))
    names = {text: index for index, text in enumerate(ids) if text is not None}
    return TokenizerFacts(
        kind=str(document.get("model", {}).get("type")),
        tokens=ids,
        special={name: names[text] for name, text in tokenizer.special.items() if text in names},
        chat_template=tokenizer.chat_template,
    )


def _ids(model: Mapping[str, Any], added: Any) -> tuple[str | None, ...]:
    """Text of each id of a ``tokenizer.json``."""
    vocabulary = model.get("vocab", {})
    texts: dict[int, str] = {}
    if isinstance(vocabulary, Mapping):
        texts = {index: text for text, index in vocabulary.items() if isinstance(index, int)}
    elif isinstance(vocabulary, list):
        texts = {
            index: item[0]
            for index, item in enumerate(vocabulary)
            if isinstance(item, list) and item and isinstance(item[0], str)
        }
    for item in added if isinstance(added, list) else ():
        if (
            isinstance(item, Mapping)
            and isinstance(item.get("id"), int)
            and isinstance(item.get("content"), str)
        ):
            texts[item["id"]] = item["content"]
    count = max((index for index in texts if 0 <= index < _MOST_TOKENS), default=-1) + 1
    return tuple(texts.get(index) for index in range(count))


def _named_ids(config: Mapping[str, Any], texts: Sequence[str | None]) -> dict[str, int]:
    """Ids of the special tokens that ``tokenizer_config.json`` names."""
    ids = {text: index for index, text in enumerate(texts) if text is not None}
    return {
        name: ids[text]
        for name in SPECIAL
        if (text := _content(config.get(name))) is not None and text in ids
    }


def _content(value: Any) -> str | None:
    """A special token's text, which ``tokenizer_config.json`` gives as a string or as an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None
