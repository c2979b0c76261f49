"""The order of a sum: the published bits, the share of bit-equal inputs, and what breaks the verdict."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.errors import InputError
from driftscope.falsifiers import sum_order
from driftscope.kernels.reference import published

PARAMETERS = {"dots": 64, "resamples": 100, "confidence": 0.9}
REGIMES = {
    "normal": {"length": 64, "factors": "normal"},
    "integers": {"length": 64, "factors": "integers-3"},
}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("determinism", "sum-order")


def test_the_published_bits_come_out_in_every_order(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    assert figures["scalar_bits"] == figures["simd_bits"] == figures["reversed_bits"] == "0x44191e70"
    assert f"{figures['value']:.4f}" == "612.4756"


def test_no_two_orders_part_by_more_than_highams_bound(measurement: dict[str, Any]) -> None:
    for regime in measurement["regimes"].values():
        assert 0.0 <= regime["largest_over_bound"] < 1.0


def test_a_sum_of_integers_is_exact_up_to_2_to_the_24() -> None:
    a, b = sum_order._factors(1, 64, 128, "integers-8")
    exact = [
        sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(*row, strict=True))
        for row in zip(a, b, strict=True)
    ]
    assert [Fraction(float(value)) for value in published.simd_dot(a, b)] == exact


def test_the_scalar_side_is_the_kernel_in_order() -> None:
    a, b = sum_order._factors(2, 100, 128, "normal")
    assert np.array_equal(sum_order._scalar(a, b), published.scalar_dot(a, b))


def test_the_simd_side_rounds_once_a_step() -> None:
    a, b = sum_order._factors(3, 4, 8, "normal")
    lanes = [np.float32(float(x) * float(y)) for x, y in zip(a[0], b[0], strict=True)]
    total = lanes[0]
    for lane in lanes[1:]:
        total = total + lane
    assert published.simd_dot(a, b)[0] == total
    assert math.isfinite(float(total))


def test_the_verdict_on_the_unbroken_kernel(measurement: dict[str, Any]) -> None:
    document = verdict("determinism", "sum-order", measurement)
    assert document["verdict"] == "regime-dependent"
    assert document["reason"].endswith("only in integers-128")


def test_one_order_for_both_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIMD dot that sums in order: then order would not matter."""
    monkeypatch.setattr(sum_order, "_simd", published.scalar_dot)
    document = verdict("determinism", "sum-order", measured("determinism", "sum-order"))
    assert document["verdict"] == "supported"


def test_a_kernel_that_is_off_by_one_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then not even exact sums agree."""
    original = sum_order.matmul_f32
    monkeypatch.setattr(
        sum_order, "matmul_f32", lambda x, w: np.nextafter(original(x, w), np.float32(np.inf))
    )
    document = verdict("determinism", "sum-order", measured("determinism", "sum-order"))
    assert document["verdict"] == "falsified"


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(sum_order.measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("factors", ["complex", "integers-99", "integers-x"])
def test_bad_factors_are_named(factors: str) -> None:
    with pytest.raises(InputError, match="`factors`"):
        sum_order.measure(PARAMETERS, {"a": {"length": 64, "factors": factors}}, [1], NOWHERE)
