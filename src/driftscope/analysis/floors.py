"""Noise floors: how far from its prediction the error of a clean op strays, and how rare a given error is.

A replay gives each op a score, the decimal logarithm of its measured error energy over the energy that theory
predicts. On clean engines the score is not 0: other orders of a sum, other exponentials and other quantizers
spread it. A floor is a normal model of the clean scores of one kind of op, fitted to calibration runs.

The model. The clean scores ``s`` of a cell (kind, component, statistic) are taken to be

    s = location + slope * e(size) + spread * N(0, 1),

with ``slope`` for the maxima alone: ``score_token`` is the worst of as many tokens as there are,
``score_channel`` that of as many channels, and ``e(size)`` is the expected largest of so many standard
normals in Blom's approximation (G. Blom, "Statistical Estimates and Transformed Beta-Variables", 1958),
which grows with the root of twice the logarithm of the size. The location, slope and squared spread have
the conjugate prior (normal, scaled inverse chi square), so the next score has a Student t as its
distribution (A. Gelman et al., "Bayesian Data Analysis", 3rd edition, sections 3.3 and 14.2). Its tail is
honest about little data in three ways: the degrees of freedom count calibration *runs*, since the ops of
one run share an order of summation and a format and tell the same story; the spread is wider by the
uncertainty of location and slope, the more so the further a size lies from those of the calibration; and
far out, where corrected thresholds lie, a t is much larger than a normal. Within a run an energy is close
to a multiple of chi square, whose logarithm has a *lighter* upper tail than a normal, and the orders
between runs are bounded, so the t errs towards fewer flags.

Only the upper tail is a reason to doubt: weights that lie on a coarser lattice already, or a kernel with a
better sum, leave less than is predicted.

A kind with fewer than `MIN_RUNS` runs takes the floor of all ops of its arithmetic (``any f32``); where that
has too few as well it takes `DEFAULTS`, a wide t around what theory says, and the document says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from driftscope.engines.trace import RAGGED
from driftscope.errors import InputError
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.policy import WHOLE_MODEL

FORMAT, VERSION = "driftscope-floors", 1

COMPONENTS = ("engine", "model")
"""Components that are judged; the price of the declared arithmetic is reported and never a fault."""

STATISTICS = ("score", "score_token", "score_channel")

OP_KINDS: Mapping[str, str] = {
    "embedding": "embedding",
    "attn_norm": "norm",
    "qkv_matmul": "matmul",
    "qkv_bias": "bias",
    "q_post_rope": "rope",
    "k_post_rope": "rope",
    "attn_scores": "scores",
    "attn_softmax": "softmax",
    "attention": "attention",
    "attn_out": "matmul",
    "post_attn_norm": "norm",
    "post_attn_residual": "residual",
    "ffn_norm": "norm",
    "ffn_gate": "matmul",
    "ffn_up": "matmul",
    "ffn_silu": "silu",
    "ffn_swiglu": "product",
    "ffn_out": "matmul",
    "post_ffn_norm": "norm",
    "post_ffn_residual": "residual",
    "final_norm": "norm",
    "lm_head": "matmul",
}
"""Kind of each tap's op, in topological order."""

_SITES = {"attn_out": "o", "ffn_gate": "gate", "ffn_up": "up", "ffn_out": "down", "lm_head": "lm_head"}
_READ_KEYS_OR_VALUES = ("attn_scores", "attention")
_WEIGHTED = ("embedding", "norm", "bias", "matmul")
_DERIVED = "derived"
_ANY = "any"

_THROUGH_PRODUCTS = frozenset(
    {
        *("layer_input", "qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope", "attention", "attn_out"),
        *("post_attn_residual", "ffn_gate", "ffn_up", "ffn_out"),
    }
)
"""Taps that come from a product with weights; an activation before it may be quantized to small integers."""

_FLIPPING = "int8-dot recomputed"
"""Kinds that are not fitted: an integer that falls to the other side is rare and large, see `DEFAULTS`."""

UNKNOWN = "unknown"
"""Arithmetic of an op of which nobody knows it: the floor that allows most of all that fit holds."""

MIN_RUNS = 8
"""Runs below which a cell is not fitted."""

