"""Whether two models are two trainings rather than one model and a damaged copy of it.

Damage has a place: a tensor, a layer, a kind of tensor that a converter got wrong. Training moves what it
trains all over: every matrix of every layer, or, where only a part was trained, all matrices of some kinds
or of a run of layers, each by about as much as its neighbours, and evenly over its rows. A low-rank adapter
that was merged into the weights leaves a difference of low rank besides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.weights.pairs import Pair
from driftscope.analysis.weights.tensor_rows import matrix_shape, rows_of, sampled_rows
from driftscope.artifacts.names import layer_of

Row = Mapping[str, Any]

LEAST_MATRICES = 7
"""Matrices that a pair must have for its distribution to say anything: those of one layer."""

_NEARLY_ALL, _NEARLY_NONE = 0.9, 0.1
"""Shares of the matrices, of a model or of one kind, that count as all and as none."""

_LEAST_LAYERS = 4
"""Layers that a trained part has at least: fewer may be damaged together."""

_ALIKE = 30.0
"""Largest over smallest relative error (90 % and 10 % quantiles) of matrices that one training has moved."""

_NEAR = 0.5
"""Relative error, in the length of the weights, up to which a trained matrix is still near to its base."""

_EVEN = 30.0
"""As `_ALIKE`, over the rows of one matrix."""

_UNRELATED = 0.1
"""Cosine similarity up to which matrices have nothing to do with each other."""

SAMPLED_MATRICES = 4
_SAMPLED_ROWS = 96
_SAMPLED_COLUMNS = 1024

# Share of the difference's energy that its first directions hold, and share of the sampled rows that these
# may be, for the difference to be of low rank. Of unrelated rows it takes about nine in ten.
_RANK_ENERGY, _LOW_RANK = 0.9, 1 / 3


@dataclass(frozen=True)
class Difference:
    """The difference of one matrix, from some of its rows.

    Attributes:
        tensor: canonical name.
        rank: directions that hold nine tenths of the energy of b - a in the sampled rows.
        rows: rows that were sampled.
        unevenness: relative error of the rows, 90 % quantile over 10 % quantile; None where a tenth of the
            rows is equal.
    """

    tensor: str
    rank: int
    rows: int
    unevenness: float | None

    @property
    def is_low_rank(self) -> bool:
        """Whether far fewer directions than rows explain it."""
        return self.rank <= _LOW_RANK * self.rows


def matrices(rows: Sequence[Row]) -> list[Row]:
    """Rows of the matrices that can be judged: compared, finite, and of a format whose error is known."""
    return [
        row
        for row in rows
        if "x" in row["shape_a"]
        and row["compared_count"] == row["element_count"] > 0
        and row["nmse"] is not None
        and (row["expected_nmse"] is not None or row["dtype_b"] in ("F32", "F64") or not row["nmse"])
    ]


def may_be_two_trainings(rows: Sequence[Row], different: set[str]) -> bool:
    """Whether so many matrices differ that looking for a transform of each is not the first thing to do."""
    all_matrices = matrices(rows)
    unlike = sum(row["tensor"] in different for row in all_matrices)
    return len(all_matrices) >= LEAST_MATRICES and unlike >= _NEARLY_ALL * len(all_matrices)


def judge_training(
    rows: Sequence[Row], different: set[str], pairs: Mapping[str, Pair] | None
) -> dict[str, Any]:
    """Say whether a pair is two trainings, from the tensors that nothing else explains.

    Args:
        rows: the rows of the sweep.
        different: names of the tensors that no relation and no transform explains.
        pairs: the tensors, of which a few are read for the rank of their difference; None for not.

    Returns:
        ``kind`` (``none``; ``different-weights``; ``pattern``: many tensors differ by a rule, and not as
        training would), ``part`` (``all``, ``kinds`` or ``layers``), ``statement``, and the figures:
        ``matrices``, ``matrices_different``, ``vectors``, ``vectors_equal``, ``cosine_median``,
        ``relative_error`` (10 %, 50 % and 90 % quantile over the different matrices), ``kinds``, ``layers``,
        ``differences`` (rank and evenness of a few).
    """
    all_matrices = matrices(rows)
    unlike = [row for row in all_matrices if row["tensor"] in different]
    if len(all_matrices) < LEAST_MATRICES or not unlike:
        return _nothing()
    vectors = [row for row in rows if "x" not in row["shape_a"] and row["compared_count"]]
    kinds, layers = _kinds(all_matrices, different), _layers(all_matrices, different)
    errors = sorted(row["relative_l2"] for row in unlike)
    figures: dict[str, Any] = {
        "matrices": len(all_matrices),
        "matrices_different": len(unlike),
        "vectors": len(vectors),
        "vectors_equal": sum(row["identical_count"] == row["element_count"] for row in vectors),
        "cosine_median": median(row["cosine_similarity"] or 0.0 for row in unlike),
        "relative_error": [_quantile(errors, part) for part in (0.1, 0.5, 0.9)],
        "kinds": kinds,
        "layers": layers,
    }
    part = _part(all_matrices, unlike, kinds, layers)
    if part is None:
        return {**_nothing(), **figures}
    differences = [] if pairs is None else _differences(unlike, pairs)
    figures["differences"] = [vars(item) for item in differences]
    trained = _as_training_would(figures, differences)
    kind = "different-weights" if trained else "pattern"
    statement = _statement(part, trained, figures, differences)
    return {"kind": kind, "part": part, "statement": statement, **figures}


def _nothing() -> dict[str, Any]:
    return {"kind": "none", "part": None, "statement": ""}


def _kinds(all_matrices: Sequence[Row], different: set[str]) -> list[str]:
    """Kinds of matrices (``self_attn.q_proj``) of which nearly all differ, where all others hardly do."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for row in all_matrices:
        groups[_kind(row["tensor"])].append(row["tensor"] in different)
    shares = {kind: sum(found) / len(found) for kind, found in groups.items()}
    if any(_NEARLY_NONE < share < _NEARLY_ALL for share in shares.values()):
        return []
    return [
        kind
        for kind, share in shares.items()
        if share >= _NEARLY_ALL and (len(groups[kind]) >= _LEAST_LAYERS or kind == _outside(kind))
    ]


