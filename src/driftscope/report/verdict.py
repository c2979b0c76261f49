"""The verdict: what the finished sections of a report say together. It judges; it measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from driftscope.report.local import FAULTS, is_clean
from driftscope.report.text import count, counted, listed, number, percent, percent_interval, probability

CLASSES = (
    "identical",
    "expected-quantization-noise",
    "bug",
    "different-weights",
    "inadmissible",
    "inconclusive",
)

HEADLINES = {
    "identical": "The two models are identical in everything that was compared.",
    "expected-quantization-noise": "No bug found: the candidate differs as its quantization predicts.",
    "bug": "This is a bug, not the price of quantization.",
    "different-weights": "These are different weights, not a conversion of one model.",
    "inadmissible": "No verdict: the two sides may not be compared.",
    "inconclusive": "No verdict: the evidence does not decide.",
}

CORRUPT = "corrupt-block"
"""Class of the fault of a tensor one block of which is corrupt."""

CORRUPT_SAID = 3
"""Corrupt blocks that the reasons name; the section on weights lists more."""

Section = Mapping[str, Any]


def verdict_section(report: Mapping[str, Any]) -> dict[str, Any]:
    """Judge a report's sections.

    Args:
        report: the sections `admissibility`, `weights`, `divergence`, `decomposition`, `falsifiers` and
            `impact`, as in the report.

    Returns:
        ``class`` (one of `CLASSES`), ``layer`` and ``op`` (of the first fault, else None), ``headline``,
        ``summary`` in plain words with figures, ``reasons`` and ``limits`` of the verdict.
    """
    kind, place, reasons = _decide(report)
    layer, op = place or (None, None)
    headline = _headline(kind, place, report["divergence"].get("local", {}).get("fault"), report["weights"])
    reasons = [*reasons, *_at_the_floor(kind, report["divergence"].get("local", {}))]
    figures = [] if kind == "inadmissible" else _figures(report)
    lead = [f"{reasons[0]}."] if reasons else []
    return {
        "class": kind,
        "layer": layer,
        "op": op,
        "headline": headline,
        "summary": " ".join([headline, *lead, *figures]),
        "reasons": reasons,
        "limits": _limits(report),
    }


def _headline(
    kind: str, place: tuple[int | None, str] | None, fault: Section | None, weights: Section
) -> str:
    """Say the class and, where there is one, the place: of a fault that has a kind, that kind as well."""
    if place is None:
        return HEADLINES[kind]
    if kind != "bug":
        return f"{HEADLINES[kind]} They part first at {_at(*place)}."
    replayed = fault is not None and place == _place_of(fault)
    corrupt = _first_corrupt(weights)
    if corrupt and place == _place_of_tensor(corrupt) and not (fault and replayed and _of_engine(fault)):
        return f"{HEADLINES[kind]} It starts at {_at(*place)}: {FAULTS[CORRUPT]}."
    if not fault or not replayed:
        return f"{HEADLINES[kind]} It starts at {_at(*place)}."
    said = f"It starts at {_at(*place)}: {FAULTS.get(fault['class'], fault['class'])}."
    if _of_engine(fault):
        return f"This is an engine bug of {fault['path']}, not the price of quantization. {said}"
    return f"{HEADLINES[kind]} {said}"


Decision = tuple[str, tuple[int | None, str] | None, list[str]]


def _decide(report: Mapping[str, Any]) -> Decision:
    admissibility, weights, divergence = (report[key] for key in ("admissibility", "weights", "divergence"))
    if admissibility["status"] == "inadmissible":
        failed = [check for check in admissibility.get("checks", []) if check["status"] == "fails"]
        reasons = [f"Asked: {check['asked']}; found: {check['found']}" for check in failed]
        return "inadmissible", None, reasons or [admissibility.get("reason", "an admissibility check fails")]
    fault = divergence.get("local", {}).get("fault")
    at_fault = _weights_at_fault(weights) if weights["status"] == "done" else None
    if at_fault and fault:
        return _joined(at_fault, fault)
    if at_fault is None and fault:
        return "bug", _place_of(fault), _fault_reasons(fault)
    if weights["status"] != "done":
        return "inconclusive", None, [f"No weights were compared: {weights.get('reason', weights['status'])}"]
    if weights["tensors"] == 0 or weights["elements_compared"] == 0:
        return "inconclusive", None, ["The sweep compared nothing"]
    coverage = weights["coverage"]
    if coverage["expected"] != coverage["compared"] or weights["missing"]:
        compared, expected = count(coverage["compared"]), count(coverage["expected"])
        return "inconclusive", None, [f"The sweep compared {compared} of {expected} tensors"]
    if at_fault:
        return at_fault
    if weights["relations"].get("unclassified", 0):
        unknown = weights["relations"]["unclassified"]
        return "inconclusive", None, [f"The relation of {counted(unknown, 'tensor')} was not classified"]
    if admissibility["status"] != "admissible":
        why = admissibility.get("reason", admissibility["status"])
        return "inconclusive", None, [f"Admissibility is not established: {why}"]
    if divergence["status"] != "done":
        return "inconclusive", None, [f"No traces were compared: {divergence.get('reason', 'not run')}"]
    if non_finite := divergence.get("non_finite"):
        place = (_layer(non_finite["layer"]), non_finite["tap"])
        values = counted(non_finite["count"], "value")
        reason = (
            f"{values} not finite at {_at(*place)} on {non_finite['path']}, where the teacher's are finite"
        )
        return "bug", place, [reason]
    return _noise_or_not(report)


def _weights_at_fault(weights: Section) -> Decision | None:
    tensors = weights["tensors"]
    if weights["conclusion"] == "different-weights":
        return "different-weights", None, [weights["statement"].removeprefix("Different weights: ")]
    unexplained = weights["unexplained"]
    if not unexplained:
        return None
    first = weights["first_unlike"]
    among = f", the first of {count(unexplained)} in the model's order" if unexplained > 1 else ""
    reasons = [f"{_what_it_is(first, weights)}{among}"]
    reasons += _corrupt_reasons(weights)
    if weights["statement"]:
        reasons.append(weights["statement"])
    reasons.append(f"{count(tensors - unexplained)} of {counted(tensors, 'tensor')} are explained")
    return "bug", _place_of_tensor(first), reasons


def _corrupt_findings(weights: Section) -> list[Section]:
    """The findings in blocks that no format leaves, in the model's order."""
    blocks = weights.get("blocks") or {}
    return [item for item in blocks.get("findings", []) if item["corrupt"]]


