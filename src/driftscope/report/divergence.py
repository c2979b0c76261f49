"""The ``divergence`` section: propagated error of each pair of traces, by layer and tap, and the replay."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from driftscope.report.evidence import ReportEvidence, not_run
from driftscope.report.local import local_section
from driftscope.report.propagation import propagation_section
from driftscope.report.topology import pair_order, tap_order

if TYPE_CHECKING:
    import polars as pl

_SCOPES = ("all-but-first", "all", "last")


def divergence_section(evidence: ReportEvidence) -> dict[str, Any]:
    """Return the ``divergence`` section, or ``not-run`` where no traces were compared.

    Each cell of a pair's map is the median over the prompts of the tap's NMSE. The scope leaves the first
    token out where every prompt has more than one, because one massive activation there dominates a pool.
    """
    frame = evidence.get("divergence")
    replay, parts = evidence.get("replay"), propagation_section(evidence.get("propagation"))
    if frame is None:
        local = local_section(replay, [])
        return {**not_run("no two traces were compared"), "local": local, "propagation": parts}
    propagated = frame.filter(frame["kind"] == "propagated")
    pairs = [_pair(str(pair), part) for (pair,), part in propagated.group_by("pair", maintain_order=True)]
    pairs.sort(key=lambda pair: pair_order(pair["pair"]))
    return {
        "status": "done" if pairs else "not-run",
        **({} if pairs else {"reason": "the divergence table holds no propagated error"}),
        "kind": "propagated",
        "statistic": "median over prompts of NMSE = sum (b - a)^2 / sum a^2",
        "pairs": pairs,
        "non_finite": _first_non_finite(evidence.get("traces") or {}),
        "local": local_section(replay, pairs),
        "propagation": parts,
    }


def _pair(pair: str, frame: pl.DataFrame) -> dict[str, Any]:
    prompts = sorted(frame["prompt"].unique().to_list())
    scope = _scope(frame, prompts)
    rows = frame.filter(frame["scope"] == scope)
    tokens = {row["prompt"]: row["token_count"] for row in rows.iter_rows(named=True)}
    cells: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows.iter_rows(named=True):
        cells.setdefault((row["layer"], row["tap"]), []).append(row)
    order = sorted(cells, key=lambda place: tap_order(*place))
    table = [_cell(layer, tap, cells[layer, tap]) for layer, tap in order]
    differing = [cell for cell in table if cell["nmse"] is None or cell["nmse_max"] > 0.0]
    return {
        "pair": pair,
        "scope": scope,
        "prompts": len(prompts),
        "tokens": sum(tokens.values()),
        "taps": len(table),
        "identical_taps": len(table) - len(differing),
        "first_differing": _place(differing[0]) if differing else None,
        "largest": _place(max(differing, key=lambda cell: cell["nmse"] or 0.0)) if differing else None,
        "logits": next((_place(cell) for cell in table if cell["tap"] == "lm_head"), None),
        "map": table,
    }


def _first_non_finite(traces: Mapping[str, pl.DataFrame]) -> dict[str, Any] | None:
    """Name the first tap where a path of the candidate has NaN or infinities that the teacher has not."""
    teacher = next((traces[path] for path in sorted(traces) if path.startswith("teacher.")), None)
    found = []
    for path in sorted(traces):
        if teacher is None or path.startswith("teacher."):
            continue
        keys = ["prompt", "layer", "tap", "scope", "position"]
        pooled = traces[path].filter(traces[path]["scope"] == "all")
        both = pooled.join(teacher, on=keys, how="inner", suffix="_teacher")
        for row in both.iter_rows(named=True):
            extra = row["nan_count"] + row["inf_count"] - row["nan_count_teacher"] - row["inf_count_teacher"]
            if extra > 0:
                place = {"path": path, "prompt": row["prompt"], "layer": row["layer"], "tap": row["tap"]}
                found.append({**place, "count": extra})
    return min(found, key=lambda item: (tap_order(item["layer"], item["tap"]), item["path"]), default=None)


def _scope(frame: pl.DataFrame, prompts: list[str]) -> str:
    """Return the first scope that every prompt has."""
    for scope in _SCOPES:
        if frame.filter(frame["scope"] == scope)["prompt"].n_unique() == len(prompts):
            return scope
    return "all"


def _cell(layer: int, tap: str, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    values = [row["nmse"] for row in rows if row["nmse"] is not None]
    return {
        "layer": layer,
        "tap": tap,
        "nmse": median(values) if values else None,
        "nmse_max": max(values) if values else None,
        "count": sum(row["count"] for row in rows),
        "compared_count": sum(row["compared_count"] for row in rows),
    }


def _place(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {key: cell[key] for key in ("layer", "tap", "nmse")}
