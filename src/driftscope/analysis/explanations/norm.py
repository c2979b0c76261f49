"""What can be wrong with an RMSNorm: its weight, its epsilon, a mean taken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from driftscope.analysis.explanations.base import F64, Candidate, Case, rounded
from driftscope.forward.architecture import norm_tensor
from driftscope.forward.policy import WHOLE_MODEL

_INPUTS = {
    "attn_norm": "layer_input",
    "post_attn_norm": "attn_out",
    "ffn_norm": "post_attn_residual",
    "post_ffn_norm": "ffn_out",
    "final_norm": "layer_input",
}
_SUFFIXES = (
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
)
_ROUND_EPSILONS = (*(float(f"1e-{power}") for power in range(3, 13)), 0.0)

Finish = Callable[[F64], F64]


@dataclass(frozen=True)
class Norm:
    """An RMSNorm and what comes after it.

    Attributes:
        case: the case.
        name: canonical name of its weight.
        x: its input as rows of one norm each, ``float64[rows, channels]``.
        finish: makes the op's output of the norm's, e.g. turns it; linear.
        target: what the norm gave, as far as it can be told from the op's output, in the shape of `x`.
        eps: what is added to the mean square.
    """

    case: Case
    name: str
    x: F64
    finish: Finish
    target: F64
    eps: float

    @classmethod
    def of(cls, case: Case) -> Norm | None:
        """The norm that an op is, or None where it is none or its input cannot be had."""
        tap, layer = case.op.tap, case.op.layer
        if tap not in _INPUTS or not has_input(case, _INPUTS[tap]):
            return None
        name = norm_tensor(case.config, layer, tap)
        if not case.has_tensor(name):
            return None
        x = norm_input(case, _INPUTS[tap])
        return cls(case, name, x, lambda y: y, case.target, case.config.rms_norm_eps)

    @property
    def weight(self) -> F64:
        """What it multiplies by."""
        return self.case.norm_weight(self.name)

    @property
    def mean_square(self) -> F64:
        """Mean square of each row, ``float64[rows, 1]``."""
        return np.asarray(np.mean(self.x * self.x, axis=1, keepdims=True))

    def unit(self, eps: float | None = None, x: F64 | None = None) -> F64:
        """The rows over their root mean square."""
        rows = self.x if x is None else x
        square = np.mean(rows * rows, axis=1, keepdims=True) + (self.eps if eps is None else eps)
        return rows / np.sqrt(np.where(square > 0, square, 1.0))


def has_input(case: Case, tap: str) -> bool:
    """Whether a norm's input can be had."""
    if tap in case.op.inputs:
        return True
    return tap == "layer_input" and _layer_input_place(case) is not None


def norm_input(case: Case, tap: str) -> F64:
    """A norm's input, ``float64[tokens, channels]``."""
    if tap in case.op.inputs:
        return case.value(tap).astype(np.float64)
    place = _layer_input_place(case)
    assert place is not None
    return case.value(place[1], place[0]).astype(np.float64)


def _layer_input_place(case: Case) -> tuple[int, str] | None:
    layer = case.config.num_layers if case.op.layer == WHOLE_MODEL else case.op.layer
    place = (WHOLE_MODEL, "embedding") if layer == 0 else (layer - 1, "post_ffn_residual")
    return place if case.context.trace.has(*place) else None


def weight_offset(case: Case) -> Iterator[Candidate]:
    """A constant is added to the weight: the one of (1 + weight), left out or applied twice."""
    if norm := Norm.of(case):
        yield from offsets(norm)


def offsets(norm: Norm) -> Iterator[Candidate]:
    """Candidates for a constant added to a norm's weight."""
    unit, weight = norm.unit(), norm.weight
    plain = unit * weight
    finite = np.isfinite(norm.target)
    difference = np.where(finite, norm.target - plain, 0.0)
    energy = float(np.sum(np.where(finite, unit * unit, 0.0)))
    fitted = float(np.sum(difference * unit)) / energy if energy else 0.0
    for offset, complexity in ((1.0, 0), (-1.0, 0), (fitted, 2)):
        if offset:
            yield Candidate(
                "norm-offset",
                f"the norm's weight is off by {offset:+.4g}",
                norm.finish(unit * (weight + offset)),
                complexity,
                {"offset": rounded(offset), "tensor": norm.name},
            )