LOWEST = -1.0
"""Scores below a tenth of the prediction are fitted as this. Where errors are rare flips, many ops have none;
how far below the prediction they then lie says nothing about the upper tail, and would only widen it."""

NOTHING = 0.0
"""What is fitted where nothing was measured and something predicted: the prediction itself, which leans to
fewer flags than what was seen would allow. Sums and products of two values are mostly so, on every engine."""

EXACT = 1e-22
"""NMSE below which an error that is predicted to be none at all counts as none: float64's own rounding."""


@dataclass(frozen=True)
class Prior:
    """What is taken to hold of a cell before any run: a t in decades around a location.

    Attributes:
        location: of the score; 0 is the prediction itself.
        slope: of the maxima: decades by which one token or channel spreads around its op.
        spread: of the score, decades.
        degrees: degrees of freedom of the t.
    """

    location: float
    slope: float
    spread: float
    degrees: float


DEFAULTS: Mapping[str, Prior] = {
    "engine": Prior(1.0, 0.3, 1.0, 30.0),
    "engine/recomputed": Prior(3.0, 0.3, 1.0, 30.0),
    "model": Prior(0.0, 0.3, 0.4, 30.0),
}
"""Floors without calibration.

``engine``: the prediction is that of independent roundings; n of them in one running sum give up to n / 6
times that energy in the mean (each partial sum is rounded, and partial sums grow), a decade for 64 terms
and 3.5 for 19000, and worse is rare (N. Higham and T. Mary, "A new approach to probabilistic rounding error
analysis", SIAM J. Sci. Comput. 41, 2019). ``recomputed``: an input that was itself recomputed may fall on
another side of a rounding step. ``model``: storing weights costs 0.74 to 1.36 times what the formats' steps
predict (`driftscope.kernels.expected_error`), so 0.4 decades are three times the largest of it."""

_PRIOR_RUNS = 2.0
"""Weight of the prior spread in a fitted cell, in runs."""

_PRIOR_SPREAD = {"engine": 0.5, "model": 0.15}

TRANSFER: Mapping[str, float] = {
    "engine": 0.2,
    "engine/narrow": 0.6,
    "model": 0.12,
    "model/single-weights": 0.3,
}
"""Decades that are added to a fitted spread, in quadrature: real models are not random ones. Most for sums
whose outputs are of a narrow dtype: how many of them fall to the other neighbour hangs on their number. A
channel of the embedding is one weight a token, and a quantizer that clips a weight leaves it off by more than
a step."""

_SUMS = ("norm", "matmul", "scores", "softmax", "attention", _ANY)

_PRIOR_PRECISION = (1e-2, 1.0)
"""Of location and slope, in units of the squared spread: the slope is drawn to 0, the location hardly."""


def arithmetic_class(arithmetic: Arithmetic | None, layer: int, tap: str, part: str = "") -> str:
    """The arithmetic of one op as floors tell it apart: f32, int8-dot, kv-f16, narrow (f16 and bf16)."""
    if arithmetic is None:
        return UNKNOWN
    if arithmetic.dtype != "f32":
        return "narrow"
    policy = arithmetic.policy
    if tap in _READ_KEYS_OR_VALUES:
        return "kv-f16" if policy.kv_type == "f16" else "f32"
    site = part if tap == "qkv_matmul" else _SITES.get(tap, "")
    if not site:
        # qkv_matmul in one piece: its three sites may differ.
        site = "q" if tap == "qkv_matmul" else ""
    if not site:
        return "f32"
    choice = policy.choice(WHOLE_MODEL if tap == "lm_head" else layer, site)
    rounded = choice.path == "int8-dot" or choice.activation not in (None, "none")
    return "int8-dot" if rounded else "f32"


