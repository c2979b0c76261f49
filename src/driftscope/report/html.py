"""The report as one page that opens offline: a function of the report document alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from driftscope.report import text
from driftscope.report.evidence import not_run
from driftscope.report.local import FAULTS
from driftscope.report.local_view import growth_view, local_view
from driftscope.report.names import PAIR_NAMES, pair_words, path_words, place_words
from driftscope.report.verdict import main_pair

_FOLDER = Path(__file__).parent

VERDICT_NAMES = {
    "identical": "Identical",
    "expected-quantization-noise": "Expected quantization noise",
    "bug": "Bug",
    "different-weights": "Different weights",
    "inadmissible": "Inadmissible",
    "inconclusive": "Inconclusive",
}

_CHIPS = {
    "good": ("identical", "expected-quantization-noise", "admissible", "holds", "supported", "reproduced"),
    "fine": ("quantized-from", "equal-under", "downcast", "done"),
    "against": ("falsified", "refuted"),
    "bad": (
        "bug",
        "different",
        "transformed",
        "non-finite",
        "fails",
        "inadmissible",
        "different-weights",
        "corrupt",
    ),
    "mixed": ("regime-dependent", "inconclusive", "vacuous", "unclassified", "outlying"),
}
_MARKS = {"good": "✓", "fine": "≈", "bad": "✗", "against": "✗", "mixed": "◐", "none": "–"}

_WORDS = {
    "quantized-from": "quantized",
    "equal-under": "equal under a declared transform",
    "downcast": "rounded to a smaller float format",
    "transformed": "under an undeclared transform",
}

_MECHANISMS = {"weight": "weight quantization", "activation": "activation quantization"}

_DRAWN = ("teacher.f32|candidate.f32", "candidate.f32|candidate.int8-dot")

_SCOPES = {
    "all": "all tokens of each prompt",
    "all-but-first": "the first token of each prompt left out",
    "last": "the last token of each prompt",
}


def render_html(report: Mapping[str, Any]) -> str:
    """Render a report as one self-contained HTML page.

    Text from the report is escaped; nothing is loaded from anywhere; the same report gives the same bytes.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_unbroken,
    )
    environment.filters.update(
        number=text.number,
        count=text.count,
        percent=text.percent,
        size=text.size,
        chip=chip_kind,
        mark=lambda status: _MARKS[chip_kind(status)],
        place=place_words,
        words=lambda status: _WORDS.get(status, str(status).replace("-", " ")),
        breakable=_breakable,
        safeguards=safeguards,
        arrow=pair_words,
        fault=lambda kind: FAULTS.get(kind, kind),
        path=path_words,
        chance=text.probability,
    )
    environment.globals.update(
        interval=text.percent_interval,
        counted=text.counted,
        listed=text.listed,
        verdict_names=VERDICT_NAMES,
        pair_names=PAIR_NAMES,
        scopes=_SCOPES,
    )
    pictures = {
        name: [{**picture, "svg": Markup(picture["svg"])} for picture in group]
        for name, group in _pictures(report).items()
    }
    return environment.get_template("template.html.j2").render(
        report=report,
        style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
        pictures=pictures,
        legend=_legend(report),
        local=local_view(report["divergence"]),
        growth=growth_view(report["divergence"]),
        figures=_key_figures(report),
        mechanisms=_mechanisms(report),
        interactions=_interactions(report),
        main=main_pair(report["impact"].get("pairs") or []),
        missing=_not_run(report),
        lead=_lead(report["verdict"]),
    )


def chip_kind(status: str) -> str:
    """Return the kind of chip that a status or verdict gets; its word is always written out too."""
    return next((kind for kind, statuses in _CHIPS.items() if status in statuses), "none")


def safeguards(item: Mapping[str, Any]) -> str:
    """Say what kept a test honest: its controls, its regimes, and that its predicate is not constant."""
    said = []
    controls = item.get("controls")
    if isinstance(controls, Mapping) and controls:
        kept = [name for name, control in controls.items() if control.get("as_required")]
        broken = [name for name in controls if name not in kept]
        said.append(f"{len(kept)} of {text.counted(len(controls), 'control')} as required")
        if broken:
            said[-1] += f" (not {text.listed(broken)})"
    if isinstance(item.get("regimes"), Mapping) and item["regimes"]:
        said.append(text.counted(len(item["regimes"]), "regime"))
    domain = item.get("domain")
    if isinstance(domain, Mapping) and domain.get("samples"):
        held = f"{text.count(domain.get('holds', 0))} hold, {text.count(domain.get('fails', 0))} do not"
        said.append(f"over {text.counted(domain['samples'], 'sample')} of the domain {held}")
    return "; ".join(said)


