"""Measurements into verdicts. Everything here compares and joins; no figure is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from driftscope.contracts.clauses import State, conjunction, evaluate
from driftscope.contracts.metrics import MissingMetricError, fill, resolve
from driftscope.contracts.model import (
    Contract,
    Falsifier,
    Verdict,
    judgement_sha256,
    measurement_sha256,
)
from driftscope.errors import InputError

MINIMUM_REGIMES = 2

DECIDED = ("supported", "falsified", "regime-dependent")
"""Verdicts that answer the question of a falsifier."""


def judge(contract: Contract, falsifier: Falsifier, measurement: Mapping[str, Any] | None) -> dict[str, Any]:
    """Judge one falsifier by its measurement.

    In this order: no measurement is `not-run`; an empty one, or one that breaks a clause of `admits`, is
    `inadmissible`; a predicate that gives one answer over the whole sampled domain is `vacuous`; fewer
    than two measured regimes, a missing metric or a control that does not do its part is `inconclusive`;
    else the prediction holds in all regimes (`supported`), in none (`falsified`), in some
    (`regime-dependent`), or an interval straddles a threshold (`inconclusive`).

    Args:
        contract: the contract of the falsifier.
        falsifier: what is asked.
        measurement: what `driftscope.falsifiers` measured, or None. `regimes` and `controls` are objects
            of metrics; `domain` is a list of such objects, the samples over which the predicate must
            not be constant; `status` other than `done` comes with a `reason`.

    Returns:
        `{id, contract, version, clause, measurement, verdict, reason, asked, found, would_change,
        hypothesis, prediction, controls, regimes, domain, figures, contradicts}`.

    Raises:
        InputError: a template or a figure names a metric that the measurement lacks, or the measurement
            was made by other parameters than the falsifier's.
    """
    document: Mapping[str, Any] = measurement or {}
    regimes = {
        name: _judge_metrics(falsifier, metrics, document)
        for name, metrics in _members(document, "regimes").items()
    }
    controls = {
        control.id: _judge_control(falsifier, control.kind, control.id, document)
        | {"kind": control.kind, "what": control.what}
        for control in falsifier.controls
    }
    domain = _judge_domain(falsifier, document)
    verdict, reason = _verdict(falsifier, measurement, regimes, controls, domain)
    judgement = falsifier.judgement
    decided = verdict in DECIDED
    shown = {**document, "clauses": {clause.id: clause.model_dump() for clause in judgement.clauses}}
    return {
        "id": falsifier.id,
        "contract": contract.id,
        "version": contract.version,
        "clause": judgement_sha256(falsifier),
        "measurement": measurement_sha256(falsifier),
        "verdict": verdict,
        "reason": reason,
        "asked": _sentence(falsifier, "asked", judgement.text.asked, verdict, shown, needed=decided),
        "found": _found(falsifier, verdict, reason, shown),
        "would_change": _sentence(
            falsifier, "would_change", judgement.text.would_change, verdict, shown, needed=decided
        ),
        "hypothesis": falsifier.hypothesis,
        "prediction": falsifier.prediction,
        "controls": controls,
        "regimes": regimes,
        "domain": domain,
        "figures": _figures(falsifier, document, needed=decided),
        "contradicts": list(judgement.contradicts.get(verdict, [])),
    }


def not_run(contract: Contract, falsifier: Falsifier, reason: str) -> dict[str, Any]:
    """Return the verdict document of a falsifier whose measurement is not there."""
    return judge(contract, falsifier, {"status": "not-run", "reason": reason})


def _verdict(
    falsifier: Falsifier,
    measurement: Mapping[str, Any] | None,
    regimes: Mapping[str, dict[str, Any]],
    controls: Mapping[str, dict[str, Any]],
    domain: Mapping[str, Any],
) -> tuple[Verdict, str]:
    if measurement is None:
        return "not-run", "there is no measurement"
    status = measurement.get("status", "done")
    if status != "done":
        return "not-run", str(measurement.get("reason", "the measurement was not run"))
    _refuse_other_parameters(falsifier, measurement)
    if not regimes or not measurement.get("samples"):
        return "inadmissible", "nothing was measured"
    for clause in falsifier.judgement.admits:
        result = evaluate(clause, measurement)
        if result["state"] != "holds":
            return "inadmissible", f"{clause.why or clause.id} (found {result['found']} at {clause.metric})"
    if domain["samples"] < 2:
        return "inconclusive", "no domain was sampled, so that the predicate may be constant"
    if domain["constant"]:
        return "vacuous", f"the predicate gives `{domain['states'][0]}` everywhere in the sampled domain"
    unfit = [name for name in falsifier.measurement.regimes if name not in regimes]
    if unfit or len(regimes) < MINIMUM_REGIMES:
        return "inconclusive", f"regime {', '.join(unfit) or 'number two'} was not measured"
    for name, control in controls.items():
        if not control["as_required"]:
            wanted = "fire" if control["kind"] == "positive" else "stay silent"
            return "inconclusive", f"the {control['kind']} control `{name}` did not {wanted}"
    states = {name: regime["state"] for name, regime in regimes.items()}
    for wanted in ("missing", "open"):
        unclear = [name for name, state in states.items() if state == wanted]
        if unclear and not _both_ways(states.values()):
            what = "a metric is missing" if wanted == "missing" else "the interval straddles the threshold"
            return "inconclusive", f"{what} in regime {', '.join(unclear)}"
    held = [name for name, state in states.items() if state == "holds"]
    if len(held) == len(states):
        return "supported", "the prediction holds in every regime"
    if not held:
        return "falsified", "the prediction fails in every regime"
    return "regime-dependent", f"the prediction holds only in {', '.join(held)}"


def _both_ways(states: Any) -> bool:
    return {"holds", "fails"} <= set(states)


def _members(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    return value if isinstance(value, Mapping) else {}


def _judge_metrics(
    falsifier: Falsifier, metrics: Any, document: Mapping[str, Any], *, local_only: bool = False
) -> dict[str, Any]:
    clauses = [clause for clause in falsifier.judgement.clauses if not local_only or clause.scope == "regime"]
    results = [
        {**evaluate(clause, metrics if clause.scope == "regime" else document), "scope": clause.scope}
        for clause in clauses
    ]
    return {"state": conjunction([result["state"] for result in results]), "clauses": results}


def _judge_control(
    falsifier: Falsifier, kind: str, control_id: str, document: Mapping[str, Any]
) -> dict[str, Any]:
    """Judge a control by the clauses of the regimes; clauses on the whole document are not its own."""
    metrics = _members(document, "controls").get(control_id)
    result = _judge_metrics(falsifier, metrics, document, local_only=True)
    state: State = result["state"]
    return {**result, "as_required": state == ("holds" if kind == "positive" else "fails")}


def _judge_domain(falsifier: Falsifier, document: Mapping[str, Any]) -> dict[str, Any]:
    """Say whether the predicate gives more than one answer over the sampled domain."""
    samples = document.get("domain")
    samples = samples if isinstance(samples, Sequence) and not isinstance(samples, str) else []
    states = [_judge_metrics(falsifier, sample, document, local_only=True)["state"] for sample in samples]
    answers = sorted({state for state in states if state in ("holds", "fails")})
    return {
        "samples": len(states),
        "holds": states.count("holds"),
        "fails": states.count("fails"),
        "states": sorted(set(states)),
        "constant": len(answers) < 2,
    }


def _refuse_other_parameters(falsifier: Falsifier, measurement: Mapping[str, Any]) -> None:
    made_by = measurement.get("measurement")
    if made_by is not None and made_by != measurement_sha256(falsifier):
        raise InputError(
            f"falsifier {falsifier.id}: its measurement was made with other parameters than the contract's;"
            " measure again"
        )


def _found(falsifier: Falsifier, verdict: Verdict, reason: str, shown: Mapping[str, Any]) -> str:
    if verdict in DECIDED:
        return _sentence(falsifier, "found", falsifier.judgement.text.found, verdict, shown, needed=True)
    lead = {
        "not-run": "Not measured",
        "inadmissible": "The measurement does not qualify",
        "vacuous": "The test could not have failed",
        "inconclusive": "Undecided",
    }[verdict]
    return f"{lead}: {reason}."


def _sentence(
    falsifier: Falsifier,
    name: str,
    template: Mapping[Any, str] | str,
    verdict: Verdict,
    shown: Mapping[str, Any],
    *,
    needed: bool,
) -> str:
    if not isinstance(template, str):
        chosen = template.get(verdict) or template.get("default")
        if chosen is None and needed:
            raise InputError(f"falsifier {falsifier.id}: text.{name} has neither `{verdict}` nor `default`")
        template = chosen or ""
    try:
        return fill(template, shown)
    except MissingMetricError as error:
        if not needed:
            return _without_figures(template)
        raise InputError(
            f"falsifier {falsifier.id}: text.{name} names `{error.path}`, which the measurement lacks"
        ) from error
    except ValueError as error:
        raise InputError(f"falsifier {falsifier.id}: text.{name}: {error}") from error


def _without_figures(template: str) -> str:
    """Return a template with its figures as dots: there is nothing to fill them from."""
    kept, depth = [], 0
    for character in template:
        if character == "{":
            depth += 1
            if depth == 1:
                kept.append("…")
        elif character == "}":
            depth -= 1
        elif depth == 0:
            kept.append(character)
    return " ".join("".join(kept).split())


def _figures(falsifier: Falsifier, document: Mapping[str, Any], *, needed: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, path in falsifier.judgement.figures.items():
        try:
            metric = resolve(document, path)
        except MissingMetricError as error:
            if needed:
                raise InputError(
                    f"falsifier {falsifier.id}: figure `{name}` names `{path}`, which the measurement lacks"
                ) from error
            continue
        figures[name] = metric.value
        if metric.low is not metric.value or metric.high is not metric.value:
            figures[f"{name}_low"], figures[f"{name}_high"] = metric.low, metric.high
    return figures
