"""SentencePiece vocabularies as Hugging Face's ``tokenizer.json`` has them: merges in place of scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from driftscope.artifacts.tokenizers.spm_encoder import SPACE
from driftscope.artifacts.tokenizers.vocabulary import MAX_SPM_TOKEN_CHARACTERS
from driftscope.errors import InputError


def merges_of_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Merges that do what scores do: every cut of every token into two tokens, the highest score first.

    As transformers' ``generate_merges``, but where tokens have equal scores the merges of one token stay
    together, so that `scores_of_merges` finds an order of tokens in them.
    """
    known = set(tokens)
    order = sorted(range(len(tokens)), key=lambda index: (-scores[index], index))
    return [pair for index in order for pair in _cuts(tokens[index], known)]


def scores_of_merges(
    ids: Mapping[str, int], merges: Iterable[tuple[str, str]], added: Iterable[str], where: str
) -> dict[str, float]:
    """Scores that do what merges do: minus the place of a token among the tokens that merges give.

    Args:
        ids: token text to id.
        merges: pairs in the order in which they are applied.
        added: tokens that are found before anything merges, and so may be cut in any way.
        where: the file, for messages.

    Raises:
        InputError: scores cannot say what the merges say. A score belongs to a token and not to a pair, so
            that every cut of the token into two tokens must be among the merges, next to each other.
    """
    ranks: dict[str, list[int]] = {}
    pairs: dict[str, set[tuple[str, str]]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
        pairs.setdefault(left + right, set()).add((left, right))
    known, free = set(ids), set(added)
    for text in ids:
        if text in free:
            continue
        found = ranks.get(text, [])
        together = not found or found[-1] - found[0] == len(found) - 1
        if not together or set(_cuts(text, known)) != pairs.get(text, set()):
            raise InputError(
                f"{where}: the merges of {text[:40]!r} cannot be said with one score a token, "
                "as GGUF's SentencePiece vocabularies have them"
            )
    produced = sorted(ranks, key=lambda text: ranks[text][0])
    return {text: -float(place) for place, text in enumerate(produced, start=1)}


def _cuts(text: str, known: set[str]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, the longest left part first."""
    if len(text) > MAX_SPM_TOKEN_CHARACTERS:
        return []
    cuts = ((text[:end], text[end:]) for end in range(len(text) - 1, 0, -1))
    return [pair for pair in cuts if pair[0] in known and pair[1] in known]


def bpe_model(
    ids: Mapping[str, int], merges: Iterable[tuple[str, str]], unknown: str | None, *, byte_fallback: bool
) -> dict[str, Any]:
    """The ``model`` of a ``tokenizer.json``."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": dict(ids),
        "merges": [list(pair) for pair in merges],
    }


def escaping_normalizer(*, add_space_prefix: bool) -> dict[str, Any]:
    """Spaces become U+2581, and one more goes in front of every stretch between special tokens."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    return {"type": "Sequence", "normalizers": [prepend, replace] if add_space_prefix else [replace]}


def metaspace(scheme: str) -> dict[str, Any]:
    """Spaces become U+2581, and one more goes in front: `first` of a text, `always` after a special token.

    A text that begins with a space gets none more, unlike with `escaping_normalizer`.
    """
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


def decoder(*, strip_prefix: bool) -> dict[str, Any]:
    """Tokens back to text."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