def _lead(verdict: Mapping[str, Any]) -> str:
    """Return the summary without what the page says around it: headline and, if figures follow, reason."""
    rest = str(verdict["summary"]).removeprefix(verdict["headline"]).strip()
    figures = rest.removeprefix(f"{verdict['reasons'][0]}.").strip() if verdict["reasons"] else rest
    return figures or rest


def _unbroken(value: Any) -> Any:
    """Keep a per cent sign on the line of its number."""
    return value.replace(" %", "\u00a0%") if type(value) is str else value


def _breakable(name: str) -> Any:
    """Let a long dotted or dashed name break after its parts only."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.findall(r"[^._/-]*[._/-]?", name) if part)


def _pictures(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Draw every chart that the report has figures for."""
    pairs = _drawn_pairs(report)
    shares = _shares(report)
    impact = main_pair(report["impact"].get("pairs") or [])
    groups: dict[str, list[dict[str, Any]]] = {
        "maps": [],
        "mechanism": [],
        "layer": [],
        "site": [],
        "flips": [],
    }
    flips = [flip for flip in (impact or {}).get("flips", []) if flip.get("logit_noise") is not None]
    if not (pairs or shares or flips):
        return groups
    from driftscope.report import charts, heat_map
    from driftscope.report.svg import inline_svg

    domain = heat_map.nmse_domain([pair["map"] for pair in pairs])
    for index, pair in enumerate(pairs):
        words = pair_words(pair["pair"])
        description = (
            f"Heat map of the propagated NMSE of {words}, layers across and ops down, over"
            f" {text.counted(pair['tokens'], 'token')}. Largest at {place_words(pair['largest'])}."
        )
        svg = inline_svg(heat_map.heat_map(pair["map"], domain), f"map-{index}", words, description)
        groups["maps"].append({"pair": pair, "svg": svg})
    mechanism = _by(shares, "mechanism")
    if mechanism:
        said = ", ".join(f"{share['item']} {text.percent(share['share'])}" for share in mechanism)
        svg = inline_svg(
            charts.mechanism_bars(mechanism, _MECHANISMS), "mechanisms", "Shares by mechanism", f"{said}."
        )
        groups["mechanism"].append({"svg": svg})
    for by, draw in (("layer", charts.layer_bars), ("site", charts.site_bars)):
        for name in _MECHANISMS:
            members = [share for share in _by(shares, by) if share["mechanism"] == name]
            items = [share for share in members if share["item"] != "interaction"]
            if items:
                top = max(items, key=lambda share: share["share"])
                title = f"{_MECHANISMS[name].capitalize()} by {by}"
                description = f"Largest: {by} {top['item']} with {text.percent(top['share'])}."
                svg = inline_svg(draw(members, name), f"{by}-{name}", title, description)
                groups[by].append({"svg": svg, "title": title, "top": top, "mechanism": name})
    if flips:
        svg = inline_svg(
            charts.flips(flips),
            "flips",
            "Changed next tokens",
            "The teacher's margin against the size of the logit difference; under the dashed line the"
            " change is within twice the noise.",
        )
        groups["flips"].append({"svg": svg})
    return groups