def _first_corrupt(weights: Section) -> Section | None:
    """The finding that makes the first tensor that no conversion explains a corrupt one, if it is one."""
    first = weights.get("first_unlike") or {}
    found = (item for item in _corrupt_findings(weights) if item["tensor"] == first.get("tensor"))
    return next(found, None)


def _corrupt_reasons(weights: Section) -> list[str]:
    """Say which blocks are corrupt and how that is seen."""
    found = _corrupt_findings(weights)
    reasons = [f"{item['tensor']}, {item['statement']}. Class: {CORRUPT}" for item in found[:CORRUPT_SAID]]
    if len(found) > CORRUPT_SAID:
        more = counted(len(found) - CORRUPT_SAID, "corrupt block")
        reasons.append(f"{more} more; they are in {counted(weights['corrupt_tensors'], 'tensor')}")
    return reasons


def _what_it_is(first: Section, weights: Section) -> str:
    """Say what a tensor is that is not the teacher's."""
    if corrupt := _first_corrupt(weights):
        start, end = corrupt["columns"]
        return f"{first['tensor']} holds a corrupt block (row {corrupt['row']}, columns {start} to {end - 1})"
    if first["relation"] == "non-finite":
        return f"{first['tensor']} has values that are not finite"
    found: Section = next((item for item in weights["at_fault"] if item["tensor"] == first["tensor"]), {})
    if first["relation"] == "different" or not found:
        return f"{first['tensor']} is different"
    words = FAULTS.get(found["class"], found["class"])
    return f"{first['tensor']} is the teacher's under {listed(found['transforms'])}: {words}"


def _joined(decision: Decision, fault: Section) -> Decision:
    """Keep what the sweep decided; the replay adds the place, where the weights themselves are flagged."""
    kind, place, reasons = decision
    if place is None and fault["component"] == "model":
        place = _place_of(fault)
    return kind, place, [*reasons, *_fault_reasons(fault)]


