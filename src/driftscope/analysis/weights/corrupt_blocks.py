"""What findings in blocks mean for their tensors, and the document that brings them to their judge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from driftscope.analysis.weights.block_findings import ALPHA, LIMIT

CORRUPT = ("flipped-bit", "non-finite-scale")
"""Findings in blocks that no format and no quantizer leaves, however small the error of the whole tensor."""

CLASS = "corrupt-block"
"""Class of the fault of a tensor with such a finding."""

COUNTS = ("block_count", "outlying_blocks", "outlying_rows")

Finding = Mapping[str, Any]


def corrupt_tensors(found: Iterable[Finding]) -> dict[str, str]:
    """Name of each tensor that is corrupt, to the kind of its first finding that says so."""
    corrupt: dict[str, str] = {}
    for item in found:
        if item["kind"] in CORRUPT:
            corrupt.setdefault(item["tensor"], item["kind"])
    return corrupt


def block_document(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Findings of tensors as the evidence document ``blocks``.

    Args:
        tensors: `BlockFindings.to_dict` of each tensor that was looked into, in any order of them that does
            not depend on how the work was divided.

    Returns:
        ``alpha``, the rate of false alarms of each statistic; ``limit``, the most findings listed of a
        tensor; ``totals`` over all tensors; and ``tensors``.
    """
    return {
        "alpha": ALPHA,
        "limit": LIMIT,
        "totals": {
            "tensors": len(tensors),
            **{key: sum(item[key] for item in tensors) for key in COUNTS},
        },
        "tensors": [dict(item) for item in tensors],
    }


def findings_in(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All findings that a ``blocks`` document lists, tensor by tensor."""
    return [dict(finding) for tensor in document["tensors"] for finding in tensor["findings"]]
