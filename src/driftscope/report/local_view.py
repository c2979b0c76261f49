"""What the page shows of the replay and of the propagation: pictures, and the same in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from driftscope.report.local import COMPONENTS
from driftscope.report.names import COMPONENT_FORMULAS, COMPONENT_NAMES, pair_words, path_words, place_words
from driftscope.report.text import number
from driftscope.report.topology import tap_order

Cells = list[dict[str, Any]]

_SMALL_WIDTH = 228


def local_view(divergence: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the page draws of the replay, or None where there is nothing to draw.

    Returns:
        ``main`` and ``others``: for each replayed path its pictures (``panels`` side by side, ``small`` ones
        under them, ``zero``: components without any error) and ``ops``, the same in figures by op;
        ``legend`` of the one colour scale of all of them.
    """
    local = divergence["local"]
    done = [path for path in local.get("paths") or [] if path["status"] == "done" and path["map"]]
    if not done:
        return None
    from driftscope.report import heat_map

    pairs = {pair["pair"]: pair for pair in divergence.get("pairs") or []}
    propagated = {path["path"]: _cells(pairs[path["pair"]]["map"], "nmse") for path in done if path["pair"]}
    maps = [_cells(path["map"], name) for path in done for name in (*COMPONENTS, "total")]
    domain = heat_map.nmse_domain([*maps, *propagated.values()])
    main = next((path for path in done if path["path"] == local["main"]), done[0])
    others = [path for path in done if path is not main]
    return {
        "main": _path_view("local", main, propagated.get(main["path"]), domain, small=True),
        "others": [
            _path_view(f"local-{index}", path, propagated.get(path["path"]), domain, small=False)
            for index, path in enumerate(others)
        ],
        "legend": {
            "gradient": ", ".join(heat_map.RAMP),
            "ticks": heat_map.scale_ticks(domain) if domain else [],
        },
    }


