"""The heat map of an error by layer and tap, as an Altair chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from driftscope.report.charts import INK, MUTED, SMALL, ZERO, every_layer, finished, values
from driftscope.report.text import number, power_of_ten
from driftscope.report.topology import tap_order

RAMP = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
"""Viridis (van der Walt and Smith 2015): even in lightness, safe for colour-blind readers."""

OUTLINE = ("#1a1a1a", "#ffb000")
"""Outer and inner stroke of a marked cell: one of the two stands out against every colour of the ramp."""


def nmse_domain(maps: Sequence[Sequence[Mapping[str, Any]]], decades: int = 12) -> tuple[float, float] | None:
    """Return the half decades that hold every positive NMSE of the layers in some maps, or None.

    Args:
        maps: cells with ``layer``, ``tap`` and ``nmse``.
        decades: at most so many, from the largest down.
    """
    found = [cell["nmse"] for cells in maps for cell in cells if cell["nmse"] and cell["layer"] >= 0]
    if not found:
        return None
    high = math.ceil(2 * math.log10(max(found)))
    low = max(math.floor(2 * math.log10(min(found))), high - 2 * decades)
    return 10.0 ** (min(low, high - 2) / 2), 10.0 ** (high / 2)


def heat_map(
    cells: Sequence[Mapping[str, Any]],
    domain: tuple[float, float] | None,
    *,
    taps: Sequence[tuple[int, str]] | None = None,
    marked: Sequence[tuple[int, str]] = (),
    width: int = 420,
) -> Any:
    """Draw the NMSE of every layer and tap: layers from left to right, taps from top to bottom.

    Args:
        cells: the ``map`` of a pair, or any cells with ``layer``, ``tap`` and ``nmse``.
        domain: the colour scale's ends, shared by the maps that stand side by side.
        taps: layers and taps to leave room for, so that two maps have the same rows and columns. With it,
            taps of the whole model (layer -1) are drawn too, as one cell across.
        marked: layers and taps to outline; the first is named above the map and in its margins.
        width: about how wide the cells are together.
    """
    whole = taps is not None
    places = [(cell["layer"], cell["tap"]) for cell in cells] if taps is None else taps
    layers = sorted({layer for layer, _tap in places if layer >= 0})
    layer_taps = {tap for layer, tap in places if layer >= 0}
    rows_of_model = sorted({place for place in places if place[0] < 0}, key=lambda p: tap_order(*p))
    first = [tap for _, tap in rows_of_model if whole and tap == "embedding"]
    last = [tap for _, tap in rows_of_model if whole and tap != "embedding"]
    names = [*first, *sorted(layer_taps, key=lambda tap: tap_order(0, tap)), *last]
    step = min(max(width / max(len(layers), 1), 5), 26)
    named = marked[0] if marked else None
    rows = [
        {
            "layer": cell["layer"],
            "tap": cell["tap"],
            "nmse": cell["nmse"],
            "tip": f"{_at(cell['layer'], cell['tap'])}: NMSE {number(cell['nmse'])}",
        }
        for cell in cells
        if cell["nmse"] is not None and (whole or cell["layer"] >= 0)
    ]
    x: Any = alt.X(
        "layer:O",
        sort=layers,
        scale=alt.Scale(domain=layers, paddingInner=0.06, paddingOuter=0),
        axis=alt.Axis(
            values=_layer_ticks(layers, step, named[0] if named else None),
            labelAngle=0,
            title="layer",
            titleY=22,
            domain=False,
            ticks=False,
            **_emphasis(named[0] if named else None),
        ),
    )
    y: Any = alt.Y(
        "tap:N",
        sort=names,
        scale=alt.Scale(domain=names, paddingInner=0.06, paddingOuter=0),
        axis=alt.Axis(
            title=None,
            domain=False,
            ticks=False,
            labelPadding=6,
            **_emphasis(named[1] if named else None),
        ),
    )
    full = step * len(layers)
    across: dict[str, Any] = {"x": alt.XValue(0), "x2": alt.X2Value(full - 0.06 * step)}
    drawn = []

    def rectangles(members: Sequence[Mapping[str, Any]], mark: Mapping[str, Any], **encoding: Any) -> None:
        """Draw cells of layers in their column, those of the whole model across all columns."""
        for part, place in (
            ([m for m in members if m["layer"] >= 0], {"x": x}),
            (
                [m for m in members if m["layer"] < 0],
                across,
            ),
        ):
            if part:
                drawn.append(alt.Chart(values(part)).mark_rect(**mark).encode(**place, y=y, **encoding))

    rectangles([row for row in rows if row["nmse"] == 0], {"color": ZERO}, description="tip:N")
    positive = [row for row in rows if row["nmse"]]
    if positive and domain:
        stops = [domain[0] * (domain[1] / domain[0]) ** (i / (len(RAMP) - 1)) for i in range(len(RAMP))]
        colour = alt.Color(
            "nmse:Q",
            legend=None,
            scale=alt.Scale(type="log", domain=stops, range=list(RAMP), clamp=True, interpolate="rgb"),
        )
        rectangles(positive, {}, color=colour, description="tip:N")
    outlined = [{"layer": layer, "tap": tap} for layer, tap in marked if tap in names]
    for mark in ({"stroke": OUTLINE[0], "strokeWidth": 4}, {"stroke": OUTLINE[1], "strokeWidth": 1.8}):
        rectangles(outlined[:1], {"fill": None, **mark})
    rectangles(outlined[1:], {"fill": None, "stroke": OUTLINE[1], "strokeWidth": 1})
    if named and named[1] in names:
        drawn.append(_pointer(named, layers, x, full))
    return finished(alt.layer(*drawn), full, 15 * len(names), 128, 8, 38, top=24 if named else 8)


def _layer_ticks(layers: Sequence[int], step: float, named: int | None) -> list[int]:
    """Return the layers to number: every so many, and the named one instead of its neighbours."""
    regular = [layer for layer in layers if layer % every_layer(step) == 0]
    if named is None or named not in layers:
        return regular
    return sorted({named, *(layer for layer in regular if abs(layer - named) * step >= 16)})


def _emphasis(value: int | str | None) -> dict[str, Any]:
    """Set one label of an axis in bold ink."""
    if value is None or value == -1:
        return {}
    test = {"field": "value", "equal": value}
    return {
        "labelColor": {"condition": {"test": test, "value": INK}, "value": MUTED},
        "labelFontWeight": {"condition": {"test": test, "value": "bold"}, "value": "normal"},
    }


def _pointer(named: tuple[int, str], layers: Sequence[int], x: Any, full: float) -> Any:
    """Name a cell above its column."""
    layer, tap = named
    right = layer >= 0 and layers.index(layer) * 2 > len(layers)
    label = f"{_at(layer, tap)} ▼" if right else f"▼ {_at(layer, tap)}"
    if layer < 0:
        label = tap
    mark = alt.Chart(values([{"layer": layer, "label": label}])).mark_text(
        align="right" if right else "left",
        dx=5 if right else -5 if layer >= 0 else 0,
        color=INK,
        fontSize=SMALL,
        fontWeight="bold",
        aria=False,
    )
    place: Any = {"x": x} if layer >= 0 else {"x": alt.XValue(0)}
    return mark.encode(**place, y=alt.YValue(-9), text="label:N")


def _at(layer: int, tap: str) -> str:
    return tap if layer < 0 else f"layer {layer}, {tap}"


def scale_ticks(domain: tuple[float, float]) -> list[dict[str, str]]:
    """Return where the powers of ten stand on a colour scale, in per cent of its width."""
    low, high = (math.log10(end) for end in domain)
    every = 1 if high - low <= 7 else 2
    return [
        {"at": f"{100 * (power - low) / (high - low):.2f}", "power": power_of_ten(power)}
        for power in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1, every)
    ]
