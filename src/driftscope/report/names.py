"""Paths, pairs, places and components in words, for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driftscope.report.text import MISSING, counted

PAIR_NAMES = {
    "teacher.f32|candidate.f32": "What the weights change",
    "candidate.f32|candidate.int8-dot": "What the integer arithmetic changes",
    "teacher.f32|candidate.int8-dot": "Both together",
    "teacher.f32|candidate.llama.cpp": "The candidate as llama.cpp runs it",
    "candidate.int8-dot|candidate.llama.cpp": "What llama.cpp does otherwise than our integer path",
    "teacher.f32|teacher.transformers": "What transformers does otherwise than our f32 path",
}

COMPONENT_NAMES = {
    "engine": "What the engine does otherwise",
    "arithmetic": "What the declared arithmetic costs",
    "model": "What the weights change",
    "total": "All that each op adds",
}
COMPONENT_FORMULAS = {
    "engine": "recorded − declared: the op in the arithmetic that the trace declares",
    "arithmetic": "declared − exact: the same weights in float64",
    "model": "exact − reference: weights and hyperparameters of the teacher, in float64",
    "total": "recorded − reference: engine, arithmetic and model together",
}


def place_words(place: Mapping[str, Any] | None) -> str:
    """Write a layer and tap, with the part of the tap where one is named."""
    if place is None:
        return MISSING
    tap = f"{place['tap']} ({place['part']})" if place.get("part") else place["tap"]
    return tap if place["layer"] < 0 else f"layer {place['layer']}, {tap}"


def pair_words(pair: str) -> str:
    """Write a pair of paths, the reference first."""
    left, _, right = pair.partition("|")
    return f"{path_words(left)} → {path_words(right)}"


def path_words(path: str) -> str:
    """Write a path as words: whose weights, and what runs them."""
    return path.replace(".", " ", 1)


def divergence_line(local: Mapping[str, Any]) -> str:
    """Say in one line where the first divergence is, or that there is none.

    Args:
        local: the report's ``divergence.local``.
    """
    if local["status"] != "done":
        return f"Local errors: {local['status']}: {local.get('reason', 'no reason given')}"
    done = [path for path in local.get("paths") or [] if path["status"] == "done"]
    fault = local.get("fault")
    if fault:
        at = f"{fault['path']}, {place_words(fault)} ({fault['component']})"
        said = f"First divergence: {at}: {fault['class']}"
        return f"{said}. {fault['statement']}" if fault["statement"] else said
    ops = sum(path["tested"] for path in done)
    return f"First divergence: none; {counted(ops, 'op')} of {counted(len(done), 'path')} at their floor"