def kind_of(row: Mapping[str, Any], arithmetic: Arithmetic | None) -> str:
    """The kind of a row of the ``replay`` table, e.g. ``matmul int8-dot`` or ``norm f32 recomputed``.

    The model component is computed in float64 from stored weights, so its kinds know no arithmetic:
    ``matmul``, ``norm``, ``bias`` and ``embedding`` read weights, what comes of recomputed inputs is
    ``derived``.

    Raises:
        InputError: no such tap.
    """
    tap = row["tap"]
    if tap not in OP_KINDS:
        raise InputError(f"replay: tap {tap!r} is unknown; expected one of {', '.join(OP_KINDS)}")
    kind = OP_KINDS[tap]
    if row["component"] == "model":
        return kind if kind in _WEIGHTED and not row["recomputed"] else _DERIVED
    computed = arithmetic_class(arithmetic, row["layer"], tap, row["part"])
    if not row["recomputed"]:
        return f"{kind} {computed}"
    if arithmetic is not None and computed in ("f32", "kv-f16"):
        through_products = not _THROUGH_PRODUCTS.isdisjoint(row["recomputed"].split("+"))
        if through_products and arithmetic.policy.base.path == "int8-dot":
            computed = "int8-dot"
    return f"{kind} {computed} recomputed"


def statistics_of(row: Mapping[str, Any], arithmetic: Arithmetic | None) -> tuple[str, ...]:
    """The statistics that a row is tested in; none where its component is not judged.

    Channels are not judged one by one in two cases. What a recomputed input passes on is predicted token by
    token, but spread evenly over channels. And where outputs are rounded to a narrow dtype, a last bit of
    float32 makes one in thousands of them fall to the other neighbour: a channel of few tokens has none of
    these or far more than its share.
    """
    if row["component"] not in COMPONENTS:
        return ()
    narrow = row["component"] == "engine" and arithmetic is not None and arithmetic.dtype != "f32"
    return STATISTICS[:2] if row["recomputed"] or narrow else STATISTICS


