"""Logits of a case's models over its prompts, and how two sets of them differ, position by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, parameter
from driftscope.forward.batch import TokenBatch
from driftscope.forward.policy import Choice, Policy

if TYPE_CHECKING:
    from driftscope.artifacts.model import Artifact
    from driftscope.artifacts.tokenizers.tokenizer import Tokenizer

F32 = NDArray[np.float32]

PROMPTS = "prompts.json"


def manifest(role: str) -> str:
    """Manifest of a model of the case."""
    return f"models/{role}.json"


def missing(names: list[str], evidence: EvidenceReader) -> dict[str, Any] | None:
    """Return what a measurement returns where evidence is not there, or None."""
    absent = [name for name in names if not evidence.has(name)]
    if not absent:
        return None
    return {"status": "not-run", "reason": f"{', '.join(absent)} is not there"}


def finite(*logits: F32) -> bool:
    """Say whether all logits are finite: where one is not, no position can be compared."""
    return all(bool(np.isfinite(array).all()) for array in logits)


def tokenizer_of(artifact: Artifact) -> Tokenizer | None:
    """Return a model's tokenizer; None where it carries none that can be used, which a model need not."""
    from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer

    try:
        return load_tokenizer(artifact)
    except InputError:
        return None


def policy_of(path: str) -> Policy:
    """Policy of a path such as ``candidate.int8-dot``: the role of any model, and the arithmetic."""
    role, _, arithmetic = path.partition(".")
    return Policy(Choice(role, arithmetic))


def prompt_batch(parameters: Mapping[str, Any], evidence: EvidenceReader) -> TokenBatch:
    """Return the traced prompts of the case, and of its first text as many tokens as `text_tokens` says."""
    document = evidence.document(PROMPTS)
    most = parameter(parameters, "text_tokens", int, least=0)
    sequences = [list(prompt["ids"]) for prompt in document.get("trace", [])]
    sequences += [list(prompt["ids"][:most]) for prompt in document.get("texts", [])[:1] if most]
    if not sequences:
        raise InputError(f"{PROMPTS}: there is no prompt")
    return TokenBatch.of(sequences)


@dataclass(frozen=True, eq=False)
class Difference:
    """Two sets of logits, position by position; all arrays are of length n_positions.

    Attributes:
        cosine: of the logits as they are.
        centred_cosine: of the logits with their mean taken off, which a softmax does not see.
        error: norm of the centred difference over the norm of the centred logits of a.
        noise: standard deviation over the vocabulary of the difference, in logits.
        same_argmax: whether both have the same largest logit; of equal ones the first.
        margin_a: largest logit of a over its second.
        margin_b: the same of b.
        movement: where the argmax differs, how far the two tokens moved against each other, in logits:
            the lead of a's token over b's in a, plus the lead of b's over a's in b. Else 0.
        differing: values that differ in a bit.
    """

    cosine: F64
    centred_cosine: F64
    error: F64
    noise: F64
    same_argmax: NDArray[np.bool_]
    margin_a: F64
    margin_b: F64
    movement: F64
    differing: NDArray[np.int64]


def difference(a: F32, b: F32) -> Difference:
    """Compare ``float32[n_positions, vocabulary]`` with another of the same shape, in float64."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    centred_a = wide_a - wide_a.mean(axis=1, keepdims=True)
    centred_b = wide_b - wide_b.mean(axis=1, keepdims=True)
    apart = centred_a - centred_b
    rows = np.arange(len(a))
    top_a, top_b = a.argmax(axis=1), b.argmax(axis=1)
    moved = (wide_a[rows, top_a] - wide_a[rows, top_b]) + (wide_b[rows, top_b] - wide_b[rows, top_a])
    size = np.square(centred_a).sum(axis=1)
    return Difference(
        cosine=_cosine(wide_a, wide_b),
        centred_cosine=_cosine(centred_a, centred_b),
        error=np.sqrt(np.square(apart).sum(axis=1) / size),
        noise=np.sqrt(np.square(apart).mean(axis=1)),
        same_argmax=top_a == top_b,
        margin_a=_margin(wide_a),
        margin_b=_margin(wide_b),
        movement=moved,
        differing=(a.view(np.uint32) != b.view(np.uint32)).sum(axis=1),
    )


def _cosine(a: F64, b: F64) -> F64:
    if np.array_equal(a, b):
        return np.ones(len(a))
    found: F64 = (a * b).sum(axis=1) / np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))
    return np.where((a == b).all(axis=1), 1.0, found)


def _margin(logits: F64) -> F64:
    two = np.partition(logits, -2, axis=1)[:, -2:]
    margin: F64 = two[:, 1] - two[:, 0]
    return margin
