"""Look for what a tensor of b is, where it is not a's of the same name: read again, under alternatives.

Each alternative is first held against some rows of both sides; only the few that those rows speak for are
compared in full. What a full comparison may say is the same as of a tensor that nothing was done to: equal
bit for bit, rounded bit for bit, or quantized with the error that the format predicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.weights.alternatives import Alternative, alternatives, other_layers
from driftscope.analysis.weights.pairs import Pair
from driftscope.analysis.weights.relations import Band, Relation
from driftscope.analysis.weights.rounded_copy import is_float, round_values
from driftscope.analysis.weights.tensor_rows import (
    F32,
    SLAB_VALUES,
    Rows,
    matrix_shape,
    rows_of,
    sampled_rows,
)
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import layer_of
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.transforms import ANYWHERE, PaddedRows, stored_as
from driftscope.kernels.compare import TensorComparison, merge
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.device import Kernels

SAMPLED_ROWS = 16
SAMPLED_COLUMNS = 1024

# A sample with more error than this, over its own energy, does not speak for an alternative: unrelated values
# of equal size have 2, and the coarsest format here leaves about 0.1.
_SPEAKS = 0.5

_COMPARED_IN_FULL = 3
"""Alternatives of a tensor that are compared in full, at most."""

# Operations on f32 values that were each rounded, by a converter and on reading, leave so many last bits.
_LAST_BITS = 4.0

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Match:
    how: str
    evidence: dict[str, Any]


class TransformSearch:
    """Names what tensors of b are; keeps some rows of a's tensors, so that layers are not read n times n."""

    def __init__(self, a: Artifact, b: Artifact, band: Band, kernels: Kernels) -> None:
        """Prepare; nothing is read yet."""
        self._a, self._b = a, b
        self._band, self._kernels = band, kernels
        self._samples: dict[str, F32] = {}
        self._suffix = ""
        self.tensors = 0
        self.alternatives = 0

    def search(self, pair: Pair, relation: Relation) -> Relation:
        """The relation of a tensor that nothing has explained so far.

        Args:
            pair: the tensor of both sides.
            relation: what the row says of it; returned with the evidence of the search where nothing is
                found.
        """
        self.tensors += 1
        self._forget(pair.tensor)
        tried = [
            *alternatives(pair.tensor, self._a, self._b, pair.a, pair.b),
            *other_layers(pair.tensor, self._a, pair.b),
        ]
        self.alternatives += len(tried)
        scored = sorted(
            ((self._score(alternative, pair.b), index) for index, alternative in enumerate(tried)),
        )
        spoken_for = [(score, tried[index]) for score, index in scored if score <= _SPEAKS]
        evidence: dict[str, Any] = {**relation.evidence, "alternatives_tried": len(tried)}
        if scored and math.isfinite(scored[0][0]):
            best = tried[scored[0][1]].transform
            evidence |= {"best_alternative": best, "best_alternative_sample_nmse": scored[0][0]}
        for _, alternative in spoken_for[:_COMPARED_IN_FULL]:
            found = self._match(alternative, pair.b)
            if found is not None:
                return Relation(
                    pair.tensor,
                    found.how,
                    (alternative.transform,),
                    self._is_legal(alternative, pair, found),
                    {**evidence, "source": alternative.source.name, **found.evidence},
                )
        return replace(relation, evidence=evidence)

    def _forget(self, tensor: str) -> None:
        """Drop the rows of tensors of another kind: tensors come kind by kind."""
        suffix = _suffix(tensor)
        if suffix != self._suffix:
            self._samples.clear()
            self._suffix = suffix

    def _is_legal(self, alternative: Alternative, pair: Pair, found: _Match) -> bool:
        """Whether converters do it without changing an answer: rows of zeros behind a vocabulary."""
        legal = any(isinstance(item, PaddedRows) for item in stored_as(pair.tensor, ANYWHERE))
        padding = alternative.transform.startswith(("rows-padded", "rows-cut"))
        return legal and padding and bool(found.evidence.get("other_rows_are_zero"))

    def _score(self, alternative: Alternative, b: TensorRef) -> float:
        """Error of some rows under an alternative over their energy; infinite where it does not fit."""
        if alternative.transposed:
            return _transposed_score(alternative.source, b)
        count = alternative.count or matrix_shape(b.shape)[0]
        # Values of a vector are few enough to take all.
        rows = np.arange(count, dtype=np.int64) if len(b.shape) == 1 else sampled_rows(count, SAMPLED_ROWS)
        target = self._sample(f"b:{b.name}:{alternative.skipped}:{count}", b, rows + alternative.skipped)
        source_rows = rows if alternative.order is None else alternative.order[rows]
        if alternative.order is None and alternative.change is None:
            key = f"{alternative.source.file}:{alternative.source.offset}:{count}"
            values = self._sample(key, alternative.source, source_rows)
        else:
            values = rows_of(alternative.source, source_rows)[:, :SAMPLED_COLUMNS]
        if alternative.change is not None:
            values = alternative.change(values)
        return _nmse(values, target)

    def _sample(self, key: str, ref: TensorRef, rows: Rows) -> F32:
        if key not in self._samples:
            self._samples[key] = np.array(rows_of(ref, rows)[:, :SAMPLED_COLUMNS])
        return self._samples[key]

    def _match(self, alternative: Alternative, b: TensorRef) -> _Match | None:
        """How all of b matches under an alternative, or None."""
        found, rounded, last_bits = compare_under(alternative, b, self._kernels)
        evidence: dict[str, Any] = {
            "nmse_under": found.nmse,
            "expected_nmse_under": found.expected_nmse,
            "compared_under": found.compared_count,
            **_beyond(alternative, b),
        }
        if found.compared_count != found.element_count:
            return None
        if found.identical_count == found.element_count:
            return _Match("identical", {**evidence, "bit_identical": found.bit_identical})
        if rounded:
            return _Match("downcast", evidence)
        if alternative.change is not None and last_bits <= _LAST_BITS:
            return _Match("identical", {**evidence, "bit_identical": False, "last_bits": last_bits})
        if self._band.holds(found.nmse, found.expected_nmse):
            return _Match("quantized-from", evidence)
        return None