def size_of(row: Mapping[str, Any], statistic: str) -> int:
    """How many values a statistic of a row is the largest of: tokens, channels or heads, or 1."""
    tokens = max(1, int(row["token_count"]))
    if statistic == "score_token":
        return tokens
    if statistic == "score_channel":
        return max(1, int(row["count"]) // (tokens * tokens if row["tap"] in RAGGED else tokens))
    return 1


def expected_maximum(size: int) -> float:
    """Blom's approximation of the expected largest of `size` independent standard normals; 0 for one."""
    from scipy.special import ndtri

    return 0.0 if size <= 1 else float(ndtri((size - 0.375) / (size + 0.25)))


@dataclass(frozen=True)
class Cell:
    """The floor of one kind of op, component and statistic: the t of the next clean score.

    Attributes:
        location: in decades, at size 1.
        slope: decades per unit of `expected_maximum`; 0 for the pooled score.
        spread: decades.
        degrees: degrees of freedom.
        covariance: of location and slope, in units of the squared spread: (location, both, slope).
        count: clean scores it was fitted to.
        runs: runs that they came from.
    """

    location: float
    slope: float
    spread: float
    degrees: float
    covariance: tuple[float, float, float]
    count: int
    runs: int

    def tail(self, score: float, size: int = 1) -> float:
        """Probability that a clean score of this size is as large or larger."""
        from scipy.special import stdtr

        e = expected_maximum(size)
        a, b, c = self.covariance
        scale = self.spread * math.sqrt(1.0 + a + 2.0 * b * e + c * e * e)
        return float(stdtr(self.degrees, -(score - self.location - self.slope * e) / scale))

    def threshold(self, probability: float, size: int = 1) -> float:
        """The score whose tail is `probability`: the inverse of `tail`."""
        from scipy.special import stdtrit

        e = expected_maximum(size)
        a, b, c = self.covariance
        scale = self.spread * math.sqrt(1.0 + a + 2.0 * b * e + c * e * e)
        return self.location + self.slope * e - scale * float(stdtrit(self.degrees, probability))

    @classmethod
    def of_prior(cls, prior: Prior, *, maximum: bool) -> Cell:
        """The floor where nothing was calibrated."""
        slope = prior.slope if maximum else 0.0
        return cls(prior.location, slope, prior.spread, prior.degrees, (0.0, 0.0, 0.0), 0, 0)

    @classmethod
    def fit(
        cls,
        scores: Sequence[float],
        sizes: Sequence[int],
        runs: Sequence[str],
        *,
        prior_spread: float,
        maximum: bool,
        prior_runs: float = _PRIOR_RUNS,
        transfer: float = 0.0,
    ) -> Cell:
        """Fit a floor.

        Every run has the same weight, whatever the number of its scores.

        Args:
            scores: clean scores, finite.
            sizes: of each, `size_of`.
            runs: of each, the run it came from.
            prior_spread: decades.
            maximum: whether the score is a largest of `sizes` values; else there is no slope.
            prior_runs: runs that the prior spread counts for.
            transfer: decades that the spread is widened by, in quadrature.
        """
        names, index = np.unique(np.array(runs), return_inverse=True)
        weight = 1.0 / np.bincount(index)[index]
        y = np.array(scores, dtype=np.float64)
        maxima = {size: expected_maximum(size) for size in set(sizes)}
        e = np.array([maxima[size] for size in sizes])
        center = float(np.sum(weight * y) / np.sum(weight))
        precision = _PRIOR_PRECISION
        n, se, see = float(names.size), float(np.sum(weight * e)), float(np.sum(weight * e * e))
        sy, sey = float(np.sum(weight * (y - center))), float(np.sum(weight * e * (y - center)))
        if not maximum:
            n_total = n + precision[0]
            at, slope, covariance = sy / n_total, 0.0, (1.0 / n_total, 0.0, 0.0)
        else:
            p, q, r = n + precision[0], se, see + precision[1]
            determinant = p * r - q * q
            at, slope = (r * sy - q * sey) / determinant, (p * sey - q * sy) / determinant
            covariance = (r / determinant, -q / determinant, p / determinant)
        residual = y - center - at - slope * e
        squares = float(np.sum(weight * residual * residual))
        squares += precision[0] * at * at + precision[1] * slope * slope
        degrees = n + prior_runs - (2.0 if maximum else 1.0)
        variance = (prior_runs * prior_spread**2 + squares) / degrees
        spread = math.sqrt(variance + transfer**2)
        return cls(center + at, slope, spread, degrees, covariance, int(y.size), int(names.size))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "location": self.location,
            "slope": self.slope,
            "spread": self.spread,
            "degrees": self.degrees,
            "covariance": list(self.covariance),
            "count": self.count,
            "runs": self.runs,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Cell:
        """The inverse of `to_dict`."""
        a, b, c = (float(value) for value in document["covariance"])
        numbers = {key: float(document[key]) for key in ("location", "slope", "spread", "degrees")}
        if not all(map(math.isfinite, (*numbers.values(), a, b, c))) or numbers["spread"] <= 0:
            raise ValueError("a number is not finite or a spread not positive")
        return cls(**numbers, covariance=(a, b, c), count=int(document["count"]), runs=int(document["runs"]))


@dataclass(frozen=True)
class Floors:
    """The floors of all kinds of ops.

    Attributes:
        cells: (kind, component, statistic) to its floor, of what was calibrated.
        calibration: what the runs were, and the false-alarm rate on those that were held out.
    """

    cells: Mapping[tuple[str, str, str], Cell]
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        rows: Iterable[tuple[str, Mapping[str, Any], Arithmetic | None]],
        calibration: Mapping[str, Any] | None = None,
    ) -> Floors:
        """Fit floors to clean rows.

        Args:
            rows: run, row of the ``replay`` table, and the arithmetic that the run declared. Where an error
                was predicted and none measured, the score counts as `NOTHING`.
            calibration: what the runs were, for the document.
        """
        found: dict[tuple[str, str, str], list[tuple[float, int, str]]] = {}
        for run, row, arithmetic in rows:
            statistics = statistics_of(row, arithmetic)
            kind = kind_of(row, arithmetic)
            if kind.endswith(_FLIPPING):
                continue
            for statistic in statistics:
                score = row[statistic]
                if score is None and row["energy"] == 0 and row["predicted_energy"] > 0:
                    score = NOTHING
                if score is not None and math.isfinite(score):
                    for name in dict.fromkeys((kind, _of_any_op(kind, row["component"]))):
                        key = (name, row["component"], statistic)
                        value = max(score, LOWEST)
                        found.setdefault(key, []).append((value, size_of(row, statistic), run))
        cells = {}
        for key, values in sorted(found.items()):
            scores, sizes, runs = zip(*values, strict=True)
            if len(set(runs)) >= MIN_RUNS:
                cells[key] = Cell.fit(
                    scores,
                    sizes,
                    runs,
                    prior_spread=_PRIOR_SPREAD[key[1]],
                    transfer=TRANSFER[_transfer(*key)],
                    maximum=key[2] != "score",
                )
        return cls(cells, dict(calibration or {}))

    def cells_for(self, kind: str, component: str, statistic: str) -> list[Cell]:
        """The floors that a kind is judged by: its own, that of all ops of its arithmetic, or the default.

        An ``unknown`` arithmetic has those of every arithmetic; it is judged by the one that allows most.
        """
        op, _, rest = kind.partition(" ")
        if component == "engine" and rest.split(" ")[0] == UNKNOWN:
            recomputed = kind.endswith(" recomputed")
            cells = [
                cell
                for (other, of, what), cell in self.cells.items()
                if (of, what) == (component, statistic)
                and other.partition(" ")[0] == op
                and other.endswith(" recomputed") <= recomputed
            ]
        else:
            own = self.cells.get((kind, component, statistic))
            own = own or self.cells.get((_of_any_op(kind, component), component, statistic))
            cells = [] if own is None else [own]
        default = DEFAULTS[_default(kind, component)]
        return cells or [Cell.of_prior(default, maximum=statistic != "score")]

    def tail_probabilities(
        self, row: Mapping[str, Any], arithmetic: Arithmetic | None = None
    ) -> dict[str, float]:
        """For each statistic the probability that a clean op scores as high or higher.

        1 where nothing was measured; 0 where an error was found although none at all is predicted (same bytes
        of weights, but another result). Not of the ``arithmetic`` component, which has no floor: empty.
        """
        statistics, kind = statistics_of(row, arithmetic), kind_of(row, arithmetic)
        found = {}
        for statistic in statistics:
            score = row[statistic]
            if score is None:
                found[statistic] = 0.0 if _unpredicted(row) else 1.0
                continue
            size = size_of(row, statistic)
            cells = self.cells_for(kind, row["component"], statistic)
            found[statistic] = max(cell.tail(score, size) for cell in cells)
        return found

    def tail_probability(self, row: Mapping[str, Any], arithmetic: Arithmetic | None = None) -> float:
        """The smallest of `tail_probabilities`, times their number: one probability for the row."""
        found = self.tail_probabilities(row, arithmetic)
        return min(1.0, len(found) * min(found.values())) if found else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The document ``floors.json``."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "defaults": {name: dict(vars(prior)) for name, prior in DEFAULTS.items()},
            "defaults_hold": "for every kind that cells do not list: theory alone, nothing was calibrated",
            "cells": [
                {"kind": kind, "component": component, "statistic": statistic, **cell.to_dict()}
                for (kind, component, statistic), cell in sorted(self.cells.items())
            ],
            "calibration": dict(self.calibration),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], where: str = "floors") -> Floors:
        """The inverse of `to_dict`; the defaults are this version's.

        Raises:
            InputError: not a document of floors.
        """
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            raise InputError(
                f"{where}: format {document.get('format')!r}, version {document.get('version')!r}; "
                f"expected {FORMAT!r}, version {VERSION}"
            )
        try:
            cells = {
                (str(item["kind"]), str(item["component"]), str(item["statistic"])): Cell.from_dict(item)
                for item in document["cells"]
            }
            return cls(cells, dict(document["calibration"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: a cell is malformed: {error}") from error


def _of_any_op(kind: str, component: str) -> str:
    """The kind that all ops of an arithmetic share; the model component's kinds are few, and have none."""
    return kind if component == "model" else f"{_ANY} {kind.partition(' ')[2]}"


def _transfer(kind: str, component: str, statistic: str) -> str:
    op, _, computed = kind.partition(" ")
    if (kind, component, statistic) == ("embedding", "model", "score_channel"):
        return "model/single-weights"
    return f"{component}/narrow" if computed.startswith("narrow") and op in _SUMS else component


def _default(kind: str, component: str) -> str:
    return "engine/recomputed" if component == "engine" and kind.endswith(" recomputed") else component


def _unpredicted(row: Mapping[str, Any]) -> bool:
    """Whether an error was measured where the prediction is none."""
    energy, predicted, signal = row["energy"], row["predicted_energy"], row["signal_energy"]
    if not energy or predicted:
        return False
    return bool(energy > EXACT * signal) if signal else True
