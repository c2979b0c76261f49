"""A diff of two models as one page that opens offline: a function of the diff's document alone."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from driftscope.artifacts.names import layer_of
from driftscope.report import text
from driftscope.report.diff_words import metadata_words, sentence, share_words, short_name, short_relation

_FOLDER = Path(__file__).parent

_CHIPS = {
    "identical": "good",
    "equal-under": "good",
    "downcast": "fine",
    "quantized-from": "fine",
    "extra": "mixed",
}
_MARKS = {"good": "✓", "fine": "≈", "mixed": "◐", "bad": "✗"}

STEPS = (0.25, 0.5, 0.9, 1.1, 1.6, 4.0, 16.0)
"""Measured over expected error at which the heat map changes its colour."""

# How a transform was looked for; what was found is in the other figures.
_SEARCHED = ("alternatives", "best_alternative", "compared")

_CELL, _GAP, _LEFT, _TOP, _FOOT = 16, 2, 132, 4, 34


def render_diff(document: Mapping[str, Any]) -> str:
    """Render a diff as one self-contained HTML page.

    Names from the models are escaped; nothing is loaded from anywhere; the same diff gives the same bytes.

    Args:
        document: what `driftscope.analysis.weights.pair_diff.diff_models` returns.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=text.number,
        count=text.count,
        percent=text.percent,
        size=text.size,
        short=short_name,
        chip=chip_of,
        mark=lambda kind: _MARKS[chip_of(kind)],
        relation=short_relation,
        metadata=metadata_words,
        sortable=_sortable,
    )
    environment.globals.update(counted=text.counted, evidence=evidence_words, share=share_words)
    script = (_FOLDER / "diff_page.js").read_text(encoding="utf-8").strip()
    style = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "diff_page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template("diff_page.html.j2").render(
        diff=document,
        title=sentence(document),
        cards=_cards(document),
        maps=[Markup(picture) for picture in heat_map(document["tensors"])],
        steps=legend(),
        shares=_shares(document["tensors"]),
        bad=[row for row in document["tensors"] if not row["holds"]],
        script=Markup(script),
        script_digest=digest,
        style=Markup(style),
    )


def chip_of(kind: str) -> str:
    """The kind of chip that a kind of relation gets; its word is always written out too."""
    return _CHIPS.get(kind, "bad")


def evidence_words(row: Mapping[str, Any]) -> str:
    """What the choice of a relation rests on, beside what the table has in its columns."""
    shown = {"nmse", "expected_nmse", "nmse_over_expected", "cosine_similarity"}
    items = {
        key: value
        for key, value in row["evidence"].items()
        if key not in shown and value not in (None, 0) and not key.startswith(_SEARCHED)
    }
    parts = []
    for key, value in items.items():
        name = key.replace("_", " ")
        if isinstance(value, bool):
            parts.append(name if value else f"not {name}")
        elif isinstance(value, Mapping):
            inner = ", ".join(f"{k} {_short(v)}" for k, v in value.items() if v is not None)
            parts.append(f"{name}: {inner}")
        else:
            parts.append(f"{name} {_short(value)}")
    return "; ".join(parts)


def _short(value: Any) -> str:
    found = text.number(value) if isinstance(value, (int, float)) else str(value)
    return found if len(found) <= 160 else f"{found[:157]}…"


def _cards(document: Mapping[str, Any]) -> list[dict[str, str]]:
    tensors, summary = document["tensors"], document["summary"]
    coverage = summary["coverage"]
    same = sum(row["kind"] == "identical" for row in tensors)
    bad = sum(not row["holds"] for row in tensors) + len(document["inventory"]["missing"])
    ratios = [row["nmse_over_expected"] for row in tensors if row["nmse_over_expected"] is not None]
    metadata = document["inventory"]["metadata_differences"]
    values = coverage["elements_compared"]
    return [
        {
            "name": "Compared",
            "value": f"{coverage['compared']} of {coverage['expected']}",
            "over": f"tensors, {text.count(values)} values",
        },
        {"name": "Identical", "value": text.count(same), "over": "tensors, value by value"},
        {
            "name": "Not explained",
            "value": text.count(bad),
            "over": "tensors different, lost or out of place",
        },
        {
            "name": "Worst for its format",
            "value": f"{text.number(max(ratios))} ×" if ratios else text.MISSING,
            "over": "measured over predicted error",
        },
        {
            "name": "Metadata",
            "value": text.count(len(metadata)),
            "over": "differences" if len(metadata) != 1 else "difference",
        },
        {
            "name": "Read",
            "value": text.size(summary["share"]["bytes"]),
            "over": "of both files",
        },
    ]


