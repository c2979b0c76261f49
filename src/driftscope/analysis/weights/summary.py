"""The judgement of a sweep: what the pair of models is, from the relations of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from driftscope.analysis.weights.corrupt_blocks import CLASS, CORRUPT, corrupt_tensors
from driftscope.analysis.weights.relate import relate
from driftscope.analysis.weights.relations import Band, Relation, Relations

if TYPE_CHECKING:
    import polars as pl

WORST_LISTED = 5

HOLDING = ("identical", "downcast", "quantized-from")
"""Conclusions that say that b is a, up to what its formats do."""


def summarise(
    frame: pl.DataFrame | Iterable[Mapping[str, Any]],
    inventory: Mapping[str, Any],
    judged: Relations | Band,
    found: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Judge a sweep.

    Args:
        frame: the ``sweep`` table, or its rows.
        inventory: see `driftscope.analysis.weights.inventory`.
        judged: the relations of the tensors; or only the band, and no tensor is read again.
        found: what was found in single blocks and rows, see `driftscope.analysis.weights.block_findings`.

    Returns:
        ``conclusion`` is the first of these that holds: ``failure`` (nothing was compared),
        ``different-weights`` (two trainings), ``incomplete`` (a tensor is missing or was not compared),
        ``non-finite``, ``different``, ``transformed`` (all is explained, but by a transform that no container
        declares), ``quantized-from``, ``downcast``, ``identical``; ``holds`` says whether it is one of the
        last three and no tensor is corrupt. ``statement`` says in a sentence what the distribution over the
        tensors shows. ``relations`` is the relation of each compared tensor, ``kinds`` its kind
        (`Relation.kind`), ``at_fault`` names those that do not hold, ``found`` says what each of them is and
        by what evidence.
        ``relation_counts``, ``kind_counts`` and ``status_counts`` count, ``worst_by_nmse`` and
        ``worst_by_cosine`` list five each, ``cosine`` has ``min`` and ``max``, ``training`` and ``searched``
        are those of `Relations`, ``metadata_matters`` names the metadata that differ and change an answer.
        ``block_findings`` are those given, each with whether it makes its tensor ``corrupt``; ``corrupt``
        names these tensors, which do not hold, with the kind of finding.
    """
    given = frame.iter_rows(named=True) if hasattr(frame, "iter_rows") else frame
    rows = sorted(given, key=lambda row: row["tensor"])
    relations = judged if isinstance(judged, Relations) else relate(rows, inventory, judged)
    by_tensor = relations.by_tensor
    expected = int(inventory["coverage"]["expected"])
    compared = sum(row["compared_count"] > 0 for row in rows)
    # A tensor that was compared only after its shape was undone counts as well.
    seen = sum(row["compared_count"] > 0 or bool(by_tensor[row["tensor"]].transforms) for row in rows)
    complete = seen == expected and len(rows) == expected and not inventory["missing"]
    conclusion = _conclusion(seen, complete, relations)
    by_cosine = sorted(_having(rows, "cosine_similarity"), key=lambda row: row["cosine_similarity"])
    by_nmse = sorted(_having(rows, "nmse"), key=lambda row: -row["nmse"])
    in_blocks = [{**item, "corrupt": item["kind"] in CORRUPT} for item in found]
    corrupt = corrupt_tensors(in_blocks)
    at_fault = [
        row["tensor"] for row in rows if not by_tensor[row["tensor"]].holds or row["tensor"] in corrupt
    ]
    return {
        "conclusion": conclusion,
        "holds": conclusion in HOLDING and not corrupt,
        "statement": relations.training["statement"],
        "band": {"low": relations.band.low, "high": relations.band.high},
        "coverage": {
            "expected": expected,
            "compared": compared,
            "elements": sum(row["element_count"] for row in rows),
            "elements_compared": sum(row["compared_count"] for row in rows),
        },
        "relations": {row["tensor"]: by_tensor[row["tensor"]].name for row in rows},
        "kinds": {row["tensor"]: by_tensor[row["tensor"]].kind for row in rows},
        "relation_counts": dict(sorted(Counter(by_tensor[row["tensor"]].name for row in rows).items())),
        "kind_counts": relations.counts,
        "at_fault": at_fault,
        "found": {name: _of_tensor(by_tensor[name], name in corrupt) for name in at_fault},
        "training": dict(relations.training),
        "metadata_matters": [item["key"] for item in inventory["metadata_differences"] if item["matters"]],
        "searched": dict(relations.searched),
        "status_counts": dict(sorted(Counter(row["status"] for row in rows).items())),
        "cosine": {
            "min": by_cosine[0]["cosine_similarity"] if by_cosine else None,
            "max": by_cosine[-1]["cosine_similarity"] if by_cosine else None,
        },
        "worst_by_nmse": [_listed(row) for row in by_nmse[:WORST_LISTED]],
        "worst_by_cosine": [_listed(row) for row in by_cosine[:WORST_LISTED]],
        "block_findings": in_blocks,
        "corrupt": corrupt,
    }


def _of_tensor(relation: Relation, corrupt: bool) -> dict[str, Any]:
    """A relation that does not hold; a corrupt block is the class where no transform has named another."""
    said = relation.to_dict()
    if corrupt:
        said |= {"holds": False, "class": said["class"] if relation.kind == "transformed" else CLASS}
    return said


def _conclusion(seen: int, complete: bool, relations: Relations) -> str:
    kinds = {item.kind for item in relations.tensors}
    if not seen:
        return "failure"
    if relations.training["kind"] == "different-weights":
        return "different-weights"
    if not complete:
        return "incomplete"
    order = ("non-finite", "different", "transformed", "quantized-from", "downcast")
    return next((kind for kind in order if kind in kinds), "identical")


def _having(rows: Iterable[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
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
