"""What a table of tensor differences cannot show: tensors without a counterpart, unlike metadata."""

from __future__ import annotations

from typing import Any

from driftscope.analysis.metadata.differences import metadata_differences
from driftscope.analysis.weights.pairs import pairs
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import COMPUTED


def inventory(a: Artifact, b: Artifact) -> dict[str, Any]:
    """List missing, extra and unmapped tensors, and what differs in the metadata.

    Returns:
        ``missing``: names in a and not in b; ``extra``: names in b and not in a; ``unmapped_a`` and
        ``unmapped_b``: stored names without a canonical one; ``metadata_differences``: see
        `driftscope.analysis.metadata.differences`; ``coverage``: ``expected`` tensors of a, and the
        ``compared`` ones: in both, with the same shape.
    """
    found = pairs(a, b)
    paired = {pair.tensor for pair in found}
    missing = [name for name in a.tensors if name not in paired and name not in COMPUTED]
    return {
        "missing": missing,
        # Frequencies of RoPE are hyperparameters, which another container keeps in its configuration.
        "extra": [name for name in b.tensors if name not in paired and name not in COMPUTED],
        "unmapped_a": sorted(a.unmapped),
        "unmapped_b": sorted(b.unmapped),
        "metadata_differences": metadata_differences(a, b),
        "coverage": {
            "expected": len(found) + len(missing),
            "compared": sum(pair.a.shape == pair.b.shape for pair in found),
        },
    }
