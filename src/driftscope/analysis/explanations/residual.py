"""What can be wrong with the residual stream: a term dropped or doubled, a layer that did not run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from driftscope.analysis.explanations.base import F64, Candidate, Case, figure, rounded
from driftscope.analysis.explanations.norm import Norm, has_input, norm_input
from driftscope.forward.policy import WHOLE_MODEL


def _names(case: Case) -> tuple[str, str]:
    """Taps of the two terms."""
    attended, moved = (
        ("post_attn_norm", "post_ffn_norm") if case.config.post_norms else ("attn_out", "ffn_out")
    )
    if case.op.tap == "post_attn_residual":
        return "layer_input", attended
    return "post_attn_residual", moved


def _terms(case: Case) -> tuple[F64, F64] | None:
    first, second = _names(case)
    if not case.has(second) or not (case.has(first) or has_input(case, first)):
        return None
    return norm_input(case, first), case.value(second).astype(np.float64)


def coefficients(case: Case) -> Iterator[Candidate]:
    """The stream or the block's output is left out, added twice, or added with another factor."""
    terms = _terms(case)
    if terms is None:
        return
    stream, block = terms
    first, second = _names(case)
    skipped = _skips_layer(case)
    for a, b, what in (
        (0.0, 1.0, f"{first} is not added: the residual is dropped"),
        (2.0, 1.0, f"{first} is added twice"),
        (1.0, 0.0, f"{second} is not added"),
        (1.0, 2.0, f"{second} is added twice"),
        (1.0, -1.0, f"{second} is subtracted"),
    ):
        if (a, b) == (1.0, 0.0) and skipped:
            yield Candidate(
                "layer-skipped",
                "the layer gives back its input, as if it did not run",
                stream,
                0,
                {"layer": case.op.layer},
            )
        yield Candidate("residual", what, a * stream + b * block, 0, {first: a, second: b})
    fitted = fit(np.where(case.masks[0], case.target, 0.0), stream, block)
    if fitted is not None:
        a, b = fitted
        rest = [
            ("output-scale", 1.0, _ratio(case.target - stream, block), f"{second} is multiplied by"),
            ("output-scale", _ratio(case.target - block, stream), 1.0, f"{first} is multiplied by"),
        ]
        for class_, left, right, what in rest:
            factor = right if left == 1.0 else left
            yield Candidate(
                class_,
                f"{what} {figure(factor)} before the sum",
                left * stream + right * block,
                2,
                {first: rounded(left), second: rounded(right), "ratio": rounded(factor)},
            )
        yield Candidate(
            "output-scale",
            f"the sum is {figure(a)} times {first} plus {figure(b)} times {second}",
            a * stream + b * block,
            4,
            {first: rounded(a), second: rounded(b)},
        )


def _ratio(found: F64, term: F64) -> float:
    energy = float(np.sum(term * term))
    return float(np.nansum(found * term)) / energy if energy else 0.0


def fit(target: F64, a: F64, b: F64) -> tuple[float, float] | None:
    """Least-squares factors of two terms; None where the terms are parallel."""
    aa, bb, ab = float(np.sum(a * a)), float(np.sum(b * b)), float(np.sum(a * b))
    at, bt = float(np.sum(a * target)), float(np.sum(b * target))
    determinant = aa * bb - ab * ab
    if determinant <= 1e-12 * aa * bb:
        return None
    return (at * bb - bt * ab) / determinant, (bt * aa - at * ab) / determinant


def _skips_layer(case: Case) -> bool:
    """Whether the layer's output, as recorded, is its input."""
    if not has_input(case, "layer_input") or not case.has("post_ffn_residual"):
        if case.op.tap != "post_ffn_residual" or not has_input(case, "layer_input"):
            return False
        output = case.target
    else:
        output = case.value("post_ffn_residual").astype(np.float64)
    return bool(np.array_equal(output, norm_input(case, "layer_input")))


def other_streams(case: Case) -> Iterator[Candidate]:
    """The stream that is added to is another one: before the attention, before the layer."""
    terms = _terms(case)
    if terms is None:
        return
    _, block = terms
    for layer, tap, what in _earlier(case):
        yield Candidate(
            "residual" if layer == case.op.layer else "layer-skipped",
            f"the block's output is added to {what}",
            case.value(tap, layer).astype(np.float64) + block,
            1,
            {"layer": layer, "tap": tap},
        )


def earlier_input(case: Case) -> Iterator[Candidate]:
    """The norm reads an earlier residual stream than it should: what lies between did not run for it."""
    norm = Norm.of(case)
    if norm is None:
        return
    for layer, tap, what in _earlier(case):
        x = case.value(tap, layer).astype(np.float64)
        if x.shape != norm.x.shape:
            continue
        yield Candidate(
            "layer-skipped",
            f"the norm reads {what}: what follows it was left out",
            norm.finish(norm.unit(x=x) * norm.weight),
            1,
            {"layer": layer, "tap": tap},
        )


def _earlier(case: Case) -> Iterator[tuple[int, str, str]]:
    """Residual streams before the op, nearest first, with their names."""
    here = case.config.num_layers if case.op.layer == WHOLE_MODEL else case.op.layer
    places: list[tuple[int, str]] = []
    if case.op.tap in ("ffn_norm", "post_ffn_residual"):
        places.append((here - 1, "post_ffn_residual"))
    for layer in range(here - 1, -1, -1):
        places += [(layer, "post_attn_residual"), (layer - 1, "post_ffn_residual")]
    for layer, tap in places:
        place = (layer, tap) if layer >= 0 else (WHOLE_MODEL, "embedding")
        if case.context.trace.has(*place):
            yield *place, "the embedding" if layer < 0 else f"layers.{layer}.{tap}"


HYPOTHESES = (coefficients, other_streams)
EARLIER = (earlier_input,)
