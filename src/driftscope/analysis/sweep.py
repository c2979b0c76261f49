"""The tensor-diff sweep: every tensor of the teacher (a) against the candidate's (b), and what it shows.

Measuring (`compare_tensor`) and judging (`relation_of`, `summarise`) are apart: the band that makes an error
the one that a format predicts comes in as an argument.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError
from driftscope.kernels.device import Kernels, kernels_on
from driftscope.kernels.formats import decoder_of

if TYPE_CHECKING:
    import polars as pl

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORST_LISTED = 5

_STATUS_BELOW = (
    (1e-3, "NearlyIdentical"),
    (1e-2, "SmallDiff"),
    (1e-1, "MediumDiff"),
    (1.0, "LargeDiff"),
    (math.inf, "Critical"),
)


@dataclass(frozen=True)
class Band:
    """Measured NMSE over expected NMSE that counts as the error of the format, both ends included."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < math.inf:
            raise InputError(f"sweep band {self.low} to {self.high}: expected 0 <= low < high")


@dataclass(frozen=True)
class Pair:
    """Two tensors to compare, under the name that the row of the sweep gets."""

    tensor: str
    a: TensorRef
    b: TensorRef

    @property
    def nbytes(self) -> int:
        """Bytes that comparing them reads."""
        return self.a.nbytes + self.b.nbytes


def pairs(a: Artifact, b: Artifact) -> list[Pair]:
    """Every tensor that both models have, in the order of a.

    A model with a tied head has its embedding as head: where the other side stores a head of its own, the two
    are compared as ``lm_head.weight``.
    """
    found = [Pair(name, ref, b.tensors[name]) for name, ref in a.tensors.items() if name in b.tensors]
    head_a, head_b = _head(a), _head(b)
    stored = (HEAD in a.tensors) + (HEAD in b.tensors)
    if stored == 1 and head_a is not None and head_b is not None:
        found.append(Pair(HEAD, head_a, head_b))
    return found


def inventory(a: Artifact, b: Artifact) -> dict[str, Any]:
    """What is not in the table of differences: missing, extra and unmapped tensors, unlike hyperparameters.

    Returns:
        ``missing``: names in a and not in b; ``extra``: names in b and not in a; ``unmapped_a`` and
        ``unmapped_b``: stored names without a canonical one; ``metadata_differences``: ``{key, a, b}`` for
        each hyperparameter that differs; ``coverage``: ``expected`` tensors of a, and the ``compared`` ones:
        in both, with the same shape.
    """
    found = pairs(a, b)
    paired = {pair.tensor for pair in found}
    missing = [name for name in a.tensors if name not in paired]
    return {
        "missing": missing,
        "extra": [name for name in b.tensors if name not in paired],
        "unmapped_a": sorted(a.unmapped),
        "unmapped_b": sorted(b.unmapped),
        "metadata_differences": _differences(a.config, b.config),
        "coverage": {
            "expected": len(found) + len(missing),
            "compared": sum(pair.a.shape == pair.b.shape for pair in found),
        },
    }


def plan_shards(sizes: Mapping[str, int], n_shards: int) -> list[list[str]]:
    """Deal tensors out to shards of about as many bytes.

    Largest first, each to the shard with the fewest bytes so far (Graham 1969: at most 4/3 of the optimum).
    Ties go by name and by shard number, so the plan does not depend on the order of `sizes`.

    Args:
        sizes: tensor name to bytes.
        n_shards: number of shards; those past the number of tensors are empty.

    Returns:
        Names of each shard, sorted.
    """
    if n_shards < 1:
        raise InputError(f"{n_shards} shards: expected at least one")
    shards: list[list[str]] = [[] for _ in range(n_shards)]
    loads = [0] * n_shards
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        lightest = min(range(n_shards), key=lambda i: (loads[i], len(shards[i]), i))
        shards[lightest].append(name)
        loads[lightest] += size
    return [sorted(shard) for shard in shards]


