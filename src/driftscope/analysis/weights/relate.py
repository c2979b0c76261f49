"""The relations of a pair: rows judged by themselves first, then what is left looked at again.

What is left is read again only where it may be found: a pair of two trainings is recognised by its
distribution, and by a few tensors that no transform explains, before 300 tensors are searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from driftscope.analysis.weights.linear_relation import linear_relation
from driftscope.analysis.weights.pairs import pairs
from driftscope.analysis.weights.relations import Band, Relation, Relations, relation_of
from driftscope.analysis.weights.trainings import judge_training, may_be_two_trainings, spread
from driftscope.analysis.weights.transform_classes import fault_class
from driftscope.artifacts.names import layer_of

if TYPE_CHECKING:
    from driftscope.analysis.weights.transform_search import TransformSearch
    from driftscope.artifacts.model import Artifact
    from driftscope.kernels.device import Kernels

Row = Mapping[str, Any]

PROBED = 8
"""Tensors that are searched before it is said that a whole model differs."""


def relate(
    rows: Iterable[Row],
    inventory: Row,
    band: Band,
    a: Artifact | None = None,
    b: Artifact | None = None,
    *,
    kernels: Kernels | None = None,
) -> Relations:
    """Name the relation of every tensor of a pair.

    Args:
        rows: the rows of the sweep.
        inventory: see `driftscope.analysis.weights.inventory`.
        band: measured over expected NMSE that makes a tensor ``quantized-from``.
        a: the teacher; with b, tensors that nothing explains are read again under transforms. Without them
            such tensors stay ``different``.
        b: the candidate.
        kernels: where to compare what is read again; by default on the CPU with one thread.
    """
    rows = list(rows)
    found = {row["tensor"]: relation_of(row, band) for row in rows}
    linear = {row["tensor"]: linear_relation(row, found[row["tensor"]], band) for row in rows}
    searched = {"tensors": 0, "alternatives": 0}
    pair_of = None
    if a is not None and b is not None:
        pair_of = {pair.tensor: pair for pair in pairs(a, b)}
        if any(item.match == "different" for item in found.values()):
            from driftscope.analysis.weights.transform_search import TransformSearch
            from driftscope.kernels.device import kernels_on

            search = TransformSearch(a, b, band, kernels or kernels_on("cpu"))
            names = [name for name, item in found.items() if item.match == "different" and name in pair_of]
            unexplained = [name for name in names if linear[name].match == "different"]
            for name in _worth_searching(rows, names, unexplained, search, found, pair_of):
                found[name] = search.search(pair_of[name], found[name])
            searched = {"tensors": search.tensors, "alternatives": search.alternatives}
    # One factor is the explanation of last resort: a transform that fits says more.
    for name, item in linear.items():
        if found[name].match == "different" and item.match != "different":
            found[name] = item
    different = {name for name, item in found.items() if item.match == "different"}
    alone = [
        *(Relation(name, "missing") for name in inventory["missing"]),
        *(Relation(name, "extra") for name in inventory["extra"]),
    ]
    tensors = [*found.values(), *alone]
    if a is not None:
        tensors = [replace(item, fault=fault_class(item, a.config)) for item in tensors]
    return Relations(band, tuple(tensors), judge_training(rows, different, pair_of), searched)


def _worth_searching(
    rows: Sequence[Row],
    names: Sequence[str],
    unexplained: Sequence[str],
    search: TransformSearch,
    found: dict[str, Relation],
    pair_of: Mapping[str, Any],
) -> list[str]:
    """Tensors still to search, those of one kind together; the probes are searched here.

    Where nearly all matrices differ and no probe is explained, nothing more is worth it.
    """
    ordered = sorted(names, key=_by_kind)
    if not may_be_two_trainings(rows, set(unexplained)):
        return ordered
    probes = sorted(spread(list(unexplained), PROBED), key=_by_kind)
    for name in probes:
        found[name] = search.search(pair_of[name], found[name])
    if not any(found[name].match != "different" for name in probes):
        return []
    return [name for name in ordered if name not in probes]


def _by_kind(tensor: str) -> tuple[str, int]:
    layer = layer_of(tensor)
    return (tensor, -1) if layer is None else (tensor.removeprefix(f"model.layers.{layer}."), layer)
