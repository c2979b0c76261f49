"""Which hypotheses are tried on which op, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from driftscope.analysis.explanations import (
    activation,
    attention,
    blocks,
    embedding,
    general,
    norm,
    projection,
    residual,
    rope,
)
from driftscope.analysis.explanations.base import (
    Candidate,
    Case,
    Context,
    Energies,
    Explanation,
    Replayed,
    figure,
    rounded,
)
from driftscope.analysis.explanations.localise import localise
from driftscope.analysis.explanations.not_finite import not_finite
from driftscope.analysis.explanations.row_count import row_count

Hypothesis = Callable[[Case], Iterable[Candidate]]

_PROJECTION: tuple[Hypothesis, ...] = (*projection.HYPOTHESES, *blocks.HYPOTHESES, *general.HYPOTHESES)
_NORM: tuple[Hypothesis, ...] = (*norm.HYPOTHESES, *residual.EARLIER, *general.HYPOTHESES)
_ROPE: tuple[Hypothesis, ...] = (*rope.HYPOTHESES, *general.HYPOTHESES)

HYPOTHESES: Mapping[str, tuple[Hypothesis, ...]] = {
    "embedding": (*embedding.HYPOTHESES, *general.HYPOTHESES),
    "attn_norm": _NORM,
    "post_attn_norm": _NORM,
    "ffn_norm": _NORM,
    "post_ffn_norm": _NORM,
    "final_norm": _NORM,
    "qkv_matmul": _PROJECTION,
    "qkv_bias": _PROJECTION,
    "q_post_rope": _ROPE,
    "k_post_rope": _ROPE,
    "attn_scores": attention.SCORES,
    "attn_softmax": attention.SOFTMAX,
    "attention": attention.OUTPUT,
    "attn_out": _PROJECTION,
    "post_attn_residual": (*residual.HYPOTHESES, *general.HYPOTHESES),
    "ffn_gate": _PROJECTION,
    "ffn_up": _PROJECTION,
    "ffn_silu": (*activation.HYPOTHESES, *general.HYPOTHESES),
    "ffn_swiglu": (*activation.HYPOTHESES, *general.HYPOTHESES),
    "ffn_out": _PROJECTION,
    "post_ffn_residual": (*residual.HYPOTHESES, *general.HYPOTHESES),
    "lm_head": _PROJECTION,
}
"""Tap to its hypotheses; of two that explain as much with as little the earlier holds."""

NOISE_FACTOR = 10.0
"""What is left may be this many times the predicted noise: predictions hold to within a few times."""

LEFT = 0.01
"""Or this share of the error's energy."""

AS_GOOD = 3.0
"""Two hypotheses whose rests are within this factor explain as much."""


def explain(op: Replayed, context: Context, *, limit: int = 5) -> list[Explanation]:
    """Say what a flagged op does wrong.

    Each hypothesis computes the op again under one fault, from the inputs that were recorded. One holds if
    the error that is left is that of the arithmetic, or a hundredth of what there was; of those that leave as
    little the one that assumes least comes first.

    Args:
        op: the op.
        context: where it comes from, with the component that was flagged.
        limit: explanations to give at most.

    Returns:
        Best first; never empty. Where nothing explains the error, one of class ``unexplained`` that says
        where it lies.
    """
    case = Case(op, context)
    if broken := not_finite(case):
        return [broken]
    candidates = [candidate for hypothesis in HYPOTHESES.get(op.tap, ()) for candidate in hypothesis(case)]
    found = choose(case, candidates)
    if some_prompts := row_count(case):
        # What explains the sound prompts as well as the wrong ones is the better answer.
        whole = [item for item in found if item.residual_after <= NOISE_FACTOR * item.evidence["noise"]]
        found = [*whole, some_prompts]
    return found[:limit] or [_unexplained(case)]


def choose(case: Case, candidates: Iterable[Candidate]) -> list[Explanation]:
    """Those candidates that hold, best first."""
    held = []
    for order, candidate in enumerate(candidates):
        found = case.energies(candidate)
        if found.before <= found.floor and candidate.accepted is None:
            continue
        limit = max(NOISE_FACTOR * found.floor, LEFT * found.before)
        holds = found.left <= limit and found.left <= found.before / 2
        if holds if candidate.accepted is None else candidate.accepted:
            held.append((found.nmse(found.left), candidate.complexity, order, candidate, found))
    if not held:
        return []
    least = min((left for left, _, _, candidate, _ in held if candidate.accepted is None), default=0.0)

    def rank(item: tuple[float, int, int, Candidate, Energies]) -> tuple[bool, bool, float, float, int]:
        left, complexity, order, candidate, found = item
        # One that has judged itself does not say what is left: it comes after those that do.
        last = candidate.accepted is not None
        far = left > max(AS_GOOD * least, NOISE_FACTOR * found.nmse(found.floor))
        return (last, far, left, complexity, order) if far else (last, far, complexity, left, order)

    return [_explanation(case, candidate, found) for *_, candidate, found in sorted(held, key=rank)]


def _explanation(case: Case, candidate: Candidate, found: Energies) -> Explanation:
    before, after, floor = (found.nmse(energy) for energy in (found.before, found.left, found.floor))
    return Explanation(
        candidate.class_,
        f"{case.place}: {candidate.what}. NMSE {figure(before)} becomes {figure(after)} "
        f"(noise {figure(floor)}).",
        rounded(before),
        rounded(after),
        {**candidate.evidence, "noise": rounded(floor)},
    )


def _unexplained(case: Case) -> Explanation:
    found = Energies(case.signal, case.before, case.before, case.floor)
    before = found.nmse(found.before)
    places = localise(case.op, case.context)
    reason = f"no hypothesis explains the error of NMSE {figure(before)}"
    if found.before <= found.floor:
        reason = f"the error of NMSE {figure(before)} is no more than noise"
    return Explanation(
        "unexplained",
        f"{case.place}: {reason}. {places['sentence']}",
        rounded(before),
        rounded(before),
        {"where": places, "noise": rounded(found.nmse(found.floor))},
    )
