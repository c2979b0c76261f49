"""Bounds that a user sets on the metrics of some tensors: ``REGEX METRIC<VALUE``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from driftscope.errors import InputError

METRICS: dict[str, str] = {
    "nmse": "sum of (a - b)^2 over sum of a^2",
    "nmse_over_expected": "nmse over what the step sizes of b's format predict",
    "relative_l2": "root of nmse",
    "rmse": "root of the mean of (a - b)^2",
    "mean_diff": "mean of |a - b|",
    "max_diff": "largest |a - b|",
    "cosine_similarity": "cosine of the angle between a and b",
    "std_ratio": "standard deviation of b over that of a",
    "identical_share": "share of values that are equal",
    "small_count": "values with 0 < |a - b| < 1e-3",
    "medium_count": "values with 1e-3 <= |a - b| < 1e-2",
    "large_count": "values with |a - b| >= 1e-2",
}
"""What a bound can be set on, and its meaning."""

_COMPARATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(r"(?P<pattern>.*\S)\s+(?P<metric>\w+)\s*(?P<comparator><=|>=|<|>)\s*(?P<value>\S+)")
_EXAMPLE = r"expected 'REGEX METRIC<VALUE', e.g. 'mlp\.down_proj nmse<1e-3' or '.* cosine_similarity>0.999'"


@dataclass(frozen=True)
class Threshold:
    """A bound on one metric of every tensor whose name matches.

    Attributes:
        text: as it was given.
        pattern: searched in the canonical and in the stored names of a tensor.
        metric: one of `METRICS`.
        comparator: ``<``, ``<=``, ``>`` or ``>=``.
        value: the bound.
    """

    text: str
    pattern: re.Pattern[str]
    metric: str
    comparator: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read a bound.

        Raises:
            InputError: not of the form, an unknown metric, or not a number.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise InputError(f"--threshold {text!r}: {_EXAMPLE}")
        if match["metric"] not in METRICS:
            raise InputError(
                f"--threshold {text!r}: unknown metric {match['metric']!r}; expected one of "
                f"{', '.join(METRICS)}"
            )
        try:
            value = float(match["value"])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"--threshold {text!r}: {match['value']!r} is not a number; {_EXAMPLE}")
        pattern = compiled(match["pattern"], "--threshold")
        return cls(text, pattern, match["metric"], match["comparator"], value)

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a tensor of the sweep meets the bound; a metric that has no value does not."""
        found = metric_of(row, self.metric)
        return found is not None and _COMPARATORS[self.comparator](found, self.value)


def compiled(pattern: str, option: str) -> re.Pattern[str]:
    """A regular expression of the command line.

    Raises:
        InputError: it is not one.
    """
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{option} {pattern!r}: is not a regular expression ({error})") from error


def metric_of(row: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a row of the sweep; None where it has no value."""
    if metric == "nmse_over_expected":
        nmse, expected = row["nmse"], row["expected_nmse"]
        return nmse / expected if nmse is not None and expected else None
    if metric == "identical_share":
        return row["identical_count"] / row["element_count"] if row["element_count"] else None
    value = row[metric]
    return None if value is None else float(value)
