"""The pictures of how an error travels: what each layer injects and inherits, and its gain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from driftscope.report.charts import LINE, MUTED, every_layer, finished, values
from driftscope.report.text import number, power_of_ten

SERIES = {"inherited": ("#009e73", "circle"), "injected": ("#cc79a7", "triangle-up")}
"""Colour (Okabe and Ito 2008) and shape of each part, so that neither is told by its colour alone."""

_WIDTH = 420
_GAIN = "#59636e"
Steps = Sequence[Mapping[str, Any]]


def parts_domain(groups: Sequence[Steps]) -> tuple[int, int] | None:
    """Return the powers of ten around every drawn part, ten decades at most; None where none is positive."""
    found = [step[name] for steps in groups for step in _layers(steps) for name in SERIES if step[name]]
    if not found:
        return None
    high = math.ceil(math.log10(max(found)))
    return min(max(math.floor(math.log10(min(found))), high - 10), high - 1), high


def gain_domain(steps: Steps) -> tuple[int, int]:
    """Return the powers of two around every gain and one."""
    found = [step["gain"] for step in _layers(steps) if step["gain"]]
    low, high = min([0.5, *found]), max([2.0, *found])
    return math.floor(math.log2(low)), math.ceil(math.log2(high))


def parts_chart(steps: Steps, domain: tuple[int, int]) -> Any:
    """Draw what each layer injects and inherits, over the energy of the reference's output there.

    Args:
        steps: the ``steps`` or the ``first_token`` of a pair.
        domain: powers of ten at the ends of the scale, shared by charts that stand side by side.
    """
    rows = [
        {
            "layer": step["layer"],
            "part": name,
            "value": max(math.log10(step[name]), domain[0]),
            "tip": f"layer {step['layer']}: {name} {number(step[name])}",
        }
        for step in _layers(steps)
        for name in SERIES
        if step[name]
    ]
    every = 1 if domain[1] - domain[0] <= 6 else 2
    ticks = {power: power_of_ten(power) for power in range(domain[0], domain[1] + 1, every)}
    part = {
        "color": alt.Color(
            "part:N",
            legend=None,
            scale=alt.Scale(domain=list(SERIES), range=[colour for colour, _ in SERIES.values()]),
        ),
        "shape": alt.Shape(
            "part:N",
            legend=None,
            scale=alt.Scale(domain=list(SERIES), range=[shape for _, shape in SERIES.values()]),
        ),
    }
    x, y = _layer_axis(steps), _power_axis(domain, ticks)
    lines = alt.Chart(values(rows)).mark_line(strokeWidth=1.2).encode(x=x, y=y, color=part["color"])
    points = (
        alt.Chart(values(rows))
        .mark_point(filled=True, size=34, opacity=1)
        .encode(x=x, y=y, description="tip:N", **part)
    )
    return finished(alt.layer(lines, points), _WIDTH, 130, 58, 8, 22)


def gain_chart(steps: Steps, domain: tuple[int, int]) -> Any:
    """Draw each layer's gain: inherited energy over the energy of the error that came in.

    Args:
        steps: the ``steps`` or the ``first_token`` of a pair.
        domain: powers of two at the ends of the scale.
    """
    rows = [
        {
            "layer": step["layer"],
            "value": math.log2(step["gain"]),
            "one": 0,
            "tip": f"layer {step['layer']}: gain {number(step['gain'])}",
        }
        for step in _layers(steps)
        if step["gain"]
    ]
    every = -(-(domain[1] - domain[0]) // 6)
    ticks = {power: f"{2.0**power:g}" for power in range(domain[0], domain[1] + 1) if power % every == 0}
    x, y = _layer_axis(steps, title="layer"), _power_axis(domain, ticks)
    bars = alt.Chart(values(rows)).mark_bar(color=_GAIN).encode(x=x, y=y, y2="one:Q", description="tip:N")
    one = alt.Chart(values([{"value": 0}])).mark_rule(color=MUTED, strokeWidth=1).encode(y=y)
    return finished(alt.layer(bars, one), _WIDTH, 80, 58, 8, 38)


def _layers(steps: Steps) -> list[Mapping[str, Any]]:
    return [step for step in steps if step["layer"] >= 0]


def _layer_axis(steps: Steps, title: str | None = None) -> Any:
    layers = sorted({step["layer"] for step in _layers(steps)})
    every = every_layer(_WIDTH / max(len(layers), 1))
    return alt.X(
        "layer:O",
        sort=layers,
        scale=alt.Scale(type="band", domain=layers, paddingInner=0.25, paddingOuter=0.1),
        axis=alt.Axis(
            values=[layer for layer in layers if layer % every == 0],
            labelAngle=0,
            domain=False,
            ticks=False,
            **({"title": title, "titleY": 22} if title else {"title": None}),
        ),
    )


def _power_axis(domain: tuple[int, int], ticks: Mapping[int, str]) -> Any:
    """Return an axis of exponents, labelled by the powers."""
    labels = "{" + ", ".join(f"'{power}': '{label}'" for power, label in ticks.items()) + "}"
    return alt.Y(
        "value:Q",
        scale=alt.Scale(domain=list(domain), nice=False),
        axis=alt.Axis(
            title=None,
            values=list(ticks),
            labelExpr=f"({labels})[datum.value]",
            domain=False,
            ticks=False,
            gridColor=LINE,
        ),
    )
