"""Two models, tensor by tensor: one document that says whether the second is the first, and what is not.

`driftscope.analysis.weights.sweep` measures and relates; here the tensors are chosen, bounds that a user
set are held against them, and the worst come first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from driftscope.analysis.finite import finite
from driftscope.analysis.weights.rounded_copy import is_coarser
from driftscope.analysis.weights.sweep import (
    Band,
    Pair,
    Relations,
    compare_tensor,
    inventory,
    pairs,
    relate,
    summarise,
)
from driftscope.analysis.weights.thresholds import Threshold, metric_of
from driftscope.analysis.weights.watched_kernels import WatchedKernels
from driftscope.artifacts.model import Artifact
from driftscope.errors import InputError
from driftscope.kernels.device import Kernels, kernels_on

SCHEMA_VERSION = 1

Progress = Callable[[int, int], None]
Document = dict[str, Any]


def diff_models(
    a: Artifact,
    b: Artifact,
    *,
    band: Band,
    only: re.Pattern[str] | None = None,
    thresholds: Sequence[Threshold] = (),
    kernels: Kernels | None = None,
    progress: Progress = lambda done, total: None,
) -> Document:
    """Compare two models in one pass over their bytes.

    Args:
        a: the reference.
        b: the model under test.
        band: measured over expected NMSE that a format explains.
        only: compares the tensors in whose canonical or stored names it is found.
        thresholds: a tensor that one of them matches is judged by them and no longer by its relation; one
            that was not compared, or holds a value that is not finite or a flipped bit, never holds.
        kernels: where to compare.
        progress: called with bytes done and bytes in all.

    Returns:
        The document of ``report/diff.schema.json``; `tensors` are worst first. `holds` asks for every tensor
        and for hyperparameters that give the same forward pass.

    Raises:
        InputError: nothing matches `only`, or a threshold matches no tensor that is compared.
    """
    found = pairs(a, b)
    chosen = [pair for pair in found if only is None or _matches(only, pair)]
    listed = _chosen_of(inventory(a, b), a, b, only, chosen)
    if only is not None and not chosen and not listed["missing"] and not listed["extra"]:
        raise InputError(f"--only {only.pattern!r}: matches no name of {len(found)} tensors")
    matched = [_matched_by(threshold, chosen) for threshold in thresholds]
    total = sum(pair.nbytes for pair in chosen)
    kernels = kernels or kernels_on("cpu")
    rows: list[Document] = []
    off: list[Document] = []
    done = 0
    progress(0, total)
    for pair in chosen:
        watched = WatchedKernels(kernels)
        row = compare_tensor(pair.a, pair.b, tensor=pair.tensor, kernels=cast(Kernels, watched))
        off += watched.findings(pair.a, pair.b, pair.tensor)
        rows.append({**row, "stored_a": pair.a.stored_name, "stored_b": pair.b.stored_name})
        done += pair.nbytes
        progress(done, total)
    relations = relate(rows, listed, band, a, b, kernels=kernels)
    summary = summarise(rows, listed, relations, off)
    summary["share"] = _share(found, chosen)
    bounds = _bounds(thresholds, matched, rows)
    tensors = _judged(rows, relations, bounds, summary["corrupt"])
    summary["allows_for_a"] = any(_allows_for_a(row) for row in tensors)
    document = {
        "schema_version": SCHEMA_VERSION,
        "a": _described(a),
        "b": _described(b),
        "only": None if only is None else only.pattern,
        "thresholds": bounds,
        "holds": _holds(summary, listed, tensors),
        "summary": summary,
        "inventory": listed,
        "tensors": sorted(tensors, key=_worst_first),
    }
    return {key: finite(value) for key, value in document.items()}


def _matches(pattern: re.Pattern[str], pair: Pair) -> bool:
    names = (pair.tensor, pair.a.name, pair.a.stored_name, pair.b.name, pair.b.stored_name)
    return any(pattern.search(name) for name in names)


def _matched_by(threshold: Threshold, chosen: Sequence[Pair]) -> set[str]:
    """Names of the tensors that a threshold is about."""
    names = {pair.tensor for pair in chosen if _matches(threshold.pattern, pair)}
    if not names:
        raise InputError(f"--threshold {threshold.text!r}: matches no name of {len(chosen)} compared tensors")
    return names


def _chosen_of(
    listed: Document, a: Artifact, b: Artifact, only: re.Pattern[str] | None, chosen: Sequence[Pair]
) -> Document:
    """The inventory of the chosen tensors."""
    if only is None:
        return listed

    def kept(names: Sequence[str], artifact: Artifact | None) -> list[str]:
        def stored(name: str) -> str:
            return artifact.tensors[name].stored_name if artifact and name in artifact.tensors else name

        return [name for name in names if only.search(name) or only.search(stored(name))]

    missing = kept(listed["missing"], a)
    return {
        **listed,
        "missing": missing,
        "extra": kept(listed["extra"], b),
        "unmapped_a": kept(listed["unmapped_a"], None),
        "unmapped_b": kept(listed["unmapped_b"], None),
        "coverage": {
            "expected": len(chosen) + len(missing),
            "compared": sum(pair.a.shape == pair.b.shape for pair in chosen),
        },
    }


def _share(found: Sequence[Pair], chosen: Sequence[Pair]) -> Document:
    """How much of what both models have was chosen: tensors and bytes of both sides."""
    return {
        "tensors": len(chosen),
        "tensors_in_all": len(found),
        "bytes": sum(pair.nbytes for pair in chosen),
        "bytes_in_all": sum(pair.nbytes for pair in found),
    }


def _bounds(
    thresholds: Sequence[Threshold], matched: Sequence[set[str]], rows: Sequence[Document]
) -> list[Document]:
    """What became of each threshold."""
    return [
        {
            "text": threshold.text,
            "metric": threshold.metric,
            "comparator": threshold.comparator,
            "value": threshold.value,
            "matched": sorted(names),
            "broken": sorted(
                row["tensor"] for row in rows if row["tensor"] in names and not threshold.holds(row)
            ),
        }
        for threshold, names in zip(thresholds, matched, strict=True)
    ]


def _judged(
    rows: Sequence[Document], relations: Relations, bounds: Sequence[Document], corrupt: Mapping[str, str]
) -> list[Document]:
    """The rows with their relation, by what each was judged and whether it holds."""
    bounded = {name for bound in bounds for name in bound["matched"]}
    broken = {name for bound in bounds for name in bound["broken"]}
    by_tensor = relations.by_tensor
    judged = []
    for row in rows:
        name = row["tensor"]
        relation = by_tensor[name].to_dict()
        by = "threshold" if name in bounded else "relation"
        finite = row["compared_count"] == row["element_count"] > 0
        holds = finite and name not in broken if by == "threshold" else relation["holds"]
        judged.append(
            {
                **row,
                "nmse_over_expected": metric_of(row, "nmse_over_expected"),
                **{key: relation[key] for key in ("relation", "kind", "transforms", "expected", "evidence")},
                "judged_by": by,
                "corrupt": corrupt.get(name),
                "holds": holds and name not in corrupt,
            }
        )
    return judged


def _allows_for_a(row: Mapping[str, Any]) -> bool:
    """Whether a's own steps are part of the error that a relation rests on."""
    judged = row["judged_by"] == "relation" and row["kind"] == "quantized-from"
    return judged and is_coarser(row["dtype_a"], row["dtype_b"])


def _holds(summary: Document, listed: Document, tensors: Sequence[Document]) -> bool:
    """Whether b is a: all there is was compared and holds, and the same forward pass reads it."""
    if any(item["changes"] == "forward-pass" for item in listed["metadata_differences"]):
        return False
    if any(row["judged_by"] == "threshold" for row in tensors):
        whole = summary["conclusion"] not in ("failure", "incomplete")
        return whole and all(row["holds"] for row in tensors)
    return bool(summary["holds"]) and all(row["holds"] for row in tensors)


def _worst_first(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What does not hold, then what was not compared, then the largest error for its format."""
    ratio = row["nmse_over_expected"]
    excess = -1.0 if ratio is None else ratio
    nmse = math.inf if row["nmse"] is None else row["nmse"]
    return (row["holds"], row["kind"] == "identical", -excess, -nmse, row["tensor"])


def _described(artifact: Artifact) -> Document:
    tensors = artifact.tensors.values()
    return {
        "path": str(artifact.path),
        "container": artifact.container,
        "architecture": artifact.config.architecture,
        "tensors": len(artifact.tensors),
        "parameters": sum(tensor.n_elements for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "formats": dict(sorted(Counter(tensor.dtype for tensor in tensors).items())),
    }
