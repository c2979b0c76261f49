"""What each tensor of a candidate is to the teacher's, with the evidence for it.

Relations are looked for in this order, and the first that holds is the tensor's:

- ``identical``: every value is equal. Where one container had to be undone to see it (rows interleaved, a
  constant added, a fused tensor split, a tied head), it is ``equal-under:<transform>``, as expected.
- ``downcast``: b is, bit for bit, a rounded to b's float format. It comes before ``quantized-from`` because
  it says more: each bit of b follows from a, where a band only bounds the mean error.
- ``quantized-from``: the measured NMSE over the one that b's format predicts for its step sizes (and a's for
  its own, where a is quantized or rounded more coarsely) lies in the band, and the values of a lie in the
  cells of b's quants (`driftscope.analysis.weights.outside_cells`): so little may lie outside that b was
  rounded from these values, and not from values like these.
- ``equal-under:<transform>``, ``downcast-under:`` and ``quantized-from-under:``: one of the above once a
  transform that nobody declared is undone, see `driftscope.analysis.weights.transform_search`.
- ``different``; ``non-finite`` where a value of either side is NaN or infinite.
- ``missing`` and ``extra`` for tensors of one side only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from driftscope.errors import InputError

Row = Mapping[str, Any]

FINE = ("identical", "downcast", "quantized-from")
"""Matches that say that b holds a's values, up to what a format does to them."""


_EXACT = ("F32", "F64")

_OUTSIDE = 0.01
"""Part of the sampled values that may lie outside of their cells; llama.cpp's quantizers leave up to 5e-4."""

_OUTSIDE_BY_WEIGHT = 0.04
_FITTED_LAST = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Formats whose scale is fitted after the quants where an importance matrix is given: 0.022 was seen."""


_CODEBOOKS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
_WIDER_BY_WEIGHT = 2.0
"""How much farther the band of codebook formats reaches: they are made with an importance matrix, on which
their error depends. Up to 2.9 times the usual was seen."""


@dataclass(frozen=True)
class Band:
    """Measured NMSE over expected NMSE that counts as the error of the format, both ends included."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < math.inf:
            raise InputError(f"sweep band {self.low} to {self.high}: expected 0 <= low < high")

    def holds(self, measured: float | None, expected: float | None, *dtypes: str) -> bool:
        """Whether a measured NMSE is that of the formats of the two tensors."""
        if measured is None or not expected:
            return False
        wider = _WIDER_BY_WEIGHT if any(dtype in _CODEBOOKS for dtype in dtypes) else 1.0
        return self.low <= measured / expected <= self.high * wider


@dataclass(frozen=True)
class Relation:
    """What one tensor of b is to a's.

    Attributes:
        tensor: canonical name.
        match: ``identical``, ``downcast``, ``quantized-from``, ``different``, ``non-finite``, ``missing`` or
            ``extra``; how the values match once the transforms are undone.
        transforms: what lies between a's and b's values, outermost last; names as in
            `driftscope.artifacts.transforms` and `driftscope.analysis.weights.transform_search`.
        expected: whether the transforms are those of the containers, undone on reading.
        evidence: the figures that the choice rests on.
        fault: class of what is wrong (`driftscope.analysis.weights.transform_classes`), where that is known.
    """

    tensor: str
    match: str
    transforms: tuple[str, ...] = ()
    expected: bool = True
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None

    @property
    def name(self) -> str:
        """The relation in one word, with the transform where that is not the container's own business."""
        under = "+".join(self.transforms)
        if not under or self.match not in FINE:
            return self.match
        if self.match == "identical":
            return f"equal-under:{under}"
        return self.match if self.expected else f"{self.match}-under:{under}"

    @property
    def holds(self) -> bool:
        """Whether b holds a's values, in the place and order where they belong."""
        return self.match in FINE and self.expected

    @property
    def kind(self) -> str:
        """The relation for counting: ``equal-under`` or ``transformed`` instead of the transform's name."""
        if self.match not in FINE:
            return self.match
        if not self.expected:
            return "transformed"
        return "equal-under" if self.transforms and self.match == "identical" else self.match

    def to_dict(self) -> dict[str, Any]:
        """The relation as JSON."""
        return {
            "tensor": self.tensor,
            "relation": self.name,
            "kind": self.kind,
            "holds": self.holds,
            "match": self.match,
            "transforms": list(self.transforms),
            "expected": self.expected,
            "class": self.fault,
            "evidence": dict(self.evidence),
        }


