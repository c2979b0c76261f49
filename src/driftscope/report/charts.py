"""The bars and points of the report, as Altair charts with every size fixed.

Colours are constants that the page's style sheet maps to their dark counterparts; `svg.py` says why sizes
are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from driftscope.report.text import number, percent, percent_interval
from driftscope.report.topology import site_order

INK = "#1f2328"
MUTED = "#59636e"
LINE = "#d1d9e0"
ZERO = "#e4e8ec"
COLOURS = {"weight": "#0072b2", "activation": "#d55e00", "both": "#8c959f"}
"""Colours by mechanism (Okabe and Ito 2008, which colour-blind readers tell apart)."""

SMALL = 11
"""Font size of every text in a chart."""


def finished(
    chart: Any, width: float, height: float, left: int, right: int, bottom: int, top: int = 8
) -> Any:
    """Fix a chart's sizes, so that no text measurement moves anything."""
    return (
        chart.properties(
            width=width,
            height=height,
            autosize="none",
            padding={"left": left, "right": right, "top": top, "bottom": bottom},
            background="transparent",
        )
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=SMALL,
            titleFontSize=SMALL,
            titleFontWeight="normal",
            labelColor=MUTED,
            titleColor=MUTED,
            gridColor=LINE,
            domainColor=LINE,
            tickColor=LINE,
            tickSize=4,
            labelLimit=0,
            titleLimit=0,
            labelOverlap=False,
            labelFlush=False,
        )
    )


def every_layer(step: float) -> int:
    """Return how many layers share one number where each is `step` wide, so that numbers do not touch."""
    return next((n for n in (1, 2, 5, 10) if n * step >= 18), 20)


