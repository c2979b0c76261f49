"""What an op does wrong: named faults, each tried on the op's own recorded inputs.

``explain`` is the way in; `driftscope.analysis.explanations.registry` lists what is tried on which op.
"""

from __future__ import annotations

from driftscope.analysis.explanations.base import CLASSES, Context, Explanation
from driftscope.analysis.explanations.localise import localise
from driftscope.analysis.explanations.registry import explain

__all__ = ["CLASSES", "Context", "Explanation", "explain", "localise"]
