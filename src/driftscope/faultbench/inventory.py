"""Tensors that a converter drops or renames: what is asked before anything is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from driftscope.analysis.weights.sweep import inventory
from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import layer_of
from driftscope.errors import InputError
from driftscope.faultbench.edited import without_tensors
from driftscope.faultbench.injection import Site
from driftscope.faultbench.result import Setting
from driftscope.faultbench.weights import tensor
from driftscope.forward.policy import WHOLE_MODEL

CLASS = "missing-tensor"


@dataclass(frozen=True)
class InventoryFault:
    """One way to lose tensors.

    Attributes:
        name: short and unique.
        says: the loss in words.
        artifact: the model without them.
        lost: their canonical names.
    """

    name: str
    says: str
    artifact: Callable[[Site], Artifact]
    lost: Callable[[Site], frozenset[str]]


def _one(site: Site) -> frozenset[str]:
    return frozenset({tensor(site.layer, "up")})


def _layer(site: Site) -> frozenset[str]:
    prefix = f"model.layers.{site.config.num_layers - 1}."
    return frozenset(name for name in site.artifact.tensors if name.startswith(prefix))


def _all(site: Site) -> frozenset[str]:
    return frozenset(site.artifact.tensors)


def _dropped(lost: Callable[[Site], frozenset[str]]) -> Callable[[Site], Artifact]:
    return lambda site: without_tensors(site.artifact, set(lost(site)))


def _renamed(site: Site) -> Artifact:
    """Every tensor under a name that no reader knows."""
    gone = without_tensors(site.artifact, set(site.artifact.tensors))
    return dataclasses.replace(gone, unmapped=tuple(f"transformer.{name}" for name in site.artifact.tensors))


FAULTS = (
    InventoryFault("one-dropped", "up_proj of one layer dropped", _dropped(_one), _one),
    InventoryFault("layer-dropped", "all tensors of the last layer dropped", _dropped(_layer), _layer),
    InventoryFault("all-renamed", "every tensor under another name: nothing left to compare", _renamed, _all),
)
"""What is lost, F07."""


def look(site: Site, faulty: Artifact) -> dict[str, Any]:
    """What the tool says of a model's inventory.

    Returns:
        ``missing`` (names), ``expected`` and ``compared`` (tensors that should and would be compared),
        ``refused`` (why no forward pass is made, or None).
    """
    found = inventory(site.teacher, faulty)
    try:
        check_complete(faulty)
        refused = None
    except InputError as error:
        refused = str(error)
    coverage = found["coverage"]
    return {
        "missing": list(found["missing"]),
        "expected": coverage["expected"],
        "compared": coverage["compared"],
        "refused": refused,
    }


def row(setting: Setting, fault: InventoryFault, site: Site) -> dict[str, Any]:
    """The row of a lost tensor; found are the first name that is missing, and why nothing is run."""
    lost, found = fault.lost(site), look(site, fault.artifact(site))
    named = set(found["missing"]) == lost
    first = min(lost)
    statement = f"{found['compared']} of {found['expected']} tensors can be compared; {found['refused']}"
    return {
        **setting.to_dict(),
        "status": "run",
        "reason": "",
        "expected": {"layer": _layer_of(first), "tap": first, "part": "", "class": CLASS, "also": []},
        "effect": {
            "kl": None,
            "kl_undefined": 0,
            "kl_rounding": None,
            "over_predicted": None,
            "unpredicted": True,
            "above_floor": True,
        },
        "detected": bool(found["missing"]) and found["compared"] < found["expected"],
        "layer_right": named,
        "op_right": named,
        "class_right": named and found["refused"] is not None,
        "found": {
            "layer": _layer_of(first),
            "tap": min(found["missing"], default=None),
            "part": "",
            "component": "model",
            "statistic": "coverage",
            "p_value": 0.0,
            "class": CLASS if found["missing"] else None,
            "statement": statement,
            "prompt": "",
        },
        "flags": len(found["missing"]),
        "capture_points": [],
    }


def _layer_of(name: str) -> int:
    layer = layer_of(name)
    return WHOLE_MODEL if layer is None else layer