def mechanism_bars(shares: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Any:
    """Draw the whole difference as one stacked bar, and under it each part with its interval.

    A negative interaction stands to the left of zero.
    """
    rows = []
    ends = {True: 0.0, False: 0.0}
    for share in shares:
        positive = share["share"] >= 0
        start = ends[positive]
        ends[positive] = start + share["share"]
        name = labels.get(share["item"], share["item"])
        said = f"{percent(share['share'])} ({percent_interval(share['low'], share['high'])})"
        common = {"mechanism": share["mechanism"], "tip": f"{name}: {said}"}
        rows.append({**common, "row": "all together", "start": start, "end": ends[positive]})
        rows.append(
            {
                **common,
                "row": name,
                "start": 0.0,
                "end": share["share"],
                "low": share["low"],
                "high": share["high"],
                "said": said,
                "place": max(share["high"], 0.0),
            }
        )
    order = ["all together", *(labels.get(share["item"], share["item"]) for share in shares)]
    low = min(0.0, *(row.get("low", row["end"]) for row in rows))
    high = max(1.0, *(row.get("high", row["end"]) for row in rows))
    x = alt.X("start:Q", scale=alt.Scale(domain=[low, high], nice=False), axis=_share_axis(24))
    y = alt.Y(
        "row:N",
        sort=order,
        scale=alt.Scale(domain=order, paddingInner=0.35, paddingOuter=0.1),
        axis=alt.Axis(title=None, domain=False, ticks=False, labelPadding=8, labelColor=INK),
    )
    data = values(rows)
    parts = [row for row in rows if "low" in row]
    bars = (
        alt.Chart(data)
        .mark_bar()
        .encode(x=x, x2="end:Q", y=y, color=_mechanism_colour(), description="tip:N")
    )
    intervals = (
        alt.Chart(values(parts)).mark_rule(color=INK, strokeWidth=1.5).encode(x="low:Q", x2="high:Q", y=y)
    )
    words = (
        alt.Chart(values(parts))
        .mark_text(align="left", dx=8, color=INK, fontSize=SMALL)
        .encode(x="place:Q", y=y, text="said:N")
    )
    return finished(alt.layer(bars, intervals, words), 420, 30 * len(order), 152, 170, 40)


def layer_bars(shares: Sequence[Mapping[str, Any]], mechanism: str) -> Any:
    """Draw the share of each layer for one mechanism, with intervals."""
    rows = _rows([share for share in shares if share["item"] != "interaction"], "layer ")
    layers = sorted((row["item"] for row in rows), key=lambda item: (len(item), item))
    every = every_layer(420 / max(len(layers), 1))
    x = alt.X(
        "item:O",
        sort=layers,
        scale=alt.Scale(domain=layers, paddingInner=0.25, paddingOuter=0.1),
        axis=alt.Axis(
            values=layers[::every], labelAngle=0, title="layer", titleY=22, domain=False, ticks=False
        ),
    )
    y = alt.Y("share:Q", scale=_share_scale(rows), axis=_share_axis(None))
    bars = alt.Chart(values(rows)).mark_bar(color=COLOURS[mechanism]).encode(x=x, y=y, description="tip:N")
    intervals = alt.Chart(values(rows)).mark_rule(color=INK).encode(x=x, y="low:Q", y2="high:Q")
    return finished(alt.layer(bars, intervals), 420, 130, 58, 8, 38)


def site_bars(shares: Sequence[Mapping[str, Any]], mechanism: str) -> Any:
    """Draw the share of each matmul site for one mechanism, with intervals."""
    rows = _rows([share for share in shares if share["item"] != "interaction"], "")
    sites = sorted((row["item"] for row in rows), key=site_order)
    y = alt.Y(
        "item:N",
        sort=sites,
        scale=alt.Scale(domain=sites, paddingInner=0.3, paddingOuter=0.1),
        axis=alt.Axis(title=None, domain=False, ticks=False, labelPadding=6, labelColor=INK),
    )
    x = alt.X("share:Q", scale=_share_scale(rows), axis=_share_axis(24))
    bars = alt.Chart(values(rows)).mark_bar(color=COLOURS[mechanism]).encode(x=x, y=y, description="tip:N")
    intervals = alt.Chart(values(rows)).mark_rule(color=INK).encode(x="low:Q", x2="high:Q", y=y)
    return finished(alt.layer(bars, intervals), 300, 20 * len(sites), 60, 16, 40)


def flips(points: Sequence[Mapping[str, Any]]) -> Any:
    """Draw every changed next token: the teacher's margin against the logit difference's own size."""
    rows = [
        {
            "noise": point["logit_noise"],
            "margin": point["margin"],
            "near": point["margin"] <= 2 * point["logit_noise"],
            "tip": f"{point['sequence']}, position {point['position']}: margin {number(point['margin'])},"
            f" noise {number(point['logit_noise'])} (logits)",
        }
        for point in points
    ]
    right = 1.08 * max(row["noise"] for row in rows) or 1.0
    top = 1.08 * max(2.2 * right, max(row["margin"] for row in rows))
    x = alt.X(
        "noise:Q",
        scale=alt.Scale(domain=[0, right], nice=False),
        axis=alt.Axis(
            title="rms logit difference at the position (logits)", titleY=24, tickCount=6, grid=False
        ),
    )
    y = alt.Y(
        "margin:Q",
        scale=alt.Scale(domain=[0, top], nice=False),
        axis=alt.Axis(title="teacher's margin (logits)", titleX=-38, tickCount=5, domain=False, ticks=False),
    )
    line = (
        alt.Chart(values([{"noise": 0.0, "margin": 0.0}, {"noise": right, "margin": 2 * right}]))
        .mark_line(color=MUTED, strokeDash=[4, 3], strokeWidth=1)
        .encode(x=x, y=y)
    )
    colour = alt.condition("datum.near", alt.value(COLOURS["weight"]), alt.value(COLOURS["activation"]))
    shape = alt.condition("datum.near", alt.value("circle"), alt.value("triangle-up"))
    marks = (
        alt.Chart(values(rows))
        .mark_point(filled=True, size=46, opacity=0.8)
        .encode(x=x, y=y, color=colour, shape=shape, description="tip:N")
    )
    return finished(alt.layer(line, marks), 420, 200, 58, 12, 40)


def values(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return rows as a chart's data."""
    # Altair copies lists deeply wherever charts are laid over each other, and leaves tuples as they are.
    return alt.Data(values=tuple(dict(row) for row in rows))


def _rows(shares: Sequence[Mapping[str, Any]], prefix: str) -> list[dict[str, Any]]:
    return [
        {
            "item": share["item"],
            "share": share["share"],
            "low": share["low"],
            "high": share["high"],
            "tip": f"{prefix}{share['item']}: {percent(share['share'])}"
            f" ({percent_interval(share['low'], share['high'])})",
        }
        for share in shares
    ]


def _share_scale(rows: Sequence[Mapping[str, Any]]) -> Any:
    low = min(0.0, *(row["low"] for row in rows))
    high = max(row["high"] for row in rows)
    return alt.Scale(domain=[1.05 * low, 1.05 * high or 1.0], nice=False)


def _share_axis(title_y: int | None) -> Any:
    """Return an axis in per cent; a horizontal one says what of, a vertical one leaves that to the text."""
    title = (
        {"title": "share of the energy of the output difference", "titleY": title_y}
        if title_y
        else {"title": None}
    )
    return alt.Axis(
        labelExpr="replace(format(datum.value * 100, '~g'), '-', '−') + ' %'",
        tickCount=5,
        domain=False,
        ticks=False,
        **title,
    )


def _mechanism_colour() -> Any:
    return alt.Color(
        "mechanism:N", legend=None, scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))
    )