def compare_tensor(
    a: TensorRef, b: TensorRef, *, tensor: str | None = None, kernels: Kernels | None = None
) -> dict[str, Any]:
    """Compare two stored tensors, rows in canonical order.

    Args:
        a: the teacher's tensor.
        b: the candidate's tensor.
        tensor: name of the row; a's by default.
        kernels: where to compare; by default on the CPU with one thread.

    Returns:
        A row of the ``sweep`` table. Tensors of unlike shapes are not compared: the status says so.
    """
    row: dict[str, Any] = {
        "tensor": tensor or a.name,
        "shape_a": _shape(a.shape),
        "shape_b": _shape(b.shape),
        "dtype_a": a.dtype,
        "dtype_b": b.dtype,
        "decoder_a": decoder_of(a.dtype),
        "decoder_b": decoder_of(b.dtype),
        "element_count": a.n_elements,
    }
    if a.shape != b.shape:
        status = "Transposed" if a.shape == b.shape[::-1] else "ShapeMismatch"
        return {**row, **_NOTHING_COMPARED, "status": status}
    if not a.n_elements:
        return {**row, **_NOTHING_COMPARED, "status": "NotCompared"}
    found = (kernels or kernels_on("cpu")).compare(
        a.raw(), a.dtype, b.raw(), b.dtype, rows_a=a.row_order(), rows_b=b.row_order()
    )
    any_compared = found.compared_count > 0
    r, c = divmod(found.max_index, a.shape[-1])
    non_finite = found.element_count - found.compared_count
    return {
        **row,
        "compared_count": found.compared_count,
        "mean_diff": found.mean_diff,
        "max_diff": found.max_diff if any_compared else None,
        "max_index": f"{r},{c}" if any_compared else None,
        "max_value_a": found.max_value_a if any_compared else None,
        "max_value_b": found.max_value_b if any_compared else None,
        "rmse": found.rmse,
        "nmse": found.nmse,
        "relative_l2": found.relative_l2,
        "cosine_similarity": found.cosine_similarity,
        "std_a": found.std_a,
        "std_b": found.std_b,
        "std_ratio": found.std_ratio,
        "identical_count": found.identical_count,
        "small_count": found.small_count,
        "medium_count": found.medium_count,
        "large_count": found.large_count,
        "nan_a": found.nan_a,
        "nan_b": found.nan_b,
        "inf_a": found.inf_a,
        "inf_b": found.inf_b,
        "expected_nmse": found.expected_nmse,
        "status": published_status(found.max_diff, found.compared_count, non_finite),
    }


def published_status(max_diff: float, compared_count: int, non_finite_count: int) -> str:
    """The published class of a tensor by its largest difference, with two cases that it passed over.

    Args:
        max_diff: largest |a - b| over the compared pairs.
        compared_count: pairs with both values finite.
        non_finite_count: pairs with a value that is NaN or infinite; the published sweep ignored them.

    Returns:
        ``NotCompared`` and ``NonFinite`` first; then ``Identical`` at 0, ``NearlyIdentical`` below 1e-3,
        ``SmallDiff`` below 1e-2, ``MediumDiff`` below 0.1, ``LargeDiff`` below 1, else ``Critical``.
    """
    if non_finite_count:
        return "NonFinite"
    if not compared_count:
        return "NotCompared"
    if max_diff == 0:
        return "Identical"
    return next(status for bound, status in _STATUS_BELOW if max_diff < bound)


def relation_of(row: Mapping[str, Any], band: Band) -> str:
    """What b's tensor is to a's: ``identical``, ``quantized-from``, ``different`` or ``non-finite``.

    ``identical``: every value is equal. ``quantized-from``: the measured NMSE over the one that the step
    sizes of b's format predict lies in the band.
    """
    if any(row[key] for key in ("nan_a", "nan_b", "inf_a", "inf_b")):
        return "non-finite"
    if not row["compared_count"] or row["compared_count"] != row["element_count"]:
        return "different"
    if row["identical_count"] == row["element_count"]:
        return "identical"
    measured, expected = row["nmse"], row["expected_nmse"]
    if measured is not None and expected and band.low <= measured / expected <= band.high:
        return "quantized-from"
    return "different"


