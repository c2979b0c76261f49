"""May the two sides be compared at all? Each check says what was asked and what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from driftscope.report.evidence import Document, ReportEvidence, not_run, plain
from driftscope.report.text import count, counted, listed
from driftscope.report.topology import tap_order

if TYPE_CHECKING:
    import polars as pl

_KEYS = ["prompt", "layer", "tap", "scope", "position"]
_POPULATION = ["token_count", "count", "capture_point"]


def admissibility_section(evidence: ReportEvidence) -> dict[str, Any]:
    """Return the ``admissibility`` section: every check, and `inadmissible` if one fails.

    A check that has nothing to check is ``not-run``; if all are, so is the section.
    """
    if given := evidence.get("admissibility"):
        return plain(given)
    traces = evidence.get("traces") or {}
    checks = [
        _same_tokens(evidence.get("headers") or {}, sorted(traces)),
        *_same_population(traces),
        _coverage(evidence.get("sweep_inventory")),
        _not_empty(evidence.get("divergence")),
    ]
    if any(check["status"] == "fails" for check in checks):
        status = "inadmissible"
    elif all(check["status"] == "not-run" for check in checks):
        return {**not_run("neither a sweep nor a trace is there to check"), "checks": checks}
    else:
        status = "admissible"
    return {"status": status, "checks": checks}


def _check(name: str, asked: str, holds: bool | None, found: str) -> dict[str, Any]:
    status = "not-run" if holds is None else "holds" if holds else "fails"
    return {"id": name, "status": status, "asked": asked, "found": found}


def _same_tokens(headers: Any, paths: list[str]) -> dict[str, Any]:
    """Compare the digests of the prompts' token ids that each trace names among its inputs."""
    asked = "all traces read the same token ids"
    digests: dict[str, str] = {}
    for path in paths:
        header = headers.get(f"trace/{path}.parquet")
        inputs = header.get("inputs", {}) if header else {}
        for name in sorted(inputs):
            if name.startswith("prompts"):
                digests[path] = inputs[name]
    if not digests or len(digests) < len(paths):
        return _check("same-token-ids", asked, None, "the traces' headers do not name their prompts")
    same = len(set(digests.values())) == 1
    found = (
        f"{counted(len(paths), 'trace')}, one digest"
        if same
        else "; ".join(f"{path}: {digest[:12]}" for path, digest in digests.items())
    )
    return _check("same-token-ids", asked, same, found)


def _same_population(traces: Any) -> list[dict[str, Any]]:
    """Compare what each statistic is over, tap by tap, between the first trace and every other."""
    asked_keys = "every trace has the same taps, token scopes and positions"
    asked_population = "each pair of statistics is over the same count at the same capture point"
    names = sorted(traces)
    if len(names) < 2:
        reason = "fewer than two traces"
        return [
            _check("same-taps", asked_keys, None, reason),
            _check("same-population", asked_population, None, reason),
        ]
    first = traces[names[0]].select([*_KEYS, *_POPULATION])
    unmatched: list[str] = []
    unlike: list[str] = []
    for name in names[1:]:
        other = traces[name].select([*_KEYS, *_POPULATION])
        for left, right, side in ((first, other, name), (other, first, names[0])):
            alone = left.join(right, on=_KEYS, how="anti")
            if alone.height:
                unmatched.append(f"{_places(alone)} not in {side}")
        both = first.join(other, on=_KEYS, how="inner", suffix="_other")
        for column in _POPULATION:
            differing = both.filter(both[column] != both[f"{column}_other"])
            if differing.height:
                unlike.append(f"{column} differs at {_places(differing)} between {names[0]} and {name}")
    statistics = f"{counted(first.height, 'statistic')} in each of {counted(len(names), 'trace')}"
    return [
        _check("same-taps", asked_keys, not unmatched and first.height > 0, listed(unmatched) or statistics),
        _check(
            "same-population",
            asked_population,
            not unlike and first.height > 0,
            listed(unlike) or f"count and capture point agree for all {count(first.height)} statistics",
        ),
    ]


def _places(frame: pl.DataFrame) -> str:
    pairs = sorted(set(frame.select("layer", "tap").iter_rows()), key=lambda pair: tap_order(*pair))
    return listed([f"layer {layer} {tap}" if layer >= 0 else tap for layer, tap in pairs], 2)


def _coverage(inventory: Document | None) -> dict[str, Any]:
    """A sweep that left a tensor out, or had none, says nothing about the model."""
    asked = "every tensor of the teacher is compared with one of the candidate"
    if not inventory or "coverage" not in inventory:
        return _check("coverage", asked, None, "no sweep")
    expected = int(inventory["coverage"]["expected"])
    compared = int(inventory["coverage"]["compared"])
    found = f"{count(compared)} of {counted(expected, 'tensor')} compared"
    if missing := list(inventory.get("missing") or []):
        found += f"; missing from the candidate: {listed(missing)}"
    return _check("coverage", asked, 0 < expected == compared and not missing, found)


def _not_empty(divergence: pl.DataFrame | None) -> dict[str, Any]:
    asked = "every compared tap has values on both sides"
    if divergence is None:
        return _check("not-empty", asked, None, "no traces were compared")
    empty = divergence.filter(divergence["compared_count"] == 0)
    found = (
        f"{_places(empty)} compared over no finite value"
        if empty.height
        else f"{counted(divergence.height, 'comparison')} over at least one value each"
    )
    return _check("not-empty", asked, divergence.height > 0 and not empty.height, found)