def _fault_reasons(fault: Section) -> list[str]:
    """Say which op of which path is at fault, by what evidence, and which other paths are."""
    op = f"{fault['tap']} ({fault['part']})" if fault["part"] else fault["tap"]
    at = _at(_layer(fault["layer"]), op)
    if fault["component"] == "engine":
        whose = "from its own recorded inputs it does not give what its weights and declared arithmetic do"
    else:
        whose = "its weights or hyperparameters give other values than the teacher's, beyond quantization"
    chance = (
        f" (chance of that in a clean trace: {probability(fault['p_value'])})"
        if fault["p_value"] is not None
        else ""
    )
    reasons = [f"{fault['path']} at {at}: {whose}{chance}. Class: {fault['class']}"]
    if fault["statement"]:
        reasons.append(fault["statement"].rstrip("."))
    if better := fault["fits_better"]:
        said = better["statement"].rstrip(".") or better["arithmetic"]
        reasons.append(f"Another arithmetic than the declared one explains {fault['path']} better: {said}")
    if others := [path for path in fault["paths"] if path != fault["path"]]:
        reasons.append(f"The same op is flagged on {listed(others, 5)}")
    reasons += [
        f"{other['path']} is flagged too, first at {_at(_layer(other['layer']), other['tap'])}"
        f" ({other['component']}, {other['class']})"
        for other in fault["elsewhere"]
    ]
    return reasons


def _at_the_floor(kind: str, local: Section) -> list[str]:
    """Say which paths have every op at its floor, and what was only captured at another point."""
    if kind == "inadmissible" or local.get("status") != "done":
        return []
    clean = [path for path in local["paths"] if is_clean(path)]
    reasons = []
    if clean:
        ops, names = sum(path["tested"] for path in clean), [path["path"] for path in clean]
        of = f"path {names[0]}" if len(names) == 1 else f"paths {listed(names, 6)}"
        points = any(path["capture_points"] for path in clean)
        rest = ", where it was captured as named" if points else ""
        reasons.append(f"Every one of {counted(ops, 'op')} of {of} is at its floor{rest}")
    reasons += [
        f"{path['path']} records {_at(_layer(point['layer']), point['tap'])} at another capture point"
        + (f" ({point['found']})" if point["found"] else "")
        + (f" in {count(len(point['layers']))} layers" if len(point["layers"]) > 1 else "")
        + "; that is no divergence"
        for path in local["paths"]
        if path["status"] == "done"
        for point in path["capture_points"][:3]
    ]
    return reasons


def _of_engine(fault: Section) -> bool:
    return bool(fault["component"] == "engine")


def _place_of_tensor(item: Section) -> tuple[int | None, str]:
    return _layer(item["layer"]), item["op"]


def _place_of(fault: Section) -> tuple[int | None, str]:
    return _layer(fault["layer"]), fault["tap"]


def _noise_or_not(report: Mapping[str, Any]) -> Decision:
    """Every tensor is explained and every value is finite: identical, noise, or undecided."""
    weights, divergence = report["weights"], report["divergence"]
    relations, tensors = weights["relations"], weights["tensors"]
    same = relations.get("identical", 0) + relations.get("equal-under", 0)
    pairs = divergence["pairs"]
    if same == tensors:
        if all(pair["largest"] is None for pair in pairs):
            taps = sum(pair["taps"] for pair in pairs)
            held = f"All {counted(tensors, 'tensor')} hold the same values"
            return "identical", None, [f"{held} and all {count(taps)} compared taps agree bit for bit"]
        unlike = next((p for p in pairs if _same_arithmetic(p["pair"]) and p["first_differing"]), None)
        if unlike:
            first = unlike["first_differing"]
            place = (_layer(first["layer"]), first["tap"])
            differences = [item["key"] for item in weights["metadata_differences"]]
            reasons = [
                f"All tensors hold the same values, but {unlike['pair']} part at {_at(*place)}",
                *([f"The models' metadata differ in {listed(differences)}"] if differences else []),
            ]
            return "bug", place, reasons
        reason = (
            f"All {counted(tensors, 'tensor')} hold the same values; what differs is the integer arithmetic"
        )
    else:
        quantized, rounded = relations.get("quantized-from", 0), relations.get("downcast", 0)
        reason = (
            f"{count(quantized)} of {counted(tensors, 'tensor')} are the teacher's, quantized within what"
            f" their format predicts, and {count(same)} hold the same values"
        )
        if rounded:
            reason += f"; {count(rounded)} are the teacher's rounded to a smaller float format, bit for bit"
    changing = [item["key"] for item in weights["metadata_differences"] if item["matters"]]
    metadata = [f"The models' metadata differ in {listed(changing)}"] if changing else []
    return _confirmed_noise(report, [reason, *metadata])


