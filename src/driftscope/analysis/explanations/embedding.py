"""What can be wrong with the embedding: a multiplier, other rows, another matrix."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from driftscope.analysis.explanations.base import F64, Candidate, Case, rounded

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SHIFTS = (1, -1, 2, -2, 3, -3)


def multiplier(case: Case) -> Iterator[Candidate]:
    """The rows are multiplied by the root of the width, or by its inverse."""
    root = float(case.config.hidden_size) ** 0.5
    for factor, what in ((root, "multiplied by"), (1.0 / root, "divided by")):
        yield Candidate(
            "output-scale",
            f"the embedding is {what} the root of its width, {root:.4g}",
            case.expected * factor,
            0,
            {"ratio": rounded(factor)},
        )


def other_rows(case: Case) -> Iterator[Candidate]:
    """Rows of other tokens: ids off by a constant, or those of the neighbouring token."""
    ids = case.batch.ids[case.tokens].astype(np.int64)
    rows = case.config.vocab_size
    for shift in _SHIFTS:
        yield Candidate(
            "cross-match",
            f"rows are those of the token ids {shift:+d}",
            _rows(case, _EMBEDDING, (ids + shift) % rows),
            1,
            {"shift": shift},
        )
    all_ids = case.batch.ids.astype(np.int64)
    for shift in (1, -1):
        yield Candidate(
            "position-shift",
            f"rows are those of the {'previous' if shift > 0 else 'next'} token",
            _rows(case, _EMBEDDING, np.roll(all_ids, shift)[case.tokens]),
            1,
            {"shift": -shift},
        )


def other_matrix(case: Case) -> Iterator[Candidate]:
    """The LM head's rows are read, or nothing."""
    ids = case.batch.ids[case.tokens].astype(np.int64)
    head = case.artifact.tensors.get(_HEAD)
    if head is not None and head.shape == (case.config.vocab_size, case.config.hidden_size):
        yield Candidate(
            "head-tie", "rows are those of the LM head", _rows(case, _HEAD, ids), 0, {"tensor": _HEAD}
        )
    zero = "the embedding is zero, as if the weights were missing"
    yield Candidate("missing-tensor", zero, np.zeros_like(case.expected), 0, {"tensor": _EMBEDDING})


def transposed(case: Case) -> Iterator[Candidate]:
    """The bytes are read in the transposed layout."""
    rows, columns = case.config.vocab_size, case.config.hidden_size
    ids = case.batch.ids[case.tokens].astype(np.int64)[:16]
    places = ids[:, None] + rows * np.arange(columns)
    needed, back = np.unique(places // columns, return_inverse=True)
    values = case.weight(_EMBEDDING, needed)[back.reshape(places.shape), places % columns]
    yield Candidate(
        "transposed",
        "the bytes of the embedding are read in the transposed layout",
        values.astype(np.float64),
        0,
        {"rows": rows, "columns": columns},
        tokens=np.arange(ids.size),
    )


def one_token(case: Case) -> Iterator[Candidate]:
    """The row of one token alone is wrong."""
    error = np.sum(case.residual * case.residual, axis=1)
    noise = np.maximum(case.floor_per_token, 1e-300)
    score = error / noise
    wrong = np.flatnonzero(score > 8.0 * max(float(np.median(score)), 1.0))
    ids = case.batch.ids[case.tokens]
    tokens = np.unique(ids[wrong])
    if not wrong.size or tokens.size > max(1, np.unique(ids).size // 10):
        return
    channels = np.sum(case.residual[wrong] ** 2, axis=0)
    first, last = int(np.flatnonzero(channels)[0]), int(np.flatnonzero(channels)[-1])
    predicted = case.expected.copy()
    predicted[wrong] = case.target[wrong]
    yield Candidate(
        "corrupt-block",
        f"the row of token {int(tokens[0])} alone is wrong, in channels {first} to {last}",
        predicted,
        2,
        {"row": int(tokens[0]), "rows": [int(t) for t in tokens[:16]], "first": first, "last": last},
        accepted=True,
    )


def _rows(case: Case, name: str, ids: np.ndarray) -> F64:
    return case.weight(name, ids).astype(np.float64) * case.config.embedding_scale


HYPOTHESES = (multiplier, other_rows, other_matrix, transposed, one_token)