def _drawn_pairs(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the pairs drawn side by side: weights and arithmetic, or the first two that there are."""
    pairs = {pair["pair"]: pair for pair in report["divergence"].get("pairs") or [] if pair["map"]}
    chosen = [name for name in _DRAWN if name in pairs] or sorted(pairs)[:2]
    return [pairs[name] for name in chosen if any(cell["layer"] >= 0 for cell in pairs[name]["map"])]


def _legend(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the colour scale of the maps: a CSS gradient, and where its decades stand."""
    pairs = _drawn_pairs(report)
    if not pairs:
        return None
    from driftscope.report import heat_map

    cells = [cell for pair in pairs for cell in pair["map"] if cell["layer"] >= 0]
    zero = any(cell["nmse"] == 0 for cell in cells)
    domain = heat_map.nmse_domain([pair["map"] for pair in pairs])
    if domain is None:
        return {"gradient": None, "ticks": [], "zero": zero}
    return {"gradient": ", ".join(heat_map.RAMP), "ticks": heat_map.scale_ticks(domain), "zero": zero}


def _shares(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return report["decomposition"].get("shares") or []


def _by(shares: Sequence[Mapping[str, Any]], by: str) -> list[Mapping[str, Any]]:
    return [share for share in shares if share["by"] == by]


def _mechanisms(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the shares by mechanism, beside the same with the first token of each text left out."""
    inner = {
        s["item"]: s for s in _by(report["decomposition"].get("shares_all_but_first") or [], "mechanism")
    }
    return [
        {**share, "name": _MECHANISMS.get(share["item"], share["item"]), "inner": inner.get(share["item"])}
        for share in _by(_shares(report), "mechanism")
    ]


def _interactions(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Say in words what layers and sites do together, by mechanism."""
    said: dict[str, list[str]] = {"layer": [], "site": []}
    for share in _shares(report):
        if share["item"] == "interaction" and share["by"] in said:
            interval = text.percent_interval(share["low"], share["high"])
            said[share["by"]].append(f"{share['mechanism']} {text.percent(share['share'])} ({interval})")
    return said


def _key_figures(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the figures under the headline: value, what it is, and what it is over."""
    cards = []
    weights, impact = report["weights"], report["impact"]
    if weights["status"] == "done":
        coverage = weights["coverage"]
        expected = coverage["expected"] if coverage["expected"] is not None else weights["tensors"]
        cards.append(
            {
                "value": f"{text.count(coverage['compared'])} of {text.count(expected)}",
                "name": "tensors compared",
                "over": f"{text.count(weights['elements_compared'])} elements",
            }
        )
    pair = main_pair(impact.get("pairs") or [])
    if pair:
        over = f"{text.counted(pair['positions'], 'token position')}"
        kl_interval = ""
        if pair.get("mean_kl_low") is not None:
            kl_interval = f"{text.number(pair['mean_kl_low'], 2)} to {text.number(pair['mean_kl_high'], 2)}; "
        same_interval = text.percent_interval(pair.get("same_top1_low"), pair.get("same_top1_high"))
        cards.append(
            {"value": text.number(pair["mean_kl"]), "name": "mean KL, nats", "over": f"{kl_interval}{over}"}
        )
        cards.append(
            {
                "value": text.percent(pair["same_top1"]),
                "name": "same next token",
                "over": f"{same_interval}; {over}" if same_interval else over,
            }
        )
        if pair.get("ppl_a") is not None and pair.get("ppl_b") is not None:
            tokens = pair.get("known_next_tokens")
            cards.append(
                {
                    "value": f"{text.number(pair['ppl_a'], 4)} → {text.number(pair['ppl_b'], 4)}",
                    "name": "perplexity",
                    "over": text.counted(tokens, "known next token") if tokens is not None else over,
                }
            )
    for share in _by(_shares(report), "mechanism"):
        if share["item"] in _MECHANISMS:
            cards.append(
                {
                    "value": text.percent(share["share"]),
                    "name": f"due to {_MECHANISMS[share['item']]}",
                    "over": text.percent_interval(share["low"], share["high"]) + " of the output energy",
                }
            )
    return cards


def _not_run(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """List everything that was not measured, with the reason."""
    names = {
        "weights": "Sweep of the weights",
        "divergence": "Divergence of the traces",
        "decomposition": "Decomposition",
        "fix_scope": "What a fix would change",
        "impact": "Impact on the next token",
    }
    rows = [
        {"what": name, "why": report[key].get("reason", not_run("no reason given")["reason"])}
        for key, name in names.items()
        if report[key]["status"] == "not-run"
    ]
    rows += _not_replayed(report["divergence"])
    for check in report["admissibility"]["checks"]:
        if check["status"] == "not-run":
            rows.append({"what": f"Admissibility: {check['asked']}", "why": check["found"]})
    for kind in ("falsifiers", "published"):
        rows += [
            {"what": f"{item['id']}: {item['asked']}", "why": item["found"]}
            for item in report[kind]
            if item["verdict"] == "not-run"
        ]
    rows += [
        {"what": f"Gate {gate['id']}: {gate.get('asked', '')}", "why": gate.get("found", "")}
        for gate in report["gates"]
        if gate["status"] == "not-run"
    ]
    return rows


def _not_replayed(divergence: Mapping[str, Any]) -> list[dict[str, str]]:
    """List the paths whose ops were not recomputed, and how to install what they need."""
    local, rows = divergence["local"], []
    if local["status"] != "done" and not local.get("paths"):
        rows.append({"what": "Local error of each op (replay)", "why": local["reason"]})
    for path in local.get("paths") or []:
        if path["status"] != "done":
            install = f" To install it: {path['install']}" if path.get("install") else ""
            rows.append({"what": f"Replay of {path['path']}", "why": f"{path['reason']}.{install}"})
    names = {"vote": "Vote of three or more sources", "guess": "Guess of a foreign arithmetic"}
    for key, name in names.items():
        if local.get(key, {}).get("status") == "not-run":
            rows.append({"what": name, "why": local[key]["reason"]})
    parts = divergence.get("propagation") or {}
    if parts.get("status") == "not-run":
        rows.append({"what": "Error injected and inherited layer by layer", "why": parts["reason"]})
    return rows