def growth_view(divergence: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pictures of what layers inject and inherit, pair by pair, that of the main path first."""
    propagation, main = divergence.get("propagation"), divergence["local"].get("main")
    if not propagation or propagation["status"] != "done":
        return []
    from driftscope.report import growth

    views = []
    for index, pair in enumerate(
        sorted(propagation["pairs"], key=lambda pair: not _is_of(pair["pair"], main))
    ):
        groups = {"steps": pair["steps"], "first_token": pair["first_token"]}
        parts = growth.parts_domain(list(groups.values()))
        pictures = []
        for name, steps in groups.items():
            if not parts or not any(step["layer"] >= 0 for step in steps):
                continue
            identity = f"growth-{index}-{name.replace('_', '-')}"
            words = "the first token" if name == "first_token" else "the tokens"
            about = f"of {words}, layer by layer, {pair_words(pair['pair'])}"
            pictures.append(
                {
                    "first": name == "first_token",
                    "parts": _svg(
                        growth.parts_chart(steps, parts),
                        f"{identity}-parts",
                        "Injected and inherited error",
                        f"Energies {about}; most is injected at {place_words(pair['most_injected'])}.",
                    ),
                    "gain": _svg(
                        growth.gain_chart(steps, growth.gain_domain(steps)),
                        f"{identity}-gain",
                        "Gain",
                        f"Gain {about}; largest at {place_words(pair['largest_gain'])}.",
                    ),
                }
            )
        gains = [step for step in pair["first_token"] if step["layer"] >= 0 and step["gain"]]
        top = max(gains, key=lambda step: step["gain"], default=None)
        views.append({"pair": pair, "pictures": pictures, "rows": _growth_rows(pair), "first_gain": top})
    return views


def _is_of(pair: str, path: str | None) -> bool:
    return path is not None and pair.endswith(f"|{path}")


def _path_view(
    identity: str,
    path: Mapping[str, Any],
    propagated: Cells | None,
    domain: tuple[float, float] | None,
    *,
    small: bool,
) -> dict[str, Any]:
    from driftscope.report.heat_map import heat_map

    flag = path["fault"] or path["first"]
    lead = _lead(path)
    maps = {name: _cells(path["map"], name) for name in (*COMPONENTS, "total")}
    taps = sorted(
        {(cell["layer"], cell["tap"]) for cell in [*path["map"], *(propagated or [])]},
        key=lambda place: tap_order(*place),
    )
    layers = any(layer >= 0 for layer, _ in taps)

    def picture(name: str, cells: Cells, title: str, width: int = 420) -> dict[str, Any]:
        largest = max(cells, key=lambda cell: cell["nmse"] or 0.0)
        kind = "Propagated" if name == "propagated" else f"Local ({name})"
        description = (
            f"Heat map: {kind} NMSE of {path_words(path['path'])}, layers across and ops down."
            f" Largest at {place_words(largest)}: {number(largest['nmse'])}."
        )
        if flag:
            description += f" First divergence at {place_words(flag)}, outlined."
        chart = heat_map(cells, domain, taps=taps, marked=_marked(path, name), width=width)
        svg = _svg(chart, f"{identity}-{name}", title, description)
        return {"name": name, "title": title, "svg": svg, "largest": largest}

    panels, smaller = [], []
    if layers and maps[lead]:
        panels.append(picture(lead, maps[lead], COMPONENT_NAMES[lead]))
        if propagated:
            panels.append(picture("propagated", propagated, "Propagated error"))
    rest = [
        name for name in (*COMPONENTS, "total") if name != lead and (name in COMPONENTS or lead in COMPONENTS)
    ]
    drawn = [name for name in rest if any(cell["nmse"] for cell in maps[name])]
    if small and layers:
        smaller = [picture(name, maps[name], COMPONENT_NAMES[name], _SMALL_WIDTH) for name in drawn]
    return {
        "path": path,
        "flag": flag,
        "lead": lead,
        "formulas": COMPONENT_FORMULAS,
        "panels": panels,
        "small": smaller,
        "zero": [name for name in COMPONENTS if maps[name] and not any(cell["nmse"] for cell in maps[name])],
        "unmeasured": [name for name in COMPONENTS if not maps[name]],
        "ops": _by_op(maps, propagated),
    }


def _marked(path: Mapping[str, Any], name: str) -> list[tuple[int, str]]:
    """Return the ops to outline in a picture: the first divergence, then the flags of what is drawn."""
    flag = path["fault"] or path["first"]
    rest = [item for item in path["flagged"] if name in (item["component"], "total")]
    if not flag and not rest:
        return []
    return list(dict.fromkeys((item["layer"], item["tap"]) for item in ([flag, *rest] if flag else rest)))


def _svg(chart: Any, identity: str, title: str, description: str) -> Any:
    from markupsafe import Markup

    from driftscope.report.svg import inline_svg

    return Markup(inline_svg(chart, identity, title, description))


def _lead(path: Mapping[str, Any]) -> str:
    """Name the component to show beside the propagated error: the flagged one, else their total."""
    flag = path["fault"] or path["first"]
    if flag and flag["component"] in COMPONENTS:
        return str(flag["component"])
    return next((name for name in ("total", *COMPONENTS) if _cells(path["map"], name)), "total")


def _cells(cells: Sequence[Mapping[str, Any]], name: str) -> Cells:
    return [
        {"layer": cell["layer"], "tap": cell["tap"], "nmse": cell[name]}
        for cell in cells
        if cell.get(name) is not None
    ]


def _by_op(maps: Mapping[str, Cells], propagated: Cells | None) -> list[dict[str, Any]]:
    """Return for each op the median over the layers of each error, and the largest with its layer."""
    columns = {**maps, "propagated": propagated or []}
    taps = sorted(
        {(min(cell["layer"], 0), cell["tap"]) for cells in columns.values() for cell in cells},
        key=lambda place: tap_order(*place),
    )
    rows = []
    for layer, tap in taps:
        row: dict[str, Any] = {"tap": tap}
        for name, cells in columns.items():
            members = [cell for cell in cells if cell["tap"] == tap and min(cell["layer"], 0) == layer]
            row[name] = None
            if members:
                largest = max(members, key=lambda cell: cell["nmse"])
                row[name] = {"median": median(cell["nmse"] for cell in members), "largest": largest}
        rows.append(row)
    return rows


def _growth_rows(pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the steps with those of the first token beside them."""
    first = {(step["layer"], step["tap"]): step for step in pair["first_token"]}
    return [{**step, "first": first.get((step["layer"], step["tap"]))} for step in pair["steps"]]
