"""An op that is wrong only where a certain number of rows is computed at once."""

from __future__ import annotations

import numpy as np

from driftscope.analysis.explanations.base import SMALLEST_NOISE, Case, Explanation, figure, rounded

_CLEAN = 30.0
"""A prompt is clean whose error is at most this many times its noise, and wrong ..."""

_WRONG = 100.0
"""... if it is this many times the largest of the clean ones."""


def row_count(case: Case) -> Explanation | None:
    """Explain an error that only prompts of some lengths have, while longer ones have none.

    A fault of positions, of a window or of a magnitude that grows spares short prompts, not long ones; a
    kernel for few rows spares the long ones.
    """
    op, batch = case.op, case.batch
    if batch.n_sequences < 2:
        return None
    scores = _scores(case)
    if scores is None:
        return None
    lengths = np.diff(batch.boundaries)
    clean = scores <= _CLEAN
    if clean.all() or not clean.any():
        return None
    wrong = scores > max(_CLEAN, _WRONG * float(scores[clean].max(initial=0.0)))
    counts, spared = set(lengths[wrong].tolist()), set(lengths[clean].tolist())
    if not np.array_equal(wrong, ~clean) or counts & spared or max(counts) > max(spared):
        return None
    before = case.nmse(case.before)
    listed = ", ".join(str(count) for count in sorted(counts))
    return Explanation(
        "row-count",
        f"{case.place}: only prompts of {listed} tokens are wrong, with {figure(float(scores[wrong].min()))} "
        f"times their noise and more; prompts of {', '.join(str(c) for c in sorted(spared))} tokens have "
        f"{figure(float(scores[clean].max()))} times at most.",
        rounded(before),
        rounded(case.nmse(float(_energy(case, clean)))),
        {"wrong_counts": sorted(counts), "clean_counts": sorted(spared), "tap": op.tap},
    )


def _scores(case: Case) -> np.ndarray | None:
    """Error energy of each prompt in units of its noise; None where a prompt has no signal."""
    op = case.op
    engine = case.is_engine
    found, wanted = (op.recorded, op.declared) if engine else (op.exact, op.reference)
    spread = op.predicted.get(case.context.component)
    scores = []
    for index, tokens in enumerate(case.batch.slices):
        if isinstance(found, list | tuple):
            a, b = np.asarray(found[index], np.float64), np.asarray(wanted[index], np.float64)
        else:
            a, b = np.asarray(found[tokens], np.float64), np.asarray(wanted[tokens], np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = a - b
        error = float(np.sum(np.where(np.isfinite(difference), difference**2, 0.0)))
        noise = SMALLEST_NOISE * float(np.sum(np.where(np.isfinite(b), b * b, 0.0)))
        if spread is not None:
            noise = max(noise, float(np.nansum(np.asarray(spread.per_token)[tokens])))
        if noise == 0.0:
            return None
        scores.append(error / noise)
    return np.array(scores)


def _energy(case: Case, prompts: np.ndarray) -> float:
    if case.ragged:
        kept = [i for i, s in enumerate(case.sequences) if prompts[s]]
        return sum(
            float(np.sum(np.where(case.masks[i], case.targets[i] - case.expected_values[i], 0.0) ** 2))
            for i in kept
        )
    sequence = np.searchsorted(case.batch.boundaries, case.tokens, side="right") - 1
    return float(np.sum(case.residual[prompts[sequence]] ** 2))