def _confirmed_noise(report: Mapping[str, Any], reasons: list[str]) -> Decision:
    """Call it noise only if the decomposition's controls hold and no falsifier contradicts."""
    decomposition = report["decomposition"]
    if decomposition["status"] != "done":
        why = decomposition.get("reason", decomposition["status"])
        return "inconclusive", None, [*reasons, f"The decomposition gives no shares: {why}"]
    broken = [control for control in decomposition["checks"] if control["status"] != "holds"]
    if broken:
        found = [
            f"A control of the decomposition fails: {item['asked']}; found {item['found']}" for item in broken
        ]
        return "inconclusive", None, [*found, *reasons]
    contradicting = [
        item["id"]
        for item in report["falsifiers"]
        if "expected-quantization-noise" in (item.get("contradicts") or [])
    ]
    if contradicting:
        return "inconclusive", None, [f"Contradicted by falsifier {listed(contradicting)}", *reasons]
    reasons.append("The controls of the decomposition hold: no-op gives 0, all promoted gives all")
    return "expected-quantization-noise", None, reasons


def _figures(report: Mapping[str, Any]) -> list[str]:
    """Say in one sentence each what the difference does and what causes it."""
    sentences = []
    pair = main_pair(report["impact"].get("pairs") or [])
    if pair:
        sentences.append(
            f"Over {counted(pair['positions'], 'token position')} the candidate picks the same next token at"
            f" {percent(pair['same_top1'])}, with a mean KL divergence of {number(pair['mean_kl'])} nats."
        )
    mechanisms = [
        share for share in report["decomposition"].get("shares") or [] if share["by"] == "mechanism"
    ]
    named = [share for share in mechanisms if share["item"] != "interaction"]
    if named:
        top = max(named, key=lambda share: share["share"])
        between = percent_interval(top["low"], top["high"])
        interval = (
            f" ({percent(report['decomposition'].get('confidence'), 0)} interval {between})"
            if between
            else ""
        )
        sentences.append(
            f"{top['item'].capitalize()} quantization brings in {percent(top['share'])} of the energy of the"
            f" output difference{interval}."
        )
    return sentences


def main_pair(pairs: Sequence[Section]) -> Section | None:
    """Return the pair that compares the teacher with the candidate as it runs: the integer path if there."""
    ranked = sorted(
        pairs,
        key=lambda pair: (
            not pair["pair"].startswith("teacher."),
            not pair["pair"].endswith("|candidate.int8-dot"),
            pair["pair"],
        ),
    )
    return ranked[0] if ranked else None


def _limits(report: Mapping[str, Any]) -> list[str]:
    """Say what the verdict does not rest on."""
    limits = []
    local = report["divergence"].get("local", {})
    if local.get("status") == "done":
        limits += [
            f"{path['path']} was not replayed: {path['reason']}"
            + (f"; to install it: {path['install']}" if path.get("install") else "")
            for path in local["paths"]
            if path["status"] != "done"
        ]
    else:
        limits.append(
            "Local errors were not measured (the replay was not run): a fault inside one op that the weights"
            " do not show would appear here only as part of the propagated error"
        )
    if report["impact"]["status"] != "done":
        limits.append(f"The impact on the next token was not measured: {report['impact'].get('reason', '')}")
    undecided = [
        item["id"]
        for item in report["falsifiers"]
        if item["verdict"] in ("inconclusive", "vacuous", "inadmissible", "not-run")
    ]
    if len(undecided) == len(report["falsifiers"]):
        limits.append("No falsifier decided anything")
    elif undecided:
        limits.append(f"Falsifiers that decided nothing: {listed(undecided, 5)}")
    return limits


def _same_arithmetic(pair: str) -> bool:
    left, _, right = pair.partition("|")
    return left.rpartition(".")[2] == right.rpartition(".")[2]


def _layer(layer: int) -> int | None:
    return None if layer < 0 else layer


def _at(layer: int | None, op: str) -> str:
    return op if layer is None else f"layer {layer}, {op}"
