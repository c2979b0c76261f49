"""What differs in the metadata of two models, and what of it changes an answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from driftscope.artifacts.model import Artifact, ModelConfig

if TYPE_CHECKING:
    from driftscope.analysis.metadata.facts import TokenizerFacts

_CHANGES = {"context_length": "limit", "vocab_size": "tokens", "tie_word_embeddings": "storage"}
"""What a hyperparameter changes where that is not the forward pass."""

_ONE_PASS = {"llama", "mistral"}
"""Two names of one forward pass, but for a window that is said apart; in GGUF both are llama."""

_MATTERS = ("forward-pass", "tokens", "prompt")

# What converters call the ids behind the last token of a vocabulary that was padded.
_PADDING = re.compile(r"\[PAD[0-9]+\]|\[EMPTY_[0-9]+\]|<pad[0-9]+>|")
_SHOWN = 24


def metadata_differences(a: Artifact, b: Artifact) -> list[dict[str, Any]]:
    """Compare hyperparameters, tokenizers and chat templates.

    Returns:
        ``{key, a, b, changes, matters}`` for each that differs. ``changes`` says what it changes:
        ``forward-pass``, ``tokens`` (text to ids and back), ``prompt`` (the chat template), ``limit``,
        ``storage``, or ``nothing`` (one side alone says it); ``matters`` whether that changes an answer
        (the first three). Lists of tokens are compared by their content and described, not repeated.
    """
    from driftscope.analysis.metadata.facts import tokenizer_facts

    return [*_hyperparameters(a.config, b.config), *_tokenizers(tokenizer_facts(a), tokenizer_facts(b))]


def _hyperparameters(a: ModelConfig, b: ModelConfig) -> list[dict[str, Any]]:
    found = []
    for field in fields(ModelConfig):
        if field.name == "sliding_layers" and None in (a.sliding_window, b.sliding_window):
            continue
        left, right = _plain(getattr(a, field.name)), _plain(getattr(b, field.name))
        if _as_stored(left) != _as_stored(right):
            found.append(difference(field.name, left, right, _changes(field.name, a, b)))
    return found


def _changes(key: str, a: ModelConfig, b: ModelConfig) -> str:
    if key == "architecture" and {a.architecture, b.architecture} == _ONE_PASS:
        return "nothing"
    if key == "sliding_window":
        # A window that is no shorter than the context is none.
        reaches = [c.sliding_window is None or c.sliding_window >= c.context_length for c in (a, b)]
        if all(reaches):
            return "nothing"
    return _CHANGES.get(key, "forward-pass")


def _tokenizers(a: TokenizerFacts, b: TokenizerFacts) -> list[dict[str, Any]]:
    told = [facts.kind is not None or bool(facts.tokens) for facts in (a, b)]
    if not any(told):
        return []
    if not all(told):
        kind_a, kind_b = (facts.kind or facts.problem or "none" for facts in (a, b))
        return [difference("tokenizer", kind_a, kind_b, "nothing")]
    found = _tokens(a.tokens, b.tokens)
    for key, x, y in (
        ("pre_tokenizer", a.pre, b.pre),
        *(
            (f"{name}_id", a.special.get(name), b.special.get(name))
            for name in sorted({*a.special, *b.special})
        ),
        ("add_bos_token", a.add_bos, b.add_bos),
        ("add_eos_token", a.add_eos, b.add_eos),
    ):
        if x != y and (x is not None and y is not None):
            found.append(difference(key, x, y, "tokens"))
        elif x != y and key.endswith("_id"):
            found.append(difference(key, x, y, "nothing"))
    if a.chat_template != b.chat_template:
        found.append(
            difference("chat_template", _described(a.chat_template), _described(b.chat_template), "prompt")
        )
    return found


def _tokens(a: Sequence[str | None], b: Sequence[str | None]) -> list[dict[str, Any]]:
    """The first id whose text differs, and how many do; ids that only pad the longer list are none."""
    if not a or not b:
        return []
    shorter = min(len(a), len(b))
    unlike = [i for i in range(shorter) if _text(a[i]) != _text(b[i])]
    beyond = a[shorter:] if len(a) > len(b) else b[shorter:]
    added = [shorter + i for i, text in enumerate(beyond) if not _PADDING.fullmatch(text or "")]
    if not unlike and not added:
        # Lists of unlike length differ by padding alone.
        if len(a) == len(b):
            return []
        return [difference("tokens", f"{len(a)} tokens", f"{len(b)} tokens", "nothing")]
    first = min([*unlike[:1], *added[:1]])
    found = difference("tokens", _told(a, first), _told(b, first), "tokens")
    return [{**found, "differing": len(unlike) + len(added), "first": first}]


def _told(tokens: Sequence[str | None], index: int) -> str:
    text = _text(tokens[index])[:_SHOWN] if index < len(tokens) else None
    return f"{len(tokens)} tokens" if text is None else f"{len(tokens)} tokens; {index} is {text!r}"


def _text(token: str | None) -> str:
    """A token's text; converters name ids that have none."""
    return "" if token is None or _PADDING.fullmatch(token) else token


def _described(template: str | None) -> str | None:
    if template is None:
        return None
    digest = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{len(template)} characters, sha256 {digest}"


def difference(key: str, a: Any, b: Any, changes: str) -> dict[str, Any]:
    """One difference, see `metadata_differences`."""
    return {"key": key, "a": a, "b": b, "changes": changes, "matters": changes in _MATTERS}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items())}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _as_stored(value: Any) -> Any:
    """Floats as f32: GGUF stores them so, where ``config.json`` has decimals."""
    if isinstance(value, dict):
        return {key: _as_stored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_stored(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value
