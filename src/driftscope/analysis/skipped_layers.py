"""Layers of which a trace has nothing, and which were not run.

A layer that an engine leaves out leaves no taps. Replay then computes it for the op that reads its output
and allows that op for all the roundings in between, which can hide how far off it is. So the reader is asked
directly: where its output follows from the residual stream before the gap, the layers between did not run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from driftscope.analysis.first_divergence import Flag, flag_of
from driftscope.analysis.floors import Floors
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.policy import WHOLE_MODEL

if TYPE_CHECKING:
    from driftscope.analysis.replay import Replayer

SKIPPED = "skipped"
"""The statistic of such a flag."""

_FARTHER = 100.0
"""NMSE with the layers over NMSE without them, from which on they were certainly not run."""


def skipped_layers(
    replayer: Replayer,
    rows: Sequence[Mapping[str, Any]],
    floors: Floors,
    alpha: float,
    *,
    arithmetic: Arithmetic | None = None,
) -> list[Flag]:
    """Flags of ops that read past layers of which there is no tap.

    Args:
        replayer: of the trace.
        rows: its rows of the ``replay`` table.
        floors: what is noise.
        alpha: an op whose error is rarer than this does not follow from what it is asked about.
        arithmetic: what the trace was computed in.

    Returns:
        One flag a prompt and gap; none where the trace merely does not say what the layers did.
    """
    from driftscope.analysis.replay import Replayer, op_rows

    trace, found = replayer.trace, []
    for before, after in _gaps(replayer):
        source = (before, "post_ffn_residual") if before >= 0 else (WHOLE_MODEL, "embedding")
        last = after == replayer.config.num_layers
        reader = (WHOLE_MODEL, "final_norm") if last else (after, "attn_norm")
        if not (trace.has(*source) and trace.has(*reader)):
            continue
        past = Replayer(
            trace,
            replayer.own,
            arithmetic=replayer.arithmetic,
            components=("engine",),
            overrides={(after - 1, "post_ffn_residual"): trace.tap(*source)},
        )
        without = {
            row["prompt"]: row for row in op_rows(past.op(*reader), trace, past.components, trace.name)
        }
        for row in rows:
            if (row["layer"], row["tap"], row["component"]) != (*reader, "engine"):
                continue
            other = without.get(row["prompt"])
            if other is None or row["nmse"] is None or other["nmse"] is None:
                continue
            if floors.tail_probability(other, arithmetic) > alpha and row["nmse"] > _FARTHER * other["nmse"]:
                found.append(replace(flag_of(row, "score", 0.0, 0.0), statistic=SKIPPED))
    return found


def _gaps(replayer: Replayer) -> list[tuple[int, int]]:
    """The recorded layers on both sides of each run of layers without a tap; -1 and the count at the ends."""
    recorded = sorted({layer for layer, _ in replayer.trace.places if layer >= 0})
    if not recorded:
        return []
    edges = [-1, *recorded, replayer.config.num_layers]
    return [(a, b) for a, b in itertools.pairwise(edges) if b - a > 1]