def other_epsilon(case: Case) -> Iterator[Candidate]:
    """Another epsilon under the root, or one added to the root."""
    if norm := Norm.of(case):
        yield from epsilons(norm)


def epsilons(norm: Norm) -> Iterator[Candidate]:
    """Candidates for another epsilon of a norm."""
    shaped = norm.unit(0.0) * norm.weight
    finite = np.isfinite(norm.target)
    energy = np.sum(np.where(finite, shaped * shaped, 0.0), axis=1)
    overlap = np.sum(np.where(finite, norm.target * shaped, 0.0), axis=1)
    gain = np.where(energy > 0, overlap / np.where(energy > 0, energy, 1.0), 0.0)
    square = norm.mean_square[:, 0]
    usable = (gain > 0) & (square > 0) & (energy > 0)
    if not usable.any():
        return
    gain, square = gain[usable], square[usable]
    # gain^-2 = 1 + eps / ms, by least squares over the rows, where the row's own noise is relative.
    inverse = 1.0 / square
    fitted = float(np.sum((gain**-2 - 1.0) * inverse) / np.sum(inverse * inverse))
    outside = float(np.sum((1.0 / gain - 1.0) * inverse**0.5) / np.sum(inverse))
    tried = dict.fromkeys(_ROUND_EPSILONS, 0)
    tried |= {norm.eps * factor: 0 for factor in (10.0, 0.1, 100.0, 0.01)}
    if fitted > 0:
        tried.setdefault(fitted, 1)
    for eps, complexity in tried.items():
        if eps != norm.eps:
            yield Candidate(
                "norm-eps",
                f"the norm's eps is {eps:.4g} instead of {norm.eps:.4g}",
                norm.finish(norm.unit(eps) * norm.weight),
                complexity,
                {"eps": rounded(eps), "expected_eps": norm.eps, "fitted_eps": rounded(fitted)},
            )
    for eps, complexity in ((norm.eps, 0), (outside, 2)):
        if eps > 0:
            root = np.sqrt(norm.mean_square)
            yield Candidate(
                "norm-eps",
                f"an eps of {eps:.4g} is added to the root mean square instead of the mean square",
                norm.finish(norm.x / (root + eps) * norm.weight),
                complexity + 1,
                {"eps": rounded(eps), "expected_eps": norm.eps, "outside_root": True},
            )


def weight_missing(case: Case) -> Iterator[Candidate]:
    """No weight, no norm, or nothing."""
    if norm := Norm.of(case):
        yield from missing(norm)


def missing(norm: Norm) -> Iterator[Candidate]:
    """Candidates for a norm without a weight or without a division, and for one that gives zero."""
    for what, predicted in (
        ("the norm's weight is not applied, as if it were missing", norm.unit()),
        ("the norm does not divide: weight times input", norm.x * norm.weight),
        ("the norm is left out", norm.x),
        ("the output is zero, as if the weight were zero", np.zeros_like(norm.x)),
    ):
        yield Candidate("missing-tensor", what, norm.finish(predicted), 0, {"tensor": norm.name})


def mean_subtracted(case: Case) -> Iterator[Candidate]:
    """LayerNorm instead of RMSNorm."""
    if norm := Norm.of(case):
        centred = norm.x - norm.x.mean(axis=1, keepdims=True)
        yield Candidate(
            "norm-mean",
            "the mean is taken off first: LayerNorm instead of RMSNorm",
            norm.finish(norm.unit(x=centred) * norm.weight),
            0,
            {},
        )


def other_weight(case: Case) -> Iterator[Candidate]:
    """The weight is that of another norm."""
    norm = Norm.of(case)
    if norm is None:
        return
    unit = norm.unit()
    names = ["model.norm.weight"]
    for layer in range(case.config.num_layers):
        names += [f"model.layers.{layer}.{suffix}" for suffix in _SUFFIXES]
    for name in names:
        if name == norm.name or not case.has_tensor(name):
            continue
        weight = case.norm_weight(name)
        if weight.size != unit.shape[1]:
            continue
        same_layer = name.startswith(f"model.layers.{case.op.layer}.")
        yield Candidate(
            "cross-match" if same_layer else "other-layer",
            f"the norm's weight is {name}",
            norm.finish(unit * weight),
            1,
            {"tensor": name},
        )


HYPOTHESES = (weight_offset, other_epsilon, weight_missing, mean_subtracted, other_weight)
