"""Where does it start: a trace replayed, judged by its floors, and the first op that stands out explained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from driftscope.analysis.capture_points import CaptureReport, capture_points
from driftscope.analysis.first_divergence import ALPHA, Flag, first_divergence, flags
from driftscope.analysis.floors import OP_KINDS, Floors
from driftscope.analysis.noise import COMPONENTS
from driftscope.analysis.skipped_layers import skipped_layers
from driftscope.artifacts.model import Artifact
from driftscope.errors import InputError
from driftscope.forward.arithmetic import Arithmetic

if TYPE_CHECKING:
    from driftscope.analysis.replay import Replayer
    from driftscope.engines.trace import Trace

NEARLY_AS_GOOD = 100.0
"""Times the residual of the best explanation that another one may leave to be told beside it."""

FITS = {"f32": 1e-11, "f16": 1e-7, "bf16": 1e-7}
"""Typical NMSE of the matmuls up to which an arithmetic explains all of them: the order of float32
sums or, where outputs are rounded, results that fall on the other side of a step."""


def diagnose(
    trace: Trace,
    own: Artifact,
    reference: Artifact | None = None,
    arithmetic: Arithmetic | None = None,
    floors: Floors | None = None,
    layers: Iterable[int] | None = None,
    threads: int = 1,
    *,
    path: str | None = None,
    alpha: float = ALPHA,
    rows: Sequence[Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Diagnose a trace; the entry of ``replay.json`` under ``paths``.

    Args:
        trace: the trace.
        own: the artifact whose weights the engine ran.
        reference: the artifact that holds the truth; None to judge the engine alone.
        arithmetic: what the engine computed in; None for what the trace declares, float32 if it says nothing.
        floors: None for what theory says, without calibration.
        layers: only these, -1 for embedding, final norm and head; None for all.
        threads: the result does not depend on it.
        path: what the entry is called; by default the trace's name.
        alpha: probability that a clean trace is flagged anywhere.
        rows: rows of the ``replay`` table where they are there already.
        progress: called with the ops replayed and their number.

    Returns:
        Plain values: ``status`` (``done`` or ``inadmissible`` with a ``reason``), ``tested`` (ops),
        ``flagged``, ``first`` with its class and statement, ``capture_points``, ``map`` (local errors by op),
        ``fits_better`` (another arithmetic, where most matmuls are flagged and it explains them, else None).
    """
    entry = {
        "path": path or trace.name,
        "engine": dict(trace.manifest.engine),
        "own": own.path.name,
        "reference": None if reference is None else reference.path.name,
        "arithmetic": None,
        "status": "done",
        "alpha": alpha,
        "prompts": len(trace.manifest.prompts),
    }
    declared = arithmetic or trace.manifest.arithmetic
    entry["arithmetic"] = None if declared is None else declared.to_dict()
    replayer = replayer_of(trace, own, reference, arithmetic=declared, threads=threads)
    try:
        if rows is None:
            rows = replay_rows(replayer, layers, progress=progress)
    except InputError as error:
        return {**entry, "status": "inadmissible", "reason": str(error)}
    if not rows:
        reason = "no op has both its output and its inputs in the trace: nothing was tested"
        return {**entry, "status": "inadmissible", "reason": reason}
    floors = floors or Floors({})
    flagged = flags(rows, floors, alpha, arithmetic=declared)
    seen = {(flag.place, flag.prompt) for flag in flagged}
    skipped = skipped_layers(replayer, rows, floors, alpha, arithmetic=declared)
    flagged += [flag for flag in skipped if (flag.place, flag.prompt) not in seen]
    tested = {(row["layer"], row["tap"], row["part"]) for row in rows}
    better = _fits_better(flagged, tested, trace, own, declared, threads)
    if better is None:
        captured = capture_points(trace, replayer, flagged, floors)
    else:
        # What consumers say of a tap holds in the arithmetic of the engine, and this is another one.
        captured = CaptureReport([], list(flagged), [])
    return {
        **entry,
        "tested": len(tested),
        "flagged": [_short(flag) for flag in captured.remaining],
        "first": _first(captured.remaining, rows, replayer, trace, own, reference, declared, threads, better),
        "capture_points": captured.findings,
        "fits_better": better,
        "map": local_map(rows),
    }


