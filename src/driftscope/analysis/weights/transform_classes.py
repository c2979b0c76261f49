"""Which class of fault an undeclared transform is, in the vocabulary that the replay names faults by."""

from __future__ import annotations

from driftscope.analysis.weights.relations import Relation
from driftscope.artifacts.model import ModelConfig

_OF_BEGINNING = (
    ("transposed", "transposed"),
    ("offset", "norm-offset"),
    ("scaled", "scale-dropped"),
    ("tied", "head-tie"),
    ("other-layer", "other-layer"),
    ("other-tensor", "other-tensor"),
)


def fault_class(relation: Relation, config: ModelConfig) -> str | None:
    """The class of what is wrong with a tensor, or None where nothing is or nothing is known of it.

    Args:
        relation: of the tensor.
        config: the teacher's, for the number of heads that the rows of q and k should have.
    """
    if relation.match in ("missing", "non-finite"):
        return {"missing": "missing-tensor"}.get(relation.match, relation.match)
    if relation.holds or not relation.transforms or relation.match == "different":
        return None
    name = relation.transforms[-1]
    if name.startswith(("rows-interleaved", "rows-deinterleaved")):
        heads = config.num_heads if ".q_proj." in relation.tensor else config.num_kv_heads
        once = "+" not in name and name.endswith(f"interleaved({heads})")
        return "row-permutation" if once else "row-permutation-heads"
    if {_projection(name), _projection(relation.tensor)} == {"gate_proj", "up_proj"}:
        return "gate-up-swapped"
    return next((class_ for begin, class_ in _OF_BEGINNING if name.startswith(begin)), "transform")


def _projection(name: str) -> str:
    return next((part for part in ("gate_proj", "up_proj") if part in name), "")
