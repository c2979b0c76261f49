"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from driftscope.faultbench.rates import JUDGED

Document = Mapping[str, Any]


def page(document: Document) -> str:
    """The report for a person: targets, faults, misses, what has no effect, controls."""
    return "\n".join(
        [
            "# Fault benchmark",
            "",
            "Known faults are put into models and engines, and driftscope is asked where they are and what",
            "they are. Shares are of the runs whose effect is above the noise floor; brackets hold 95 %",
            "intervals (Clopper and Pearson), for runs taken as independent; those of one fault are not.",
            "",
            "## Targets",
            "",
            *_table(
                ("asked", "found", "share", "met"),
                (
                    (item["asked"], f"{item['count']} of {item['of']}", _share(item), _yes(item["met"]))
                    for item in document["targets"]
                ),
            ),
            "",
            "## Faults",
            "",
            *_faults(document),
            "",
            "## By what was run",
            "",
            *_groups(document["summary"]),
            "",
            "## Misses",
            "",
            *_misses(document),
            "",
            "## No effect above the floor",
            "",
            *_below(document),
            "",
            "## Controls and clean pairs",
            "",
            *_controls(document),
            "",
            "## Not applicable, not run",
            "",
            *_absent(document),
            "",
        ]
    )


def _faults(document: Document) -> list[str]:
    described = {item["id"]: item for item in document["catalogue"]}
    rows = []
    for item in document["by_fault"]:
        about = described[item["fault"]]
        counts = [f"{item[key]['count']}/{item['above_floor']}" for key in JUDGED]
        rows.append(
            (item["fault"], about["says"], about["class"], item["runs"], *counts, _kl(item["largest_kl"]))
        )
    header = ("id", "fault", "class", "runs", "detected", "layer", "op", "class right", "largest KL, nats")
    notes = [f"- {item['id']}: {item['absent']}." for item in document["catalogue"] if item["absent"]]
    return [*_table(header, rows), "", "Injected otherwise than it happened:", "", *notes]


def _groups(found: Mapping[str, Any]) -> list[str]:
    rows: list[tuple[Any, ...]] = [("all", "", *_rates(found["all"]))]
    for group, values in found.items():
        if group.startswith("by_"):
            rows += [(group.removeprefix("by_"), name, *_rates(item)) for name, item in values.items()]
    return _table(("", "", "runs", "above floor", "detected", "op", "class"), rows)


def _rates(item: Mapping[str, Any]) -> tuple[Any, ...]:
    shares = (_share(item[key]) for key in ("detected", "op_right", "class_right"))
    return (item["runs"], item["above_floor"], *shares)


def _misses(document: Document) -> list[str]:
    wanted = set(document["misses"])
    rows = []
    for row in document["rows"]:
        if row["id"] in wanted:
            failed = ", ".join(key.replace("_", " ") for key in JUDGED if not row[key])
            rows.append(
                (row["id"], failed, _place(row["expected"]), _place(row["found"]), _kl(row["effect"]["kl"]))
            )
    header = ("run", "not", "expected", "found", "KL, nats")
    return _table(header, rows) if rows else ["None."]


def _below(document: Document) -> list[str]:
    wanted = set(document["below_floor"])
    rows = [
        (row["id"], _kl(row["effect"]["kl"]), _figure(row["effect"]["over_predicted"]), _yes(row["detected"]))
        for row in document["rows"]
        if row["id"] in wanted
    ]
    header = ("run", "KL, nats", "largest energy over predicted", "detected all the same")
    return _table(header, rows) if rows else ["None."]


def _controls(document: Document) -> list[str]:
    asked = document["controls_asked"]
    rows = []
    for name in asked:
        mine = [
            row
            for row in (*document["clean"], *document["controls"])
            if row["control"] == name and row["status"] == "run"
        ]
        rows.append((name, asked[name], len(mine), sum(bool(row["alarm"]) for row in mine)))
    found = _table(("id", "what is no fault", "runs", "alarms"), rows)
    return [*found, "", *(f"- alarm: {name}" for name in document["alarms"])]


def _absent(document: Document) -> list[str]:
    rows = [(item["id"], item["reason"]) for key in ("not_applicable", "not_run") for item in document[key]]
    return _table(("run", "reason"), rows) if rows else ["None."]


def _place(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "nothing"
    part = f".{found['part']}" if found.get("part") else ""
    layer = "" if found["layer"] < 0 else f"layers.{found['layer']}."
    return f"{layer}{found['tap']}{part}, {found['class']}"


def _share(item: Mapping[str, Any]) -> str:
    if item["rate"] is None:
        return ""
    return f"{100 * item['rate']:.1f} % [{100 * item['low']:.1f}, {100 * item['high']:.1f}]"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _kl(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2g}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *(line(row) for row in rows)]