@dataclass(frozen=True)
class Relations:
    """The relations of a pair.

    Attributes:
        band: what they rest on.
        tensors: of each compared tensor, in the order of its rows; then missing and extra ones.
        training: whether the two are different trainings, see `driftscope.analysis.weights.trainings`.
        searched: how many tensors were read again, and under how many alternatives.
    """

    band: Band
    tensors: tuple[Relation, ...]
    training: Mapping[str, Any] = field(default_factory=lambda: {"kind": "none", "statement": ""})
    searched: Mapping[str, int] = field(default_factory=lambda: {"tensors": 0, "alternatives": 0})

    @property
    def by_tensor(self) -> dict[str, Relation]:
        """Canonical name to relation."""
        return {item.tensor: item for item in self.tensors}

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors are of each kind."""
        return dict(sorted(Counter(item.kind for item in self.tensors).items()))


def relation_of(row: Row, band: Band) -> Relation:
    """What a row of the sweep says by itself, without another look at the tensors."""
    transforms = _between(row)
    evidence: dict[str, Any] = {
        key: row.get(key) for key in ("nmse", "expected_nmse", "cosine_similarity", "scale")
    }
    expected, measured = row["expected_nmse"], row["nmse"]
    evidence["nmse_over_expected"] = measured / expected if expected and measured is not None else None

    def of(match: str, **more: Any) -> Relation:
        return Relation(row["tensor"], match, transforms, True, {**evidence, **more})

    if any(row[key] for key in ("nan_a", "nan_b", "inf_a", "inf_b")):
        return of("non-finite", **{key: row[key] for key in ("nan_a", "nan_b", "inf_a", "inf_b")})
    if not row["compared_count"] or row["compared_count"] != row["element_count"]:
        shapes = {"shape_a": row.get("shape_a"), "shape_b": row.get("shape_b")}
        return of("different", reason="shapes differ", **shapes)
    # Values of F64 may be equal as f32 only.
    if row["identical_count"] == row["element_count"] and not row["rounded_copy"]:
        return of("identical", same_bytes=row["same_bytes"], bit_identical=row["bit_identical"])
    if row["rounded_copy"]:
        return of("downcast", rounded=f"{row['dtype_a']} to {row['dtype_b']}, half to even")
    if expected is None and row["dtype_b"] not in _EXACT:
        return of("different", reason=f"nothing is known of the error that {row['dtype_b']} leaves")
    if not band.holds(measured, expected, row["dtype_a"], row["dtype_b"]):
        return of("different")
    outside = row["outside_count"] / row["cell_count"] if row["cell_count"] else 0.0
    if outside > (_OUTSIDE_BY_WEIGHT if row["dtype_b"] in _FITTED_LAST else _OUTSIDE):
        reason = (
            "the error is as large as the format's, but too many values lie outside of the cells that they"
            " would be rounded to: b was quantized from other values"
        )
        return of("different", reason=reason, outside=outside)
    return of("quantized-from", outside=outside)


def _between(row: Row) -> tuple[str, ...]:
    """Transforms of one container that the other has not."""
    a, b = (
        tuple(part for part in (row.get(key) or "").split(",") if part)
        for key in ("transforms_a", "transforms_b")
    )
    return (*(name for name in a if name not in b), *(name for name in b if name not in a))
