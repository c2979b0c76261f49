"""Metric paths: how a contract points at one value of an evidence document."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_STEP = re.compile(r"(?P<key>[^.\[\]]*)(?:\[(?P<name>[^=\[\]]+)=(?P<wanted>[^\[\]]*)\])?(?:\.|$)")

_FORMAT = re.compile(r"[+]?,?(\.\d{1,2})?[deEfgGxX%s]?")
"""What a template may ask of a figure: sign, thousands, precision and kind; no width."""


class MissingMetricError(LookupError):
    """A metric path leads nowhere in the document."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass(frozen=True)
class Metric:
    """A value with its interval; both ends equal the value where none was measured."""

    value: Any
    low: Any
    high: Any


def split_path(path: str) -> list[str | tuple[str, str]]:
    """Split a path into keys, list indices, `*` and `(key, value)` selections.

    `weights.rows[tensor=model.norm.weight].nmse` has a selection: what stands between the brackets may
    hold dots.

    Raises:
        MissingMetricError: the path is malformed.
    """
    steps: list[str | tuple[str, str]] = []
    at = 0
    while at < len(path):
        match = _STEP.match(path, at)
        if match is None or match.end() == at or not (match["key"] or match["name"]):
            raise MissingMetricError(path)
        if match["key"]:
            steps.append(match["key"])
        if match["name"] is not None:
            steps.append((match["name"], match["wanted"]))
        at = match.end()
    if not steps or path.endswith("."):
        raise MissingMetricError(path)
    return steps


def resolve(document: Any, path: str) -> Metric:
    """Return the one metric that `path` names.

    An object with `value` (and `low`, `high`) is a metric with its interval; so is a number that has the
    siblings `<name>_low` and `<name>_high`.

    Raises:
        MissingMetricError: it is not there, is null, or the path has a `*`.
    """
    found = resolve_all(document, path)
    if len(found) != 1 or "*" in split_path(path):
        raise MissingMetricError(path)
    return found[0]


def resolve_all(document: Any, path: str) -> list[Metric]:
    """Return every metric that `path` names, in the document's order.

    Raises:
        MissingMetricError: a step leads nowhere, a value is null, or `*` has nothing to stand for.
    """
    found = list(_walk(document, split_path(path), path))
    if not found:
        raise MissingMetricError(path)
    return found


def _walk(value: Any, steps: list[str | tuple[str, str]], path: str) -> Iterator[Metric]:
    if not steps:
        yield _metric(value, path)
        return
    step, rest = steps[0], steps[1:]
    if step == "*":
        members = list(value.values()) if isinstance(value, Mapping) else value
        if not _is_list(members):
            raise MissingMetricError(path)
        for member in members:
            yield from _walk(member, rest, path)
        return
    child = _select(value, step, path)
    if not rest and isinstance(step, str) and isinstance(value, Mapping):
        low, high = value.get(f"{step}_low"), value.get(f"{step}_high")
        if low is not None and high is not None and child is not None:
            yield Metric(child, low, high)
            return
    yield from _walk(child, rest, path)


def _select(value: Any, step: str | tuple[str, str], path: str) -> Any:
    if isinstance(step, tuple):
        key, wanted = step
        if _is_list(value):
            for member in value:
                if isinstance(member, Mapping) and str(member.get(key)) == wanted:
                    return member
        raise MissingMetricError(path)
    if isinstance(value, Mapping):
        if step in value:
            return value[step]
    elif _is_list(value) and step.isdecimal() and int(step) < len(value):
        return value[int(step)]
    raise MissingMetricError(path)


def _metric(value: Any, path: str) -> Metric:
    if isinstance(value, Mapping) and "value" in value:
        inner = value["value"]
        low, high = value.get("low"), value.get("high")
        if inner is None:
            raise MissingMetricError(path)
        return Metric(inner, inner if low is None else low, inner if high is None else high)
    if value is None:
        raise MissingMetricError(path)
    return Metric(value, value, value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


class _Filler(string.Formatter):
    """`str.format` over metric paths: no attribute access, so a template cannot reach into objects."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return resolve(kwargs, field_name).value, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        if not _FORMAT.fullmatch(format_spec):
            raise ValueError(f"format `{format_spec}` is not allowed")
        if isinstance(value, list | tuple):
            return ", ".join(self.format_field(item, format_spec) for item in value)
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        if conversion is not None:
            raise ValueError("conversions are not allowed")
        return value


def fill(template: str, document: Mapping[str, Any]) -> str:
    """Fill a template's `{path:format}` from a document.

    Raises:
        MissingMetricError: a path leads nowhere.
        ValueError: the template is malformed, or a format does not fit its value.
    """
    text = _Filler().vformat(template, (), document)
    return " ".join(text.split())
