"""The tensor-diff sweep, from one door: what is compared, the row of a tensor, its relation, the summary.

Measuring (`compare_tensor`, `inventory`) and judging (`relate`, `summarise`) are apart: the band that makes
an error the one that a format predicts comes in as an argument.
"""

from __future__ import annotations

from driftscope.analysis.metadata.differences import metadata_differences
from driftscope.analysis.weights.inventory import inventory
from driftscope.analysis.weights.pairs import Pair, pairs, plan_shards
from driftscope.analysis.weights.relate import relate
from driftscope.analysis.weights.relations import Band, Relation, Relations, relation_of
from driftscope.analysis.weights.summary import summarise
from driftscope.analysis.weights.tensor_comparison import compare_tensor, published_status

__all__ = [
    "Band",
    "Pair",
    "Relation",
    "Relations",
    "compare_tensor",
    "inventory",
    "metadata_differences",
    "pairs",
    "plan_shards",
    "published_status",
    "relate",
    "relation_of",
    "summarise",
]
