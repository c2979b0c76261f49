"""The tensor-diff sweep, from one door: what is compared, the row of a tensor, its relation, the summary.

Measuring (`compare_tensor`, `inventory`) and judging (`relate`, `summarise`) are apart: the band that makes
an error the one that a format predicts comes in as an argument.
"""

from __future__ import annotations

from driftscope.analysis.inventory import inventory
from driftscope.analysis.metadata import metadata_differences
from driftscope.analysis.pairs import Pair, pairs, plan_shards
from driftscope.analysis.relate import relate
from driftscope.analysis.relations import Band, Relation, Relations, relation_of
from driftscope.analysis.sweep_summary import summarise
from driftscope.analysis.tensor_comparison import compare_tensor, published_status

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