def _outside(kind: str) -> str:
    """The kind itself where it is a tensor outside of the layers."""
    return kind if kind.startswith(("model.", "lm_head")) else ""


def _layers(all_matrices: Sequence[Row], different: set[str]) -> list[int]:
    """Layers of which nearly all matrices differ, where they are a run and those of all others hardly do."""
    groups: dict[int, list[bool]] = defaultdict(list)
    for row in all_matrices:
        layer = layer_of(row["tensor"])
        if layer is not None:
            groups[layer].append(row["tensor"] in different)
    shares = {layer: sum(found) / len(found) for layer, found in groups.items()}
    if any(_NEARLY_NONE < share < _NEARLY_ALL for share in shares.values()):
        return []
    run = sorted(layer for layer, share in shares.items() if share >= _NEARLY_ALL)
    return run if run and run == list(range(run[0], run[-1] + 1)) else []


def _part(
    all_matrices: Sequence[Row], unlike: Sequence[Row], kinds: Sequence[str], layers: Sequence[int]
) -> str | None:
    """What of the model differs: ``all``, whole ``kinds``, a run of ``layers``, or nothing by a rule."""
    if len(unlike) >= _NEARLY_ALL * len(all_matrices):
        return "all"
    if any(not _outside(kind) for kind in kinds):
        return "kinds"
    return "layers" if len(layers) >= _LEAST_LAYERS else None


def _as_training_would(figures: Mapping[str, Any], differences: Sequence[Difference]) -> bool:
    """Whether the differences look like those that training leaves."""
    low, middle, high = figures["relative_error"]
    alike = low > 0 and high <= _ALIKE * low
    if differences and all(item.is_low_rank for item in differences):
        return True
    even = all(item.unevenness is not None and item.unevenness <= _EVEN for item in differences)
    if figures["matrices_different"] < _NEARLY_ALL * figures["matrices"]:
        # A part that was trained stays near to where it began; what a converter did to it need not.
        return bool(alike and even and middle <= _NEAR)
    # Vectors that are all equal come with matrices that have hardly moved, or with a fault of all of them.
    untouched = figures["vectors"] and figures["vectors_equal"] == figures["vectors"]
    return bool(alike and even and (middle <= _NEAR or not untouched))


