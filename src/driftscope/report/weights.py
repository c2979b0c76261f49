"""The ``weights`` section: how each tensor of the candidate relates to the teacher's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from driftscope.report.evidence import Document, ReportEvidence, not_run
from driftscope.report.topology import has_post_norms, op_of_tensor, tensor_order

if TYPE_CHECKING:
    import polars as pl

RELATIONS = (
    "identical",
    "equal-under",
    "downcast",
    "quantized-from",
    "transformed",
    "different",
    "non-finite",
    "unclassified",
)
"""What a tensor of the candidate can be to the teacher's, from the best to the worst.

``equal-under`` is equal under a transform that its container declares, ``transformed`` the teacher's under
one that none declares.
"""

UNEXPLAINED = ("transformed", "different", "non-finite")
"""Relations that no legal conversion leaves."""

SHOWN_AT_FAULT, SHOWN_OF_A_TRAINING = 60, 8
"""Tensors that are listed with their evidence; of two trainings fewer, since none of them is at fault."""

BLOCKS_LISTED = 60
"""Findings in single blocks and rows that are listed, those that make a tensor corrupt first."""

WORST_LISTED = 12
_LISTED = (
    "tensor",
    "shape_b",
    "dtype_a",
    "dtype_b",
    "compared_count",
    "nmse",
    "expected_nmse",
    "max_diff",
    "max_index",
    "max_value_a",
    "max_value_b",
    "cosine_similarity",
    "std_ratio",
    "nan_a",
    "nan_b",
    "inf_a",
    "inf_b",
)


def weights_section(evidence: ReportEvidence) -> dict[str, Any]:
    """Return the ``weights`` section, or ``not-run`` where there is no sweep."""
    sweep = evidence.get("sweep")
    if sweep is None:
        return not_run("no tensor was compared: the sweep is not there")
    inventory = evidence.get("sweep_inventory") or {}
    relations = _relations(sweep, evidence.get("sweep_summary") or {})
    post_norms = has_post_norms(relations)
    rows = sorted(
        sweep.iter_rows(named=True), key=lambda row: tensor_order(row["tensor"], post_norms=post_norms)
    )
    summary = evidence.get("sweep_summary") or {}
    corrupt = summary.get("corrupt") or {}
    for place, row in enumerate(rows):
        row["relation"], row["place"] = relations[row["tensor"]], place
        row["corrupt"] = row["tensor"] in corrupt
    trained = summary.get("conclusion") == "different-weights"
    shown = SHOWN_OF_A_TRAINING if trained else SHOWN_AT_FAULT
    counts = Counter(row["relation"] for row in rows)
    coverage = inventory.get("coverage") or {"expected": None, "compared": len(rows)}
    return {
        "status": "done",
        "coverage": {"expected": coverage["expected"], "compared": coverage["compared"]},
        "tensors": len(rows),
        "elements": sum(row["element_count"] for row in rows),
        "elements_compared": sum(row["compared_count"] for row in rows),
        "elements_identical": sum(row["identical_count"] for row in rows),
        "relations": {relation: counts.get(relation, 0) for relation in RELATIONS},
        "band": summary.get("band"),
        "conclusion": summary.get("conclusion"),
        "statement": summary.get("statement") or "",
        "corrupt_tensors": len(corrupt),
        "unexplained": sum(map(_is_unexplained, rows)),
        "at_fault": _at_fault(rows, summary)[:shown],
        "blocks": _blocks(summary, rows, post_norms),
        "searched": dict(summary.get("searched") or {"tensors": 0, "alternatives": 0}),
        "first_unlike": _first_unlike(rows, post_norms),
        "by_dtype": _by_dtype(rows),
        "worst": [_listed_row(row) for row in sorted(rows, key=_badness)[:WORST_LISTED]],
        "missing": list(inventory.get("missing") or []),
        "extra": list(inventory.get("extra") or []),
        "unmapped_a": list(inventory.get("unmapped_a") or []),
        "unmapped_b": list(inventory.get("unmapped_b") or []),
        "metadata_differences": [dict(item) for item in inventory.get("metadata_differences") or []],
    }


def _relations(sweep: pl.DataFrame, summary: Document) -> dict[str, str]:
    """Return each tensor's relation; what the sweep's summary does not name is ``unclassified``."""
    given = summary.get("kinds") or {}
    found = {}
    for tensor in sweep["tensor"].to_list():
        kind = str(given.get(tensor, "unclassified"))
        found[tensor] = kind if kind in RELATIONS else "unclassified"
    return found


def _first_unlike(rows: list[dict[str, Any]], post_norms: bool) -> dict[str, Any] | None:
    """Name the first tensor, in the order of the forward pass, that is corrupt or has no legal relation."""
    for row in rows:
        if _is_unexplained(row):
            layer, op = op_of_tensor(row["tensor"], post_norms=post_norms)
            return {"tensor": row["tensor"], "relation": row["relation"], "layer": layer, "op": op}
    return None


def _at_fault(rows: list[dict[str, Any]], summary: Document) -> list[dict[str, Any]]:
    """Say of each tensor that is corrupt or has no legal relation what it is, and by what evidence."""
    found = []
    for row in rows:
        if not _is_unexplained(row):
            continue
        judged = (summary.get("found") or {}).get(row["tensor"]) or {}
        figures = judged.get("evidence") or {}
        found.append(
            {
                "tensor": row["tensor"],
                "relation": str(judged.get("relation", row["relation"])),
                "class": judged.get("class"),
                "transforms": list(judged.get("transforms") or []),
                "reason": figures.get("reason"),
                "outside": figures.get("outside"),
                "nmse": row["nmse"],
                "expected_nmse": row["expected_nmse"],
                "nmse_under": figures.get("nmse_under"),
                "expected_nmse_under": figures.get("expected_nmse_under"),
                "alternatives_tried": figures.get("alternatives_tried"),
                "best_alternative": figures.get("best_alternative"),
                "best_alternative_sample_nmse": figures.get("best_alternative_sample_nmse"),
            }
        )
    return found


def _is_unexplained(row: Mapping[str, Any]) -> bool:
    return row["corrupt"] or row["relation"] in UNEXPLAINED


def _blocks(summary: Document, rows: list[dict[str, Any]], post_norms: bool) -> dict[str, Any] | None:
    """What single blocks and rows show; None where no tensor was looked into."""
    totals = summary.get("blocks")
    if not totals or not totals["tensors"]:
        return None
    places = {row["tensor"]: row["place"] for row in rows}
    found = []
    for item in summary["block_findings"]:
        layer, op = op_of_tensor(item["tensor"], post_norms=post_norms)
        found.append(
            {
                "tensor": item["tensor"],
                "layer": layer,
                "op": op,
                "kind": item["kind"],
                "corrupt": item["corrupt"],
                "row": item["row"],
                "columns": list(item["columns"]),
                "statement": item["statement"],
                "evidence": dict(item["evidence"]),
            }
        )
    # The sort is stable: of a tensor the worst come first, as they were given.
    found.sort(key=lambda item: (not item["corrupt"], places[item["tensor"]]))
    return {
        "tensors": totals["tensors"],
        "blocks": totals["block_count"],
        "outlying_blocks": totals["outlying_blocks"],
        "outlying_rows": totals["outlying_rows"],
        "found": len(found),
        "findings": found[:BLOCKS_LISTED],
    }


def _by_dtype(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype_a"], row["dtype_b"]), []).append(row)
    table = []
    for (dtype_a, dtype_b), members in sorted(groups.items()):
        nmse = [row["nmse"] for row in members if row["nmse"] is not None]
        ratios = [ratio for row in members if (ratio := _over_expected(row)) is not None]
        table.append(
            {
                "dtype_a": dtype_a,
                "dtype_b": dtype_b,
                "tensors": len(members),
                "elements": sum(row["element_count"] for row in members),
                "nmse_median": median(nmse) if nmse else None,
                "nmse_max": max(nmse) if nmse else None,
                "nmse_over_expected_median": median(ratios) if ratios else None,
                "nmse_over_expected_max": max(ratios) if ratios else None,
            }
        )
    return table


def _over_expected(row: Mapping[str, Any]) -> float | None:
    """Return the measured NMSE over what the format's step sizes predict."""
    if row["nmse"] is None or not row["expected_nmse"]:
        return None
    return float(row["nmse"] / row["expected_nmse"])


def _badness(row: Mapping[str, Any]) -> tuple[int, float, int]:
    """Sort key: the least explained relation first, then the largest NMSE."""
    return (-RELATIONS.index(row["relation"]), -(row["nmse"] or 0.0), row["place"])


def _listed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    listed = {key: row.get(key) for key in _LISTED}
    return {**listed, "relation": row["relation"], "nmse_over_expected": _over_expected(row)}