def _shares(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Share of the values in each kind of relation, best first."""
    total = sum(row["element_count"] for row in tensors) or 1
    kinds: dict[str, list[int]] = {}
    for row in tensors:
        entry = kinds.setdefault(row["kind"], [0, 0])
        entry[0] += 1
        entry[1] += row["element_count"]
    order = ["identical", "equal-under", "downcast", "quantized-from"]
    ranked = sorted(kinds, key=lambda kind: (order.index(kind) if kind in order else len(order), kind))
    return [{"kind": kind, "tensors": kinds[kind][0], "share": kinds[kind][1] / total} for kind in ranked]


def _sortable(value: Any) -> str:
    """A cell's value for sorting: what is not there goes last."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else repr(value)


def heat_map(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draw the layers' tensors, a column a layer, a row a tensor of the layer; colours by `level_of`.

    Returns:
        One SVG, or none where no tensor belongs to a layer.
    """
    from html import escape

    cells: dict[tuple[str, int], Mapping[str, Any]] = {}
    order: dict[str, None] = {}
    for row in tensors:
        layer = layer_of(row["tensor"])
        if layer is not None:
            part = short_name(row["tensor"]).partition(" ")[2]
            cells[part, layer] = row
            order[part] = None
    if not cells:
        return []
    parts = sorted(order, key=_place)
    layers = range(max(layer for _, layer in cells) + 1)
    step = _CELL + _GAP
    width, height = _LEFT + step * len(layers), _TOP + step * len(parts) + _FOOT
    drawn = [
        f'<svg class="map" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-label="Relation and error of each tensor, by layer">'
    ]
    for r, part in enumerate(parts):
        y = _TOP + r * step
        drawn.append(f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(part)}</text>')
        for layer in layers:
            cell = cells.get((part, layer))
            if cell is not None:
                drawn.append(
                    f'<rect class="h {level_of(cell)}" x="{_LEFT + layer * step}" y="{y}" width="{_CELL}" '
                    f'height="{_CELL}" rx="2"><title>{escape(_tip(cell))}</title></rect>'
                )
    every = 1 if len(layers) <= 12 else 2 if len(layers) <= 32 else 5
    base = _TOP + len(parts) * step + 14
    for layer in layers:
        if layer % every == 0:
            x = _LEFT + layer * step + _CELL / 2
            drawn.append(f'<text x="{x:g}" y="{base}" text-anchor="middle">{layer}</text>')
    drawn.append(f'<text x="{_LEFT}" y="{base + 15}">layer</text></svg>')
    return ["".join(drawn)]


def level_of(row: Mapping[str, Any]) -> str:
    """The class of a cell: ``same``, ``bad`` where a tensor does not hold, else a step of the error."""
    if not row["holds"]:
        return "gone" if not row["compared_count"] else "bad"
    if row["kind"] in ("identical", "equal-under"):
        return "same"
    ratio = row["nmse_over_expected"]
    if ratio is None:
        return "s2"
    return f"s{sum(ratio >= step for step in STEPS)}"


def legend() -> list[dict[str, str]]:
    """Classes of the heat map and what they mean."""
    ends = [f"{step:g}" for step in STEPS]
    steps = [
        f"below {ends[0]}",
        *(f"{a} to {b}" for a, b in pairwise(ends)),
        f"{ends[-1]} up",
    ]
    return [
        {"level": "same", "words": "the same values"},
        *({"level": f"s{i}", "words": words} for i, words in enumerate(steps)),
        {"level": "bad", "words": "does not hold"},
        {"level": "gone", "words": "not compared"},
    ]


_PARTS = ("input_norm", "attn.", "post_attn_norm", "pre_ffn_norm", "mlp.", "post_ffn_norm")
_INNER = ("q_proj", "q_norm", "k_proj", "k_norm", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _place(part: str) -> tuple[int, int, str]:
    """Tensors of a layer in the order in which a forward pass reads them."""
    outer = next((i for i, name in enumerate(_PARTS) if part.startswith(name)), len(_PARTS))
    inner = next((i for i, name in enumerate(_INNER) if f".{name}" in part), len(_INNER))
    return outer, inner, part


def _tip(row: Mapping[str, Any]) -> str:
    found = f"{short_name(row['tensor'])}: {row['relation']}"
    if row["nmse"]:
        found += f", NMSE {text.number(row['nmse'])}"
    if row["nmse_over_expected"] is not None:
        found += f", {text.number(row['nmse_over_expected'])} × predicted"
    return found