def compare_under(
    alternative: Alternative, b: TensorRef, kernels: Kernels
) -> tuple[TensorComparison, bool, float]:
    """Compare the whole of b's tensor with what an alternative says it is.

    Returns:
        The comparison; whether b is, bit for bit, those values rounded to its float format; and the largest
        difference in units of the last bit of f32 (only where the alternative changes values, else 0).
    """
    source = alternative.source
    if alternative.transposed:
        found = kernels.compare(
            source.raw(),
            source.dtype,
            b.raw(),
            b.dtype,
            rows_a=source.row_order(),
            rows_b=b.row_order(),
            transposed_a=True,
        )
        return found, False, 0.0
    n_rows, columns = matrix_shape(b.shape)
    count = n_rows if alternative.count is None else alternative.count
    parts, rounded, last_bits = [], is_float(b.dtype), 0.0
    step = max(1, SLAB_VALUES // columns)
    for first in range(0, count, step):
        rows = np.arange(first, min(first + step, count), dtype=np.int64)
        values = rows_of(source, rows if alternative.order is None else alternative.order[rows])
        if alternative.change is not None:
            values = alternative.change(values)
        target, dtype = _stored(b, rows + alternative.skipped)
        parts.append(kernels.compare(_bytes(values), "F32", target, dtype))
        if rounded or alternative.change is not None:
            decoded = dequantize(target, dtype)
            rounded = rounded and np.array_equal(
                round_values(values, b.dtype).view(np.uint32), decoded.view(np.uint32)
            )
            if alternative.change is not None:
                last_bits = max(last_bits, _in_last_bits(values, decoded))
    return merge(parts), rounded, last_bits


def _stored(b: TensorRef, rows: Rows) -> tuple[NDArray[np.uint8], str]:
    """Rows of b as they are stored where that can be, so that what its format predicts is known."""
    if len(b.shape) == 1 or b.value_offset:
        return _bytes(rows_of(b, rows)), "F32"
    order = b.row_order()
    return b.raw()[rows if order is None else order[rows]], b.dtype


def _bytes(values: F32) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8)


def _in_last_bits(x: F32, y: F32) -> float:
    """Largest difference over the last bit of the largest value there is."""
    both = np.maximum(np.abs(x), np.abs(y)).astype(np.float64)
    unit = 2.0**-23 * max(float(both.max(initial=0.0)), 1e-30)
    found = float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0.0) / unit)
    return found if math.isfinite(found) else math.inf


def _beyond(alternative: Alternative, b: TensorRef) -> dict[str, Any]:
    """Whether rows that only one side has are zero."""
    rows_a, rows_b = matrix_shape(alternative.source.shape)[0], matrix_shape(b.shape)[0]
    if rows_a == rows_b or not alternative.transform.startswith("rows-"):
        return {}
    longer, first, end = (b, rows_a, rows_b) if rows_b > rows_a else (alternative.source, rows_b, rows_a)
    step = max(1, SLAB_VALUES // matrix_shape(b.shape)[1])
    zero = all(
        not rows_of(longer, np.arange(start, min(start + step, end), dtype=np.int64)).any()
        for start in range(first, end, step)
    )
    return {"other_rows_are_zero": zero, "other_rows": end - first}


def _transposed_score(source: TensorRef, b: TensorRef) -> float:
    """The error where some rows of b cross some rows of the source, which are its columns."""
    at_b, at_source = (sampled_rows(matrix_shape(ref.shape)[0], 2 * SAMPLED_ROWS) for ref in (b, source))
    return _nmse(rows_of(source, at_source)[:, at_b].T, rows_of(b, at_b)[:, at_source])


def _nmse(x: F32, y: F32) -> float:
    """Energy of the difference over that of x; infinite where there is none, or a value is not finite."""
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    energy = float(np.sum(wide_x * wide_x))
    if not energy > 0 or not math.isfinite(energy):
        return math.inf
    found = float(np.sum((wide_x - wide_y) ** 2)) / energy
    return found if math.isfinite(found) else math.inf


def _suffix(tensor: str) -> str:
    layer = layer_of(tensor)
    return tensor if layer is None else tensor.removeprefix(f"model.layers.{layer}.")
