"""Thread counts: the published products, equal bits, and what breaks that."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import CONTRACTS, NOWHERE, measured, verdict

from driftscope.contracts.loading import load_contract
from driftscope.errors import InputError
from driftscope.falsifiers import thread_counts
from driftscope.kernels import parallel

PARAMETERS = {"rows": 64, "blocks": 1, "threads": [2], "resamples": 100, "confidence": 0.9}
REGIMES = {"a": {"product": "f32", "tokens": 1}, "b": {"product": "int8-dot", "tokens": 3}}


@pytest.fixture(scope="module")
def measurement() -> dict[str, Any]:
    return measured("determinism", "thread-counts")


def test_the_published_products_are_bit_equal(measurement: dict[str, Any]) -> None:
    figures = measurement["published"]
    assert figures["large"] == {"outputs": 2048, "unequal": 0, "unequal_on_two_threads": 0}
    assert figures["small"] == {"outputs": 64, "unequal": 0, "unequal_on_two_threads": 0}


def test_the_verdict_on_the_unbroken_kernels(measurement: dict[str, Any]) -> None:
    assert verdict("determinism", "thread-counts", measurement)["verdict"] == "supported"


def test_the_registered_products_are_really_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product too small to be split would compare one thread with one thread."""
    asked = load_contract(CONTRACTS / "determinism.yaml").falsifier("thread-counts").measurement
    original = parallel._threads
    helpers: list[int] = []

    def counted(count: int) -> Any:
        helpers.append(count)
        return original(count)

    monkeypatch.setattr(parallel, "_threads", counted)
    for regime in asked.regimes.values():
        helpers.clear()
        product = thread_counts._product(1, asked.parameters["rows"], asked.parameters["blocks"], regime)
        product(2)
        assert helpers == [1]


def test_a_product_that_sums_by_thread_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = thread_counts.matmul_f32

    def split(x: Any, w: Any, *, threads: int = 1) -> Any:
        parts = np.array_split(np.arange(x.shape[1]), threads)
        sums = [
            original(np.ascontiguousarray(x[:, part]), np.ascontiguousarray(w[:, part])) for part in parts
        ]
        total = sums[0]
        for each in sums[1:]:
            total = total + each
        return total

    monkeypatch.setattr(thread_counts, "matmul_f32", split)
    document = verdict("determinism", "thread-counts", measured("determinism", "thread-counts"))
    assert document["verdict"] == "regime-dependent"
    assert "f32-one-token" not in document["reason"]


def test_a_range_that_is_left_out_on_several_threads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the product: a last range that is one row short."""
    for name in ("matmul_f32", "matmul_f32_quantized", "matmul_quantized"):
        original = getattr(thread_counts, name)

        def short(*factors: Any, threads: int = 1, original: Any = original) -> Any:
            product = original(*factors, threads=threads)
            product[:, -1] *= np.float32(1 if threads == 1 else 2)
            return product

        monkeypatch.setattr(thread_counts, name, short)
    document = verdict("determinism", "thread-counts", measured("determinism", "thread-counts"))
    assert document["verdict"] == "falsified"


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (
        json.dumps(thread_counts.measure(PARAMETERS, REGIMES, [1, 2], NOWHERE)) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("change", [{"rows": 0}, {"blocks": 0}, {"threads": [1]}, {"threads": 2}])
def test_a_bad_parameter_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(change))}`"):
        thread_counts.measure({**PARAMETERS, **change}, REGIMES, [1], NOWHERE)


def test_an_unknown_product_is_named() -> None:
    with pytest.raises(InputError, match="`product`"):
        thread_counts.measure(PARAMETERS, {"a": {"product": "f16", "tokens": 1}}, [1], NOWHERE)
