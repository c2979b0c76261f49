"""What can be wrong with a projection in places: scales, zero points, one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from driftscope.analysis.explanations.base import Candidate, Case

HYPOTHESES: tuple[Callable[[Case], Iterator[Candidate]], ...] = ()
