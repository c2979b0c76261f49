"""May traces be compared? Pure functions of what each trace says about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Place = tuple[str, int, str, str, int]
"""Prompt, layer (-1 for the whole model), tap, scope, position (-1 unless the scope is ``token``)."""


@dataclass(frozen=True)
class Population:
    """What one statistic of a trace is over: tokens, values, and what exactly was captured."""

    token_count: int
    count: int
    capture_point: str


@dataclass(frozen=True)
class TraceMetadata:
    """What a trace says about itself.

    Attributes:
        path: e.g. ``teacher.f32``.
        token_ids_sha256: digest of the token ids of each prompt.
        statistics: what every statistic is over, by its place.
        expected: places that the run was asked for; what was not captured must show.
    """

    path: str
    token_ids_sha256: Mapping[str, str]
    statistics: Mapping[Place, Population]
    expected: frozenset[Place] = frozenset()

    @classmethod
    def of_rows(
        cls,
        path: str,
        token_ids_sha256: Mapping[str, str],
        rows: Iterable[Mapping[str, Any]],
        expected: Iterable[Place] = (),
    ) -> TraceMetadata:
        """Read the metadata off the rows of a ``trace`` table."""
        statistics = {
            (row["prompt"], row["layer"], row["tap"], row["scope"], row["position"]): Population(
                row["token_count"], row["count"], row["capture_point"]
            )
            for row in rows
        }
        return cls(path, token_ids_sha256, statistics, frozenset(expected))


def admissibility(traces: Sequence[TraceMetadata]) -> dict[str, Any]:
    """Check that all traces are over the same tokens, scopes, counts and capture points, and complete.

    Returns:
        ``{admissible, status, checks}``; status is ``admissible`` or ``inadmissible``, a check is
        ``{id, status, asked, found}`` with status ``holds`` or ``fails``. With fewer than two traces there
        is nothing to compare, and that fails.
    """
    traces = sorted(traces, key=lambda trace: trace.path)
    first, others = (traces[0], traces[1:]) if traces else (TraceMetadata("", {}, {}), [])
    checks = [
        _check(
            "two-traces",
            "at least two traces are compared",
            [] if others else [f"only {len(traces)}"],
            f"{len(traces)} traces: {', '.join(trace.path for trace in traces)}",
        ),
        _check(
            "same-token-ids",
            "all traces read the same token ids",
            [*_without_prompts(traces), *_unlike_tokens(first, others)],
            f"{len(first.token_ids_sha256)} prompts with one digest each",
        ),
        _check(
            "same-scopes",
            "every trace has the same taps, token scopes and positions",
            _unlike_places(first, others),
            f"{len(first.statistics)} statistics in each",
        ),
        _check(
            "same-count",
            "each pair of statistics is over as many tokens and values",
            _unlike_populations(first, others, lambda population: (population.token_count, population.count)),
            "token count and value count agree everywhere",
        ),
        _check(
            "same-capture-point",
            "each pair of statistics was captured at the same point",
            _unlike_populations(first, others, lambda population: population.capture_point),
            "the capture points agree everywhere",
        ),
        _check(
            "coverage",
            "every tap that was asked for is there",
            _absent(traces),
            "nothing that was asked for is absent",
        ),
        _check("not-empty", "every statistic is over at least one value", _empty(traces), "none is empty"),
    ]
    holds = all(check["status"] == "holds" for check in checks)
    return {"admissible": holds, "status": "admissible" if holds else "inadmissible", "checks": checks}


def _check(name: str, asked: str, faults: Sequence[str], held: str) -> dict[str, Any]:
    """A check holds where it found no fault; else the first one is told, and the rest are counted."""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    found = f"{faults[0]}{more}" if faults else held
    return {"id": name, "status": "fails" if faults else "holds", "asked": asked, "found": found}


def _without_prompts(traces: Sequence[TraceMetadata]) -> list[str]:
    faults = [f"{trace.path} names no prompt" for trace in traces if not trace.token_ids_sha256]
    for trace in traces:
        unnamed = sorted({place[0] for place in trace.statistics} - set(trace.token_ids_sha256))
        faults += [f"{trace.path} gives no digest of the token ids of {prompt}" for prompt in unnamed]
    return faults


def _unlike_tokens(first: TraceMetadata, others: Sequence[TraceMetadata]) -> list[str]:
    return [
        f"{prompt}: {_digest(first, prompt)} in {first.path}, {_digest(other, prompt)} in {other.path}"
        for other in others
        for prompt in sorted({*first.token_ids_sha256, *other.token_ids_sha256})
        if first.token_ids_sha256.get(prompt) != other.token_ids_sha256.get(prompt)
    ]


def _digest(trace: TraceMetadata, prompt: str) -> str:
    return trace.token_ids_sha256.get(prompt, "absent")[:12]


def _unlike_places(first: TraceMetadata, others: Sequence[TraceMetadata]) -> list[str]:
    faults = []
    for other in others:
        for one, two in ((first, other), (other, first)):
            alone = sorted(set(one.statistics) - set(two.statistics))
            faults += [f"{_words(place)} is in {one.path} and not in {two.path}" for place in alone]
    return faults


def _unlike_populations(
    first: TraceMetadata, others: Sequence[TraceMetadata], part: Callable[[Population], object]
) -> list[str]:
    faults = []
    for other in others:
        for place in sorted(set(first.statistics) & set(other.statistics)):
            one, two = part(first.statistics[place]), part(other.statistics[place])
            if one != two:
                faults.append(f"{_words(place)}: {one} in {first.path}, {two} in {other.path}")
    return faults


def _absent(traces: Sequence[TraceMetadata]) -> list[str]:
    return [
        f"{_words(place)} is not in {trace.path}"
        for trace in traces
        for place in sorted(trace.expected - set(trace.statistics))
    ]


def _empty(traces: Sequence[TraceMetadata]) -> list[str]:
    faults = [f"{trace.path} has no statistic" for trace in traces if not trace.statistics]
    for trace in traces:
        for place, population in sorted(trace.statistics.items(), key=lambda item: item[0]):
            if population.count <= 0 or population.token_count <= 0:
                faults.append(f"{_words(place)} of {trace.path} is over no value")
    return faults or ([] if traces else ["there is no trace"])


def _words(place: Place) -> str:
    prompt, layer, tap, scope, position = place
    where = tap if layer < 0 else f"layers.{layer}.{tap}"
    tokens = f"token {position}" if position >= 0 else scope
    return f"{where} ({prompt}, {tokens})"
