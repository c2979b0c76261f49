"""What the tool says about a trace, and how large an effect is. Nothing here knows what was injected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.diagnosis import diagnose
from driftscope.analysis.floors import Floors
from driftscope.analysis.impact import impact_rows
from driftscope.analysis.replay import Replayer
from driftscope.artifacts.model import Artifact
from driftscope.engines.trace import Trace
from driftscope.faultbench.injection import Spot
from driftscope.forward.arithmetic import Arithmetic

Row = Mapping[str, Any]

ABOVE = 1e-3
"""An effect is above the floor where a clean op would show it less often than this, looked at alone."""

MATERIAL_KL = 1e-3
"""Or where it moves the next token's distribution by this much in the mean, nats, whatever the floor says."""

OVER_ROUNDING = 10.0
"""And by this many times what a last bit of the residual stream moves it: integer products step at roundings,
so that on a real model in Q4_K_M a last bit alone comes to some 1e-3 nats."""


@dataclass(frozen=True)
class Finding:
    """What the tool says.

    Attributes:
        rows: of the ``replay`` table.
        entry: of ``replay.json``: the diagnosis.
    """

    rows: Sequence[Row]
    entry: Mapping[str, Any]

    @property
    def first(self) -> Mapping[str, Any] | None:
        """The first divergence, or None."""
        found: Mapping[str, Any] | None = self.entry.get("first")
        return found

    @property
    def flagged(self) -> Sequence[Mapping[str, Any]]:
        """Every op that is flagged."""
        return list(self.entry.get("flagged") or ())

    @property
    def capture_points(self) -> Sequence[Mapping[str, Any]]:
        """Taps that were recorded elsewhere."""
        return list(self.entry.get("capture_points") or ())

    def summary(self) -> dict[str, Any] | None:
        """The first divergence in short, for the report."""
        if self.first is None:
            return None
        keys = ("layer", "tap", "part", "component", "statistic", "p_value", "class", "statement", "prompt")
        return {key: self.first.get(key) for key in keys}


def examine(
    trace: Trace,
    own: Artifact,
    reference: Artifact | None,
    floors: Floors,
    *,
    arithmetic: Arithmetic | None = None,
    layers: Iterable[int] | None = None,
    threads: int = 1,
) -> Finding:
    """Replay a trace and judge it.

    Args:
        trace: what an engine recorded.
        own: the model that the engine is taken to have run.
        reference: the model that holds the truth, or None to judge the engine alone.
        floors: what is noise.
        arithmetic: what the engine is taken to compute in; None for what the trace declares.
        layers: replay these alone, of which -1 is the embedding and the head; None for all.
        threads: the result does not depend on it.
    """
    declared = arithmetic or trace.manifest.arithmetic
    components = ("engine",) if reference is None else ("engine", "model")
    replayer = Replayer(
        trace, own, reference=reference, arithmetic=declared, components=components, threads=threads
    )
    rows = replayer.rows(layers)
    entry = diagnose(trace, own, reference, declared, floors, threads=threads, rows=rows)
    return Finding(rows, entry)


def kl_nats(clean: NDArray[np.float32], faulty: NDArray[np.float32]) -> tuple[float | None, int]:
    """Mean KL(clean || faulty) in nats over the positions where it is defined, and the number of the others.

    Args:
        clean: logits, ``float32[n_tokens, vocabulary]``.
        faulty: the same with the fault.
    """
    places = [("", position) for position in range(clean.shape[0])]
    rows = impact_rows(clean, faulty, np.full(clean.shape[0], -1), places, "clean|faulty")
    values = [row["kl"] for row in rows if row["kl"] is not None]
    return (float(np.mean(values)) if values else None), len(rows) - len(values)


@dataclass(frozen=True)
class Effect:
    """How large a fault is at the op where it sits.

    Attributes:
        over_predicted: largest measured energy over the predicted one, of the whole op, of one token or of
            one channel, over all prompts; None where none was measured, infinite where none was predicted.
        above_floor: whether a clean op would show as much less often than `ABOVE`, or the logits move by
            `MATERIAL_KL` and `OVER_ROUNDING` times `kl_rounding` or more.
        kl: mean KL(clean || faulty), nats, where it is defined; None where it is nowhere.
        kl_undefined: positions with a logit that is not finite.
        kl_rounding: the same divergence caused by last bits alone, where it was measured.
    """

    over_predicted: float | None
    above_floor: bool
    kl: float | None
    kl_undefined: int
    kl_rounding: float | None = None


def effect(
    rows: Sequence[Row],
    spot: Spot,
    component: str,
    floors: Floors,
    arithmetic: Arithmetic | None,
    kl: tuple[float | None, int],
    kl_rounding: float | None = None,
) -> Effect:
    """The effect of a fault, from the rows of the op that it was put into.

    Args:
        rows: of the ``replay`` table.
        spot: the op; an empty part stands for all parts.
        component: ``engine`` or ``model``.
        floors: what is noise.
        arithmetic: what the engine computes in.
        kl: from `kl_nats`.
        kl_rounding: mean KL that last bits alone cause, or None where it is not known.
    """
    here = [
        row
        for row in rows
        if (row["layer"], row["tap"], row["component"]) == (spot.layer, spot.tap, component)
        and spot.part in ("", row["part"])
    ]
    ratios: list[float] = []
    material = max(MATERIAL_KL, OVER_ROUNDING * (kl_rounding or 0.0))
    above = kl[1] > 0 or (kl[0] is not None and kl[0] >= material)
    for row in here:
        scores = [row[key] for key in ("score", "score_token", "score_channel") if row[key] is not None]
        ratios += [10.0 ** min(score, 300.0) for score in scores]
        unpredicted = not scores and row["energy"] > 0
        if row["non_finite"] or unpredicted:
            ratios.append(math.inf)
        tail = floors.tail_probability(row, arithmetic)
        above = above or bool(row["non_finite"]) or tail < ABOVE
    return Effect(max(ratios, default=None), above, *kl, kl_rounding)
