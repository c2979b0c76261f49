"""Three dequantizers: bits alike, why, and what breaks that."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.errors import InputError
from driftscope.falsifiers import dequantizers

PARAMETERS = {"values": 512, "resamples": 100, "confidence": 0.9}
REGIMES = {"k": {"formats": ["Q4_K"]}, "plain": {"formats": ["Q8_0", "Q4_1"]}}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("determinism", "dequantizers")


def test_the_published_block_is_bit_equal(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    assert figures == {"values": 256, "equal": 256, "element_0": 10.75, "element_255": 1.25}


def test_a_fused_multiply_add_changes_nothing(measurement: dict[str, Any]) -> None:
    """11 bits of d, 6 of sc and 4 of q are 21: the product is exact in float32."""
    assert measurement["fused"]["unequal"] == 0
    assert measurement["fused"]["values"] > 10_000


def test_the_verdict_on_the_unbroken_kernel(measurement: dict[str, Any]) -> None:
    assert verdict("determinism", "dequantizers", measurement)["verdict"] == "supported"


def test_a_kernel_with_swapped_nibbles_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = dequantizers.dequantize

    def swapped(rows: Any, dtype: str) -> Any:
        values = original(rows, dtype)
        return values[:, ::-1].copy() if dtype == "Q4_K" else values

    monkeypatch.setattr(dequantizers, "dequantize", swapped)
    document = verdict("determinism", "dequantizers", measured("determinism", "dequantizers"))
    assert document["verdict"] == "regime-dependent"
    assert document["contradicts"] == ["identical", "expected-quantization-noise"]
    assert document["reason"] == "the prediction holds only in plain, tables"


def test_a_kernel_that_is_off_by_one_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = dequantizers.dequantize
    monkeypatch.setattr(
        dequantizers,
        "dequantize",
        lambda rows, dtype: np.nextafter(original(rows, dtype), np.float32(np.inf)),
    )
    document = verdict("determinism", "dequantizers", measured("determinism", "dequantizers"))
    assert document["verdict"] == "falsified"


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (json.dumps(dequantizers.measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("formats", [None, [], "Q4_K", ["Q9_Z"]])
def test_bad_formats_are_named(formats: Any) -> None:
    with pytest.raises(InputError, match=r"formats|Q9_Z"):
        dequantizers.measure(PARAMETERS, {"a": {"formats": formats}}, [1], NOWHERE)
