"""The ``divergence.propagation`` section: what each layer adds to the error and what it hands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from driftscope.report.evidence import not_run
from driftscope.report.topology import pair_order, tap_order

if TYPE_CHECKING:
    import polars as pl

_PARTS = ("energy_in", "injected", "inherited", "remainder", "cross", "energy_out")


def propagation_section(frame: pl.DataFrame | None) -> dict[str, Any]:
    """Return the ``divergence.propagation`` section, or ``not-run`` where it was not measured.

    Energies are sums over the tokens of all prompts, divided by the energy of the reference's output there:
    the parts of a step then add up to its NMSE. The first token of each prompt stands apart.
    """
    if frame is None:
        return not_run("no error was followed from layer to layer")
    pairs = [_pair(str(pair), part) for (pair,), part in frame.group_by("pair", maintain_order=True)]
    pairs = [pair for pair in pairs if pair["steps"] or pair["first_token"]]
    if not pairs:
        return not_run("the table of propagated parts holds no layer")
    return {
        "status": "done",
        "statistic": "sum over tokens of energy / sum over tokens of the reference's energy",
        "pairs": sorted(pairs, key=lambda pair: pair_order(pair["pair"])),
    }


def _pair(pair: str, frame: pl.DataFrame) -> dict[str, Any]:
    rows = list(frame.iter_rows(named=True))
    inner = [row for row in rows if row["scope"] == "all-but-first"]
    scope = "all-but-first" if inner else "all"
    kept = inner or [row for row in rows if row["scope"] == "all"]
    first = [row for row in rows if row["scope"] == "token" and row["position"] == 0]
    steps = _steps(kept)
    layers = [step for step in steps if step["layer"] >= 0]
    gains = [step for step in layers if step["gain"] is not None]
    out = max((row["energy_out"] for row in kept + first), default=0.0)
    errors = [
        abs(row["unexplained"]) / row["energy_out"] for row in kept + first if row["energy_out"] > 1e-12 * out
    ]
    return {
        "pair": pair,
        "scope": scope,
        "prompts": len({row["prompt"] for row in kept}),
        "tokens": sum(_tokens_by_prompt(kept).values()),
        "steps": steps,
        "first_token": _steps(first),
        "most_injected": _named(
            max(layers, key=lambda step: step["injected"] or 0.0, default=None), "injected"
        ),
        "largest_gain": _named(max(gains, key=lambda step: step["gain"], default=None), "gain"),
        "unexplained": max(errors, default=0.0),
    }


def _steps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["tap"]), []).append(row)
    steps = []
    for layer, tap in sorted(groups, key=lambda place: tap_order(*place)):
        members = groups[layer, tap]
        total = {name: sum(row[name] for row in members) for name in _PARTS}
        signal = sum(row["signal_energy"] for row in members)
        steps.append(
            {
                "layer": layer,
                "tap": tap,
                **{name: value / signal if signal > 0 else None for name, value in total.items()},
                "gain": total["inherited"] / total["energy_in"] if total["energy_in"] > 0 else None,
            }
        )
    return steps


def _tokens_by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {row["prompt"]: row["token_count"] for row in rows}


def _named(step: Mapping[str, Any] | None, key: str) -> dict[str, Any] | None:
    return None if step is None else {"layer": step["layer"], "tap": step["tap"], key: step[key]}
