"""Budgets over JSON-lines files: is the median of a field under its ceiling, by more than chance?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval

_SHOWN_PROBLEMS = 5
_DOMAIN_MEDIANS = (1.0, 10.0, 100.0, 300.0, 1000.0, 10000.0)
_TIMEOUT = 60000.0
_NULL_FILES, _NULL_RESAMPLES = 200, 200


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: the files of the parameters, if there are any."""
    return sorted(set(_files(parameters).values()))


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Take the median of a field over the lines of a file.

    Args:
        parameters: `field`; `files`, regime to a file relative to the results folder; `resamples`,
            `confidence`.
        regimes: name to a stand-in, for where `files` has none: `count` lines, log-normal with exactly the
            `median` and with the standard deviation `spread` of the logarithm.
        seeds: the first draws the stand-ins, all of them the null model.
        evidence: the files.

    Returns:
        In each regime: `lines`, `median` with its bootstrap interval, `largest`, `stand_in`, and `problems`.
        A line that is no JSON object, lacks the field, or has no finite number in it is a problem, and a file
        with one has no median. `problem_count` and `empty_count` are over all regimes. `null`, for each
        regime's number of lines and spread: how often the median lies under the true one, and how often
        its whole interval does.
    """
    field, files = parameter(parameters, "field", str), _files(parameters)
    absent = [name for name in inputs(parameters) if not evidence.has(name)]
    if absent:
        return {"status": "not-run", "reason": f"{', '.join(absent)} is not there"}
    unknown = sorted(set(files) - set(regimes))
    if unknown:
        raise InputError(f"measurement parameter `files` names {unknown[0]!r}, which is no regime")
    resampling = Resampling.of(parameters)
    stand_ins = {name: _stand_in(regime) for name, regime in regimes.items()}
    found = {}
    for name, shape in stand_ins.items():
        text = evidence.text(files[name]) if name in files else as_lines(field, _drawn(seeds[0], *shape))
        found[name] = _metrics(text, field, resampling) | {"stand_in": name not in files}
    few = min(count for count, _, _ in stand_ins.values())

    def like(value: float, timeouts: int = 0) -> dict[str, Any]:
        values = _drawn(seeds[0], few, value, 0.25)
        values[:timeouts] = _TIMEOUT
        return _metrics(as_lines(field, values), field, resampling)

    return {
        "samples": sum(metrics["lines"] for metrics in found.values()),
        "field": field,
        "problem_count": sum(len(metrics["problems"]) for metrics in found.values()),
        "empty_count": sum(metrics["lines"] == 0 for metrics in found.values()),
        "regimes": found,
        "null": {
            name: _null(seeds, count, spread, resampling) for name, (count, _, spread) in stand_ins.items()
        },
        "controls": {"fast": like(1.0), "timeouts": like(1.0, timeouts=few * 3 // 4 + 1)},
        "domain": [like(value) for value in _DOMAIN_MEDIANS],
    }


def read_field(text: str, field: str) -> tuple[list[float], list[dict[str, Any]], int]:
    """Read a field of every line.

    Args:
        text: JSON objects, one a line; empty lines are left out.
        field: name of the field.

    Returns:
        The numbers, the problems (`line` from 1, `what`), and how many lines there are.
    """
    values: list[float] = []
    problems: list[dict[str, Any]] = []
    lines = 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        lines += 1
        value = _number(line, field)
        if isinstance(value, str):
            problems.append({"line": number, "what": value})
        else:
            values.append(value)
    return values, problems, lines


def _number(line: str, field: str) -> float | str:
    """Return the number, or what is wrong with the line."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return "no JSON"
    if not isinstance(document, dict):
        return "no JSON object"
    if field not in document:
        return f"no field {field}"
    value = document[field]
    if not isinstance(value, int | float) or isinstance(value, bool):
        return f"{field} is no number"
    try:
        number = float(value)
    except OverflowError:
        return f"{field} is not finite"
    return number if math.isfinite(number) else f"{field} is not finite"


def as_lines(field: str, values: F64) -> str:
    """Write values as JSON lines."""
    return "".join(
        json.dumps({"step": step, field: float(value)}) + "\n" for step, value in enumerate(values)
    )


def _files(parameters: Mapping[str, Any]) -> dict[str, str]:
    files = parameters.get("files", {})
    if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"measurement parameter `files` is {files!r}; expected a file for each regime")
    for name in files.values():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise InputError(
                f"measurement parameter `files` has {name!r}; expected a path in the results folder"
            )
    return dict(files)


def _stand_in(regime: Mapping[str, Any]) -> tuple[int, float, float]:
    return (
        parameter(regime, "count", int, least=2),
        parameter(regime, "median", float, least=0.0),
        parameter(regime, "spread", float, least=0.0),
    )


def _drawn(seed: int, count: int, median: float, spread: float) -> F64:
    """Log-normal values whose sample median is `median`, to the hundredth that logs are printed with."""
    normal = generator(seed, count).standard_normal(count)
    values: F64 = np.round(median * np.exp(spread * (normal - np.median(normal))), 2)
    return values


def _metrics(text: str, field: str, resampling: Resampling) -> dict[str, Any]:
    values, problems, lines = read_field(text, field)
    found: dict[str, Any] = {"lines": lines, "problems": problems[:_SHOWN_PROBLEMS]}
    if values and not problems:
        array = np.array(values, dtype=np.float64)
        found["median"] = with_interval(_median, array, resampling)
        found["largest"] = rounded(array.max())
    return found


def _median(sample: F64) -> F64:
    return np.median(sample, axis=1)


def _null(seeds: Sequence[int], count: int, spread: float, resampling: Resampling) -> dict[str, float]:
    """Files from a distribution whose median is 1: how often do they look faster than that?"""
    quick = Resampling(_NULL_RESAMPLES, resampling.confidence)
    bare = whole = 0
    for index in range(_NULL_FILES):
        random = generator(seeds[index % len(seeds)], count, index)
        interval = with_interval(_median, np.exp(spread * random.standard_normal(count)), quick)
        bare += interval["value"] < 1.0
        whole += interval["high"] < 1.0
    return {"median_under": rounded(bare / _NULL_FILES), "interval_under": rounded(whole / _NULL_FILES)}
