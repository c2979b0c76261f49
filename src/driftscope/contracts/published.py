"""Published figures as data: each is computed again, and said to be reproduced or refuted."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from driftscope.contracts.expression import Interval, Value, decimal_of, evaluate
from driftscope.contracts.loading import contract_files, load_model
from driftscope.contracts.metrics import MissingMetricError, resolve
from driftscope.contracts.model import Entry, Identifier, MetricPath, Sentence
from driftscope.errors import InputError
from driftscope.evidence.digest import sha256_json

Need = Literal["none", "model-7b", "published-logs"]

_NEEDED = {
    "model-7b": "the weights of Qwen2.5-Coder-7B-Instruct, which this case does not have",
    "published-logs": "the run logs of the published investigation, which were not published",
}
_EPSILON = 4 * sys.float_info.epsilon
_SHOWN_DECIMALS = 10


class Arithmetic(Entry):
    """Plain arithmetic on figures that were themselves printed."""

    expression: Sentence
    inputs: dict[str, str | list[str]] = Field(
        default_factory=dict, description="printed decimals, quoted so that the trailing zeros stay"
    )
    exact_inputs: bool = Field(False, description="take the inputs as printed, without their rounding")


class Measured(Entry):
    """A figure of a falsifier's measurement."""

    falsifier: Identifier
    metric: MetricPath


class Operand(Entry):
    """A published statistic with its population."""

    value: str
    scope: Literal["all", "last", "all-but-first", "token"]
    tokens: int = Field(ge=1)
    channels: int = Field(ge=1)
    path: Sentence


class StatisticRatio(Entry):
    """A ratio of two statistics, formed only if their populations agree."""

    tap: Sentence
    name: Sentence = "std"
    above: Operand
    below: Operand


class Compute(Entry):
    """How a figure is computed again: one of the three ways."""

    arithmetic: Arithmetic | None = None
    measured: Measured | None = None
    ratio: StatisticRatio | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Compute:
        if sum(getattr(self, way) is not None for way in ("arithmetic", "measured", "ratio")) != 1:
            raise ValueError("give exactly one of `arithmetic`, `measured`, `ratio`")
        return self


class PublishedFigure(Entry):
    """One published figure."""

    id: Identifier
    title: Sentence
    asked: str = Field("", description="the question in full, where the title does not make it")
    source: Sentence = Field(description="the public thread, for example paiml/aprender #1550")
    printed: Sentence = Field(description="as printed, quoted; its last digit says how far it is rounded")
    unit: str = ""
    needs: Need = "none"
    compute: Compute | None = None
    meaning: str = Field("", description="what the figure does and does not say, one sentence")

    @model_validator(mode="after")
    def _computed_or_out_of_reach(self) -> PublishedFigure:
        if self.compute is None and self.needs == "none":
            raise ValueError(f"figure `{self.id}` needs nothing, so it must say how to `compute` it")
        return self


class PublishedFile(Entry):
    """One file of published figures."""

    id: Identifier
    title: Sentence
    references: list[Sentence] = Field(min_length=1)
    figures: list[PublishedFigure] = Field(min_length=1)


def load_published(paths: Iterable[Path]) -> list[PublishedFigure]:
    """Read published figures from files and folders, in the order of the file names.

    Raises:
        InputError: a file is not valid, none is found, or a figure's id is used twice.
    """
    figures: dict[str, PublishedFigure] = {}
    for file in contract_files(paths):
        for figure in load_model(file, PublishedFile).figures:
            if figure.id in figures:
                raise InputError(f"{file}: figure id `{figure.id}` is already used")
            figures[figure.id] = figure
    if not figures:
        raise InputError(f"{', '.join(str(path) for path in paths)}: no published figures found")
    return list(figures.values())


def falsifiers_read(figures: Iterable[PublishedFigure]) -> list[str]:
    """Return the ids of the falsifiers whose measurements the figures are read from."""
    read = {
        figure.compute.measured.falsifier
        for figure in figures
        if figure.compute is not None and figure.compute.measured is not None
    }
    return sorted(read)


