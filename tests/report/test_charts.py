from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from tests.report import helpers

from driftscope.report import charts, heat_map
from driftscope.report.build import build_report
from driftscope.report.svg import inline_svg
from driftscope.report.topology import LAYER_TAPS

SVG = "{http://www.w3.org/2000/svg}"


def test_domain_is_in_half_decades_and_leaves_zero_out() -> None:
    cells = [{"layer": 0, "nmse": value} for value in (0.0, None, 2e-6, 0.02)]
    assert heat_map.nmse_domain([cells]) == pytest.approx((1e-6, 10**-1.5))
    assert heat_map.nmse_domain([[{"layer": 0, "nmse": 0.0}], []]) is None
    wide = [{"layer": 0, "nmse": value} for value in (1e-30, 1.0)]
    assert heat_map.nmse_domain([wide]) == pytest.approx((1e-12, 1.0))


def test_heat_map_has_a_tooltip_a_cell_and_taps_from_top_to_bottom() -> None:
    pair = build_report(helpers.synthetic_evidence(layers=3))["divergence"]["pairs"][0]
    svg = inline_svg(
        heat_map.heat_map(pair["map"], heat_map.nmse_domain([pair["map"]])), "m", "a <title>", "d & e"
    )
    root = ET.fromstring(svg)
    assert root[0].text == "a <title>"
    tooltips = [title.text or "" for path in root.iter(f"{SVG}path") for title in path.iter(f"{SVG}title")]
    assert len(tooltips) == 3 * len(LAYER_TAPS)
    assert "layer 0, qkv_bias: NMSE 0" in tooltips
    labels = {}
    for text in root.iter(f"{SVG}text"):
        place = re.findall(r"[-\d.]+", text.get("transform", ""))
        labels[text.text] = float(place[1])
    heights = [labels[tap] for tap in LAYER_TAPS]
    assert heights == sorted(heights)


def test_a_map_that_is_all_zero_is_drawn() -> None:
    cells = [{"layer": layer, "tap": "ffn_out", "nmse": 0.0} for layer in range(2)]
    root = ET.fromstring(inline_svg(heat_map.heat_map(cells, None), "z", "t", "d"))
    assert sum(path.get("fill") == charts.ZERO for path in root.iter(f"{SVG}path")) == 2


def test_ids_are_prefixed_and_repeat() -> None:
    document = helpers.synthetic_evidence(layers=2)["decomposition"]
    shares = [share for share in document["shares"] if share["by"] == "mechanism"]
    first, second = (inline_svg(charts.mechanism_bars(shares, {}), "x", "t", "d") for _ in range(2))
    assert first == second
    assert all(name.startswith("x-") for name in re.findall(r'id="([^"]*)"', first))
