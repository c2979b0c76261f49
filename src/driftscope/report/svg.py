"""Altair chart to inline SVG: the same bytes on every machine, colours left to the page's style."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import altair as alt

_NAMESPACE = "http://www.w3.org/2000/svg"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")
_GEOMETRY = ("d", "transform", "x", "y", "width", "height", "x1", "x2", "y1", "y2")
_DROPPED = ("role", "aria-roledescription", "aria-hidden", "font-family", "version", "class")


def inline_svg(chart: alt.TopLevelMixin, identity: str, title: str, description: str) -> str:
    """Render a chart as an SVG element to stand inside a page.

    The chart must fix its own padding (autosize ``none``) and the place of its axis titles: then nothing in
    it depends on the fonts of the machine. Marks that carry a description get it as a tooltip.

    Args:
        chart: the Altair chart.
        identity: prefix of the ids in the SVG, unique in the page.
        title: the chart's name, for people who do not see it.
        description: what it shows, in a sentence or two.
    """
    import vl_convert

    text = vl_convert.vegalite_to_svg(chart.to_dict(validate=False), vl_version=_vegalite_version())
    ET.register_namespace("", _NAMESPACE)
    root = ET.fromstring(text)
    _rename_ids(root, identity)
    for element in root.iter():
        _plain_attributes(element)
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-labelledby", f"{identity}-title {identity}-description")
    for place, (name, content) in enumerate((("title", title), ("desc", description))):
        suffix = {"title": "title", "desc": "description"}[name]
        child = ET.Element(f"{{{_NAMESPACE}}}{name}", {"id": f"{identity}-{suffix}"})
        child.text = content
        root.insert(place, child)
    return ET.tostring(root, encoding="unicode")


def _vegalite_version() -> str:
    """Return Altair's own Vega-Lite version as major.minor, which vl-convert bundles."""
    from altair import SCHEMA_VERSION

    return ".".join(SCHEMA_VERSION.lstrip("v").split(".")[:2])


def _rename_ids(root: ET.Element, identity: str) -> None:
    """Number the ids in order of appearance, so that charts of one page do not share any."""
    names: dict[str, str] = {}
    for element in root.iter():
        if old := element.get("id"):
            names[old] = f"{identity}-{len(names)}"
            element.set("id", names[old])
    for element in root.iter():
        for key, value in element.attrib.items():
            if match := _REFERENCE.fullmatch(value):
                element.set(key, f"url(#{names[match[1]]})")


def _plain_attributes(element: ET.Element) -> None:
    """Turn the renderer's label of a mark into a tooltip and drop what a picture does not need."""
    label = element.attrib.pop("aria-label", None)
    marked = element.get("aria-roledescription", "").endswith("mark")
    for name in _DROPPED:
        element.attrib.pop(name, None)
    for name in _GEOMETRY:
        if name in element.attrib:
            # A hundredth of a pixel is not seen; the digits behind it are a third of a page.
            element.set(name, _DECIMALS.sub(lambda match: f"{float(match[0]):.2f}", element.attrib[name]))
    if label and marked:
        tooltip = ET.SubElement(element, f"{{{_NAMESPACE}}}title")
        tooltip.text = label
