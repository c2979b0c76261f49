from __future__ import annotations

import math

import pytest

from driftscope.report import text


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "–"),
        (0.0, "0"),
        (1, "1"),
        (134515008, "134,515,008"),
        (0.0437, "0.0437"),
        (14.2134, "14.2"),
        (99.96, "100"),
        (0.00099961, "0.00100"),
        (-1.5, "−1.50"),
        (9.07e-4, "9.07 × 10⁻⁴"),
        (-2.5e-9, "−2.50 × 10⁻⁹"),
        (1.23456e7, "1.23 × 10⁷"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (True, "yes"),
    ],
)
def test_number(value: object, written: str) -> None:
    assert text.number(value) == written


@pytest.mark.parametrize(
    ("share", "written"),
    [
        (None, "–"),
        (0.0, "0.0 %"),
        (0.9313, "93.1 %"),
        (0.00831, "0.83 %"),
        (0.0001234, "0.012 %"),
        (-0.014, "−1.4 %"),
        (-1e-9, "0.000 %"),
    ],
)
def test_percent(share: float | None, written: str) -> None:
    assert text.percent(share) == written


def test_interval_has_the_decimals_of_its_wider_end() -> None:
    assert text.percent_interval(0.0051, 0.0115) == "0.5 to 1.1 %"
    assert text.percent_interval(-0.018, -0.010) == "−1.8 to −1.0 %"
    assert text.percent_interval(None, 0.2) == ""


def test_sizes_and_lists() -> None:
    assert text.size(104_500_000) == "104.5 MB"
    assert text.size(12) == "12 B"
    assert text.size(3_000_000_000_000) == "3.0 TB"
    assert text.counted(1, "tensor") == "1 tensor"
    assert text.counted(1200, "tensor") == "1,200 tensors"
    assert text.listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