def judge_published(
    figures: Sequence[PublishedFigure],
    measurements: Mapping[str, Mapping[str, Any]],
    available: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Compute every published figure again and compare it with what was printed.

    Args:
        figures: what was published.
        measurements: falsifier id to its measurement.
        available: what is at hand of the figures' `needs`, for example ``model-7b``.

    Returns:
        One document a figure: `{id, verdict, asked, found, would_change, figures, source, meaning, clause}`
        with the verdict `reproduced`, `refuted`, `not-reproducible-here`, or `not-run` where the measurement
        it is read from is not there.

    Raises:
        InputError: an expression or a metric path is wrong.
    """
    return [_judge(figure, compute(figure, measurements, available)) for figure in figures]


def compute(
    figure: PublishedFigure, measurements: Mapping[str, Mapping[str, Any]], available: Collection[str] = ()
) -> dict[str, Any]:
    """Compute a figure; what was printed is not read.

    Returns:
        `{how, value, low, high}`, or `{how, refused}`, `{needs}`, `{missing}` with the reason.
    """
    if figure.needs != "none" and figure.needs not in available:
        return {"needs": _NEEDED[figure.needs]}
    way = figure.compute
    if way is None:
        return {"missing": "no computation is registered for it"}
    if way.arithmetic is not None:
        return _compute_arithmetic(figure, way.arithmetic)
    if way.measured is not None:
        return _compute_measured(figure, way.measured, measurements)
    assert way.ratio is not None  # the model demands one of the three
    return _compute_ratio(way.ratio)


def _compute_arithmetic(figure: PublishedFigure, arithmetic: Arithmetic) -> dict[str, Any]:
    def read(text: str) -> Interval:
        return Interval.exact(decimal_of(text)[0]) if arithmetic.exact_inputs else Interval.printed(text)

    inputs: dict[str, Value] = {
        name: [read(item) for item in text] if isinstance(text, list) else read(text)
        for name, text in arithmetic.inputs.items()
    }
    try:
        result = evaluate(arithmetic.expression, inputs)
    except InputError as error:
        raise InputError(f"published figure {figure.id}: {error}") from error
    named = {name: text for name, text in arithmetic.inputs.items() if isinstance(text, str)}
    how = arithmetic.expression + (
        f" with {', '.join(f'{name} = {text}' for name, text in named.items())}" if named else ""
    )
    return {"how": how, "value": result.value, "low": result.low, "high": result.high}


def _compute_measured(
    figure: PublishedFigure, measured: Measured, measurements: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    document = measurements.get(measured.falsifier)
    if document is None or document.get("status", "done") != "done":
        return {"missing": f"the measurement of falsifier {measured.falsifier} is not there"}
    try:
        metric = resolve(document, measured.metric)
    except MissingMetricError as error:
        if figure.needs != "none":
            # The model at hand may keep the tensor in another format than the published one did.
            return {"missing": f"falsifier {measured.falsifier} has no such figure of this case"}
        raise InputError(
            f"published figure {figure.id}: measurement {measured.falsifier} has no `{measured.metric}`"
        ) from error
    how = f"the measurement of falsifier {measured.falsifier}"
    return {"how": how, "value": metric.value, "low": metric.low, "high": metric.high}


def _compute_ratio(ratio: StatisticRatio) -> dict[str, Any]:
    # Here, so that judging what needs no statistic does not import the analysis.
    from driftscope.analysis.statistic import Statistic
    from driftscope.errors import InadmissibleError

    above, below = (
        Statistic(
            value=decimal_of(operand.value)[0],
            name=ratio.name,
            tap=ratio.tap,
            scope=operand.scope,
            position=-1,
            token_count=operand.tokens,
            count=operand.tokens * operand.channels,
            capture_point=ratio.tap,
            path=operand.path,
            token_ids_sha256="as published",
        )
        for operand in (ratio.above, ratio.below)
    )
    how = f"{ratio.name} of {above.path} over {below.path} at {ratio.tap}"
    try:
        value = above.ratio(below)
    except InadmissibleError as error:
        return {"how": how, "refused": str(error)}
    ends = evaluate(
        "above / below",
        {"above": Interval.printed(ratio.above.value), "below": Interval.printed(ratio.below.value)},
    )
    return {"how": how, "value": value, "low": ends.low, "high": ends.high}


def _judge(figure: PublishedFigure, computed: Mapping[str, Any]) -> dict[str, Any]:
    space = "" if figure.unit == "x" else " "
    printed = f"{figure.printed}{space}{figure.unit}".strip()
    verdict, found = _verdict(figure, printed, computed)
    figures = {"printed": figure.printed, "unit": figure.unit}
    figures |= {key: computed[key] for key in ("value", "low", "high") if key in computed}
    return {
        "id": figure.id,
        "verdict": verdict,
        "asked": figure.asked or f"{figure.title}: does the published {printed} come out again?",
        "found": found,
        "would_change": {
            "reproduced": f"A computation that does not round to {printed}.",
            "refuted": f"Inputs or a computation from which {printed} follows.",
            "not-reproducible-here": f"Having {computed.get('needs', 'what it needs')}.".replace(
                ", which this case does not have", ""
            ).replace(", which were not published", ""),
            "not-run": "Running the measurement.",
        }[verdict],
        "meaning": figure.meaning,
        "source": figure.source,
        "needs": figure.needs,
        "clause": sha256_json(figure.model_dump(mode="json")),
        "figures": figures,
    }


def _verdict(figure: PublishedFigure, printed: str, computed: Mapping[str, Any]) -> tuple[str, str]:
    if "needs" in computed:
        return "not-reproducible-here", f"It needs {computed['needs']}."
    if "missing" in computed:
        return "not-run", f"Not computed: {computed['missing']}."
    how = computed["how"]
    if "refused" in computed:
        return "refuted", f"No: the ratio is refused, because {computed['refused']}."
    value = computed["value"]
    if isinstance(value, str | bool):
        if str(value) == figure.printed:
            return "reproduced", f"Yes: {how} gives exactly {value}."
        return "refuted", f"No: {how} gives {value}, not {printed}."
    target, half = decimal_of(figure.printed)
    slack = _EPSILON * max(abs(target), abs(value))
    if computed["low"] <= target + half + slack and computed["high"] >= target - half - slack:
        return "reproduced", f"Yes: {how} gives {_shown(value, figure.printed)}."
    ends = f"{_shown(computed['low'], figure.printed)} to {_shown(computed['high'], figure.printed)}"
    rounding = f" ({ends} with the rounding of its inputs)" if computed["low"] != computed["high"] else ""
    return "refuted", f"No: {how} gives {_shown(value, figure.printed)}{rounding}, not {printed}."


def _shown(value: float, printed: str) -> str:
    """Show a computed figure with two digits more than were printed."""
    decimals = len(printed.partition(".")[2])
    if decimals > _SHOWN_DECIMALS:
        return repr(value)
    return f"{value:.{decimals + 2}f}".rstrip("0").rstrip(".") if value != int(value) else f"{int(value)}"
