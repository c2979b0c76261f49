"""Our own forward pass as an engine: the three paths of a case, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from driftscope.errors import InputError
from driftscope.forward.policy import Policy

if TYPE_CHECKING:
    from driftscope.artifacts.model import Artifact
    from driftscope.forward.model import ForwardPass

PATHS: Mapping[str, Policy] = {
    "teacher.f32": Policy.uniform("teacher", "f32"),
    "candidate.f32": Policy.uniform("candidate", "f32"),
    "candidate.int8-dot": Policy.uniform("candidate", "int8-dot"),
}
"""``<role>.<arithmetic>`` to the policy that it means."""


def policy_of(path: str) -> Policy:
    """The policy of a path.

    Raises:
        InputError: no such path.
    """
    if path not in PATHS:
        raise InputError(f"path {path!r} is unknown; expected one of {', '.join(PATHS)}")
    return PATHS[path]


def forward_pass(
    artifacts: Mapping[str, Artifact], path: str, *, threads: int = 1, device: str = "cpu"
) -> ForwardPass:
    """A pass along a path.

    Args:
        artifacts: by role, ``teacher`` and ``candidate``; the one that the path does not use may be left out.
        path: one of `PATHS`.
        threads: number of threads; the result does not depend on it.
        device: ``cpu`` or ``cuda``.
    """
    # Here, so that the names of the paths can be had without compiling kernels.
    from driftscope.forward.model import ForwardPass

    return ForwardPass(artifacts, policy_of(path), threads=threads, device=device)