def replayer_of(
    trace: Trace,
    own: Artifact,
    reference: Artifact | None = None,
    *,
    arithmetic: Arithmetic | None = None,
    threads: int = 1,
) -> Replayer:
    """The replayer of a trace; without a reference there is no component ``model``."""
    from driftscope.analysis.replay import Replayer

    components = COMPONENTS if reference is not None else COMPONENTS[:2]
    return Replayer(
        trace,
        own,
        reference=reference,
        arithmetic=arithmetic or trace.manifest.arithmetic or Arithmetic.of(),
        components=components,
        threads=threads,
    )


def replay_rows(
    replayer: Replayer,
    layers: Iterable[int] | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Rows of the ``replay`` table, layer by layer, so that progress shows."""
    wanted = None if layers is None else sorted(set(layers))
    numbers = sorted({layer for layer, _, _ in replayer.places(wanted)})
    rows: list[dict[str, Any]] = []
    for index, layer in enumerate(numbers):
        rows += replayer.rows([layer])
        progress(index + 1, len(numbers))
    return rows


def local_map(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Local error of each op: medians over the prompts of each component's NMSE.

    The parts of q, k and v are put together. ``total`` is the sum of the components, without their cross
    terms; ``predicted`` what was predicted of it.
    """
    from driftscope.analysis.vote import topological

    sums: dict[tuple[int, str], dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        op = sums.setdefault((row["layer"], row["tap"]), {})
        at = op.setdefault(row["prompt"], {}).setdefault(row["component"], [0.0, 0.0, 0.0])
        for index, key in enumerate(("energy", "signal_energy", "predicted_energy")):
            at[index] += row[key] or 0.0
    found = []
    for place in topological(sums):
        prompts = list(sums[place].values())
        entry: dict[str, Any] = {"layer": place[0], "tap": place[1]}
        for component in COMPONENTS:
            entry[component] = _median(
                [
                    at[component][0] / at[component][1]
                    for at in prompts
                    if component in at and at[component][1]
                ]
            )
        measured = [entry[component] for component in COMPONENTS if entry[component] is not None]
        entry["total"] = sum(measured) if measured else None
        entry["predicted"] = _median(
            [sum(part[2] / part[1] for part in at.values() if part[1]) for at in prompts]
        )
        found.append(entry)
    return found


def _median(values: Sequence[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.median(finite)) if finite else None


def _short(flag: Flag) -> dict[str, Any]:
    keys = ("layer", "tap", "part", "component", "p_value", "nmse", "predicted_nmse", "prompt", "position")
    return {key: getattr(flag, key) for key in keys}


def _fits_better(
    flagged: Sequence[Flag],
    tested: Collection[tuple[int, str, str]],
    trace: Trace,
    own: Artifact,
    declared: Arithmetic | None,
    threads: int,
) -> dict[str, Any] | None:
    """What the engine computed in, where it is not what it is taken to have computed in."""
    from driftscope.analysis.arithmetic_guess import guess_arithmetic

    matmuls = {place for place in tested if OP_KINDS[place[1]] == "matmul"}
    off = {flag.place for flag in flagged if flag.component == "engine"} & matmuls
    if not matmuls or 2 * len(off) < len(matmuls):
        return None
    guess = guess_arithmetic(trace, own, threads=threads)
    if guess.products.status != "decided" or guess.arithmetic == (declared or Arithmetic.of()):
        return None
    left = guess.products.residuals[guess.products.winner]
    return guess.to_dict() if left <= FITS[guess.dtype] else None


def _first(
    flagged: Sequence[Flag],
    rows: Sequence[Mapping[str, Any]],
    replayer: Replayer,
    trace: Trace,
    own: Artifact,
    reference: Artifact | None,
    arithmetic: Arithmetic | None,
    threads: int,
    better: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    from driftscope.analysis.explanations import Context, explain

    first = first_divergence(flagged, rows)
    if first is None:
        return None
    if better is not None:
        statement = f"the matmuls are of another arithmetic than the declared one: {better['statement']}"
        evidence = {"fits_better": better["arithmetic"]}
        return {
            **first.to_dict(),
            "class": "unexplained",
            "statement": statement,
            "evidence": evidence,
            "others": [],
        }
    op = replayer.op(first.flag.layer, first.flag.tap, first.flag.part)
    context = Context(
        own=own,
        reference=reference,
        trace=trace,
        component=first.flag.component,
        replayer=replayer,
        arithmetic=arithmetic,
        rows=rows,
        threads=threads,
    )
    best, *others = [explanation.to_dict() for explanation in explain(op, context)]
    limit = NEARLY_AS_GOOD * max(best["residual_after"], best["evidence"].get("noise", 0.0))
    return {
        **first.to_dict(),
        **best,
        "others": [other for other in others if other["residual_after"] <= limit],
    }