def _differences(unlike: Sequence[Row], pairs: Mapping[str, Pair]) -> list[Difference]:
    """Look at some matrices, as far apart in the model as can be."""
    chosen = spread([row["tensor"] for row in unlike], SAMPLED_MATRICES)
    return [difference_of(pairs[name]) for name in chosen if name in pairs]


def spread(names: Sequence[str], count: int) -> list[str]:
    """At most `count` of the names, evenly spaced, with the first and the last."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def difference_of(pair: Pair) -> Difference:
    """Rank and evenness of the difference of a pair of equal shape, from some rows."""
    rows = sampled_rows(matrix_shape(pair.a.shape)[0], _SAMPLED_ROWS)
    a, b = (rows_of(ref, rows)[:, :_SAMPLED_COLUMNS].astype(np.float64) for ref in (pair.a, pair.b))
    error = np.sum((b - a) ** 2, axis=1)
    energy = np.sum(a * a, axis=1)
    relative = np.sort(np.sqrt(error / np.where(energy > 0, energy, 1.0)))
    low, high = _quantile(relative.tolist(), 0.1), _quantile(relative.tolist(), 0.9)
    unevenness = high / low if low > 0 else None
    return Difference(pair.tensor, _rank(b - a), len(rows), unevenness)


def _rank(difference: NDArray[np.float64]) -> int:
    """Directions that hold `_RANK_ENERGY` of the energy, by Gram-Schmidt that takes the longest row first."""
    left = difference.copy()
    total = float(np.sum(left * left))
    for rank in range(len(left)):
        energies = np.sum(left * left, axis=1)
        if float(np.sum(energies)) <= (1 - _RANK_ENERGY) * total:
            return rank
        longest = int(np.argmax(energies))
        direction = left[longest] / np.sqrt(energies[longest])
        left -= np.sum(left * direction, axis=1)[:, None] * direction
        left[longest] = 0.0
    return len(left)


def _statement(
    part: str, trained: bool, figures: Mapping[str, Any], differences: Sequence[Difference]
) -> str:
    low, middle, high = figures["relative_error"]
    count, of, cosine = figures["matrices_different"], figures["matrices"], figures["cosine_median"]
    moved = f"by {middle:.2g} of their length in the median ({low:.2g} to {high:.2g})"
    if part == "all":
        where = f"{count} of {of} matrices differ"
    elif part == "kinds":
        where = f"{', '.join(figures['kinds'])} differ in every layer, and no other matrix does"
    else:
        first, last = figures["layers"][0], figures["layers"][-1]
        where = f"all matrices of layers {first} to {last} differ, and no other matrix does"
    low_rank = bool(differences) and all(item.is_low_rank for item in differences)
    if trained and cosine <= _UNRELATED:
        return f"Different weights: {where}, and they have nothing in common (median cosine {cosine:.2g})"
    if trained and low_rank:
        ranks = max(item.rank for item in differences)
        return (
            f"Different weights: {where}, {moved}, by a difference of low rank (at most {ranks} directions of"
            f" {differences[0].rows} rows), as a merged adapter leaves"
        )
    if trained:
        return (
            f"Different weights: {where}, {moved}, evenly over layers and rows (median cosine {cosine:.4g}),"
            " as further training leaves; no single tensor is damaged"
        )
    return (
        f"A rule, not a training: {where}, {moved}; a converter or a reader does the same wrong to all of"
        " them, and it is none of the transforms that were tried"
    )


def _kind(tensor: str) -> str:
    layer = layer_of(tensor)
    name = tensor if layer is None else tensor.removeprefix(f"model.layers.{layer}.")
    return name.removesuffix(".weight")


def _quantile(ascending: Sequence[float], part: float) -> float:
    return ascending[round(part * (len(ascending) - 1))]
