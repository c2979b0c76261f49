"""Two models' metadata beside each other: hyperparameters, tokenizer, special tokens, template, raw keys."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from driftscope.analysis.metadata.differences import metadata_differences
from driftscope.analysis.metadata.facts import SPECIAL, TokenizerFacts
from driftscope.artifacts.model import Artifact, ModelConfig

LISTED_TOKENS = 20
LISTED_LINES = 200

# Keys that say where a file comes from and how it is labelled; two files of one model differ in them.
_LABELS = ("general.", "quantize.", "split.", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
# Keys that are compared by what they mean: the hyperparameters, and the tokenizer with its tokens.
_COMPARED = ("tokenizer.",)


def compare_metadata(
    a: Artifact, b: Artifact, tokenizer_a: TokenizerFacts, tokenizer_b: TokenizerFacts
) -> dict[str, Any]:
    """Compare what two models say of themselves.

    Returns:
        ``same``: whether hyperparameters, tokens, special tokens and template agree, as far as both sides say
        anything; ``hyperparameters``: ``[{key, a, b, changes, matters}]``; ``tokenizer``: ``{key, a, b}`` of
        its kind and flags; ``special``: ``{key, a, b}`` with ids, of which
        one that only one side names does not count; ``tokens``: ``{count_a, count_b, differing,
        first}``; ``template``: ``{equal, diff}`` with the lines of a unified diff, or None where neither side
        has one; ``keys``: raw keys of the container, only where both are of one kind: ``{only_a, only_b,
        unlike}``. Raw keys do not decide on ``same``: labels are among them, and what matters of them has
        been compared above.
    """
    named = {field.name for field in fields(ModelConfig)}
    hyperparameters = [item for item in metadata_differences(a, b) if item["key"] in named]
    both = tokenizer_a.kind is not None and tokenizer_b.kind is not None
    tokenizer = _tokenizer(tokenizer_a, tokenizer_b)
    special = _special(tokenizer_a, tokenizer_b) if both else []
    tokens = _tokens(tokenizer_a.tokens, tokenizer_b.tokens) if both else None
    template = _template(tokenizer_a.chat_template, tokenizer_b.chat_template)
    same = not (
        hyperparameters
        or tokenizer
        or any(item["a"] and item["b"] for item in special)
        or (tokens is not None and tokens["differing"])
        or (template is not None and not template["equal"])
    )
    return {
        "same": same,
        "hyperparameters": hyperparameters,
        "tokenizer": tokenizer,
        "special": special,
        "tokens": tokens,
        "template": template,
        "keys": _keys(a.metadata, b.metadata) if a.container == b.container else None,
    }


def _tokenizer(a: TokenizerFacts, b: TokenizerFacts) -> list[dict[str, Any]]:
    """Kind and flags: containers say them in their own words, so that only the family is compared."""
    found = []
    family_a, family_b = (None if side.kind is None else side.kind.partition(" (")[0] for side in (a, b))
    if family_a != family_b:
        found.append({"key": "kind", "a": a.kind, "b": b.kind})
    for key in ("pre", "add_bos", "add_eos"):
        left, right = getattr(a, key), getattr(b, key)
        if left is not None and right is not None and left != right:
            found.append({"key": key, "a": left, "b": right})
    return found


def _special(a: TokenizerFacts, b: TokenizerFacts) -> list[dict[str, Any]]:
    return [
        {"key": name, "a": _named(a, name), "b": _named(b, name)}
        for name in SPECIAL
        if a.special.get(name) != b.special.get(name)
    ]


def _named(facts: TokenizerFacts, name: str) -> dict[str, Any] | None:
    token = facts.special.get(name)
    return None if token is None else {"id": token, "text": facts.text(token)}


def _tokens(a: Sequence[str | None], b: Sequence[str | None]) -> dict[str, Any]:
    """Ids whose text differs; ids that one side alone has, without a text of note, are padding."""
    differing = [i for i in range(min(len(a), len(b))) if a[i] != b[i] and not _padding(a[i], b[i])]
    longer, name = (a, "a") if len(a) > len(b) else (b, "b")
    beyond = [i for i in range(min(len(a), len(b)), len(longer)) if not _padding(longer[i], None)]
    first = [{"id": i, "a": a[i], "b": b[i]} for i in differing[:LISTED_TOKENS]]
    room = LISTED_TOKENS - len(first)
    first += [{"id": i, "a": None, "b": None, name: longer[i]} for i in beyond[:room]]
    return {
        "count_a": len(a),
        "count_b": len(b),
        "differing": len(differing) + len(beyond),
        "first": first,
    }


def _padding(text: str | None, other: str | None) -> bool:
    """Whether a token was only put in to fill the vocabulary, and the other side has none."""
    texts = [item for item in (text, other) if item is not None]
    return len(texts) < 2 and all(item.startswith(("[PAD", "<pad", "[EMPTY_")) for item in texts)


def _template(a: str | None, b: str | None) -> dict[str, Any] | None:
    if a is None and b is None:
        return None
    if a is not None and b is not None and a.rstrip("\n") == b.rstrip("\n"):
        return {"equal": True, "diff": []}
    lines = difflib.unified_diff((a or "").splitlines(), (b or "").splitlines(), "A", "B", lineterm="", n=2)
    return {"equal": False, "diff": list(lines)[:LISTED_LINES]}


def _keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Raw keys of one side, and those with unlike values."""
    return {
        "only_a": sorted(key for key in a if key not in b),
        "only_b": sorted(key for key in b if key not in a),
        "unlike": [
            {"key": key, "a": _brief(a[key]), "b": _brief(b[key]), "label": key.startswith(_LABELS)}
            for key in sorted(a)
            if key in b and a[key] != b[key] and not key.startswith(_COMPARED)
        ],
    }


def _brief(value: Any) -> Any:
    """A value for a list: long ones are cut."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > 100:
        return f"{text[:97]}…"
    return value if isinstance(value, str | int | float | bool) or value is None else text