def summarise(frame: pl.DataFrame, inventory: Mapping[str, Any], band: Band) -> dict[str, Any]:
    """Judge a sweep.

    Args:
        frame: the ``sweep`` table.
        inventory: see `inventory`.
        band: measured over expected NMSE that makes a tensor ``quantized-from``.

    Returns:
        ``conclusion`` is the first of these that holds: ``failure`` (nothing was compared), ``incomplete``
        (a tensor is missing or was not compared), ``non-finite``, ``different``, ``quantized-from``,
        ``identical``; ``holds`` says whether it is one of the last two. ``relations`` is the relation of each
        tensor, ``relation_counts`` and ``status_counts`` count, ``worst_by_nmse`` and ``worst_by_cosine``
        list five each, ``cosine`` has ``min`` and ``max``.
    """
    rows = sorted(frame.iter_rows(named=True), key=lambda row: row["tensor"])
    relations = {row["tensor"]: relation_of(row, band) for row in rows}
    expected = int(inventory["coverage"]["expected"])
    compared = sum(row["compared_count"] > 0 for row in rows)
    complete = compared == expected and len(rows) == expected and not inventory["missing"]
    conclusion = _conclusion(compared, complete, set(relations.values()))
    by_cosine = sorted(_having(rows, "cosine_similarity"), key=lambda row: row["cosine_similarity"])
    by_nmse = sorted(_having(rows, "nmse"), key=lambda row: -row["nmse"])
    return {
        "conclusion": conclusion,
        "holds": conclusion in ("identical", "quantized-from"),
        "band": {"low": band.low, "high": band.high},
        "coverage": {
            "expected": expected,
            "compared": compared,
            "elements": sum(row["element_count"] for row in rows),
            "elements_compared": sum(row["compared_count"] for row in rows),
        },
        "relations": relations,
        "relation_counts": _counts(relations.values()),
        "status_counts": _counts(row["status"] for row in rows),
        "cosine": {
            "min": by_cosine[0]["cosine_similarity"] if by_cosine else None,
            "max": by_cosine[-1]["cosine_similarity"] if by_cosine else None,
        },
        "worst_by_nmse": [_listed(row) for row in by_nmse[:WORST_LISTED]],
        "worst_by_cosine": [_listed(row) for row in by_cosine[:WORST_LISTED]],
    }


_NOTHING_COMPARED: dict[str, Any] = {
    "compared_count": 0,
    **dict.fromkeys(("mean_diff", "max_diff", "max_index", "max_value_a", "max_value_b", "rmse", "nmse")),
    **dict.fromkeys(("relative_l2", "cosine_similarity", "std_a", "std_b", "std_ratio")),
    **dict.fromkeys(("identical_count", "small_count", "medium_count", "large_count"), 0),
    **dict.fromkeys(("nan_a", "nan_b", "inf_a", "inf_b"), 0),
    "expected_nmse": None,
}


def _conclusion(compared: int, complete: bool, relations: set[str]) -> str:
    if not compared:
        return "failure"
    if not complete:
        return "incomplete"
    return next(
        relation
        for relation in ("non-finite", "different", "quantized-from", "identical")
        if relation in relations
    )


def _head(artifact: Artifact) -> TensorRef | None:
    if HEAD in artifact.tensors:
        return artifact.tensors[HEAD]
    return artifact.tensors.get(EMBEDDING) if artifact.config.tie_word_embeddings else None


def _differences(a: ModelConfig, b: ModelConfig) -> list[dict[str, Any]]:
    found = []
    for field in fields(ModelConfig):
        left, right = _plain(getattr(a, field.name)), _plain(getattr(b, field.name))
        if _as_stored(left) != _as_stored(right):
            found.append({"key": field.name, "a": left, "b": right})
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items())}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _as_stored(value: Any) -> Any:
    """Floats as f32: GGUF stores them so, where ``config.json`` has decimals."""
    if isinstance(value, dict):
        return {key: _as_stored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_stored(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(dim) for dim in shape)


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _having(rows: Iterable[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [row for row in rows if row[key] is not None]


def _listed(row: Mapping[str, Any]) -> dict[str, Any]:
    keys = (
        "tensor",
        "dtype_b",
        "nmse",
        "expected_nmse",
        "cosine_similarity",
        "max_diff",
        "max_index",
        "status",
    )
    return {key: row[key] for key in keys}
