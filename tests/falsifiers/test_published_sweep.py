"""The published sweep: its rules, what its cosine resolves, what it passes over; what breaks the verdicts."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from tests.falsifiers.registered import NOWHERE, measured, verdict

from driftscope.analysis.weights import pair_diff
from driftscope.errors import InputError
from driftscope.falsifiers import sweep_cosine, sweep_faults, sweep_origin
from driftscope.falsifiers.published_sweep import (
    FLOOR,
    PublishedRow,
    exact_distance,
    float32_cosine,
    printed_cosine,
    published_row,
    published_sweep,
)

SMALL = {"resamples": 100, "confidence": 0.9}
ONES = np.ones((2, 3), np.float32)


def drawn(seed: int, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)


class TestRules:
    @pytest.mark.parametrize(
        ("largest", "status"),
        [
            (0.0, "Identical"),
            (0.0005, "NearlyIdentical"),
            (0.005, "SmallDiff"),
            (0.05, "MediumDiff"),
            (0.5, "LargeDiff"),
            (1.5, "Critical"),
        ],
    )
    def test_the_class_follows_from_the_largest_difference(self, largest: float, status: str) -> None:
        other = ONES.copy()
        other[1, 2] += np.float32(largest)
        assert published_row(ONES, other).status == status

    def test_a_nan_goes_into_nothing(self) -> None:
        other = ONES.copy()
        other[0, 0] = np.nan
        assert published_row(ONES, other) == PublishedRow(1.0, 0.0, 5, "Identical")

    def test_zeros_have_a_cosine_of_zero(self) -> None:
        zeros = np.zeros(4, np.float32)
        assert published_row(zeros, zeros) == PublishedRow(0.0, 0.0, 4, "Identical")
        assert not published_sweep({"bias": zeros}, {"bias": zeros}).passes

    def test_a_reversed_shape_over_the_same_bytes_counts_as_a_transpose(self) -> None:
        a = drawn(1, 4, 6)
        assert published_row(a, a.reshape(6, 4)).status == "Transposed"
        assert published_row(a, np.ascontiguousarray(a.T)).status != "Transposed"

    def test_what_one_side_lacks_is_not_mentioned(self) -> None:
        result = published_sweep({"a": ONES, "b": ONES}, {"a": ONES}, threshold=1e-9)
        assert list(result.rows) == ["a"]
        assert result.passes
        assert published_sweep({"a": ONES}, {"b": ONES}).passes


class TestCosines:
    def test_the_floor_is_the_number_next_below_1(self) -> None:
        assert float(np.nextafter(np.float32(1), np.float32(0))) == FLOOR == 1 - 2**-24

    def test_f64_sums_are_rounded_once_more(self) -> None:
        a, b = drawn(2, 300), drawn(3, 300)
        dot, aa, bb = (
            sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(p, q, strict=True))
            for p, q in ((a, b), (a, a), (b, b))
        )
        exact = float(dot) / math.sqrt(float(aa * bb))
        assert printed_cosine(a, b) == pytest.approx(exact, abs=2**-25)
        assert printed_cosine(a, b) == float(np.float32(printed_cosine(a, b)))

    def test_f32_sums_are_rounded_at_every_step(self) -> None:
        a, b = drawn(4, 500), drawn(5, 500)
        total = {}
        for name, (p, q) in {"ab": (a, b), "aa": (a, a), "bb": (b, b)}.items():
            total[name] = np.float32(0)
            for x, y in zip(p, q, strict=True):
                total[name] = total[name] + x * y
        expected = total["ab"] / (np.sqrt(total["aa"]) * np.sqrt(total["bb"]))
        assert float32_cosine(a, b) == float(expected)

    @pytest.mark.parametrize("distance", [1e-9, 1e-6, 1e-3])
    def test_a_tensor_is_drawn_at_its_distance(self, distance: float) -> None:
        a, near, far = sweep_cosine._drawn(1, 0, 4096, distance, 10.0)
        assert exact_distance(a, near) == pytest.approx(distance, rel=1e-3)
        assert exact_distance(a, far) == pytest.approx(10 * distance, rel=1e-3)

    @pytest.mark.parametrize(
        ("distance", "printed"), [(2.0e-8, 1.0), (4.0e-8, FLOOR), (8.0e-8, FLOOR), (1.0e-7, 1 - 2**-23)]
    )
    def test_what_the_floor_stands_for(self, distance: float, printed: float) -> None:
        a, near, _ = sweep_cosine._drawn(2, 0, 65536, distance, 1.0)
        assert printed_cosine(a, near) == printed


@pytest.fixture(scope="module")
def resolution() -> dict[str, Any]:
    return measured("sweep", "sweep-cosine-resolution")


@pytest.fixture(scope="module")
def origin() -> dict[str, Any]:
    return measured("sweep", "sweep-origin")


@pytest.fixture(scope="module")
def faults() -> dict[str, Any]:
    return measured("sweep", "sweep-our-answers")


def test_a_billionth_is_not_seen(resolution: dict[str, Any]) -> None:
    billionth = resolution["published"]["billionth"]
    assert billionth["apart"] == pytest.approx(1e-9, rel=1e-2)
    assert billionth["first"] == billionth["second"] == 1.0
    document = verdict("sweep", "sweep-cosine-resolution", resolution)
    assert document["verdict"] == "regime-dependent"
    assert document["reason"].endswith("only in quantized, quantized-f32-sums")


def test_a_cosine_without_rounding_would_tell(
    monkeypatch: pytest.MonkeyPatch, resolution: dict[str, Any]
) -> None:
    for name in ("printed_cosine", "float32_cosine"):
        monkeypatch.setattr(sweep_cosine, name, lambda x, y: 1.0 - exact_distance(x, y))
    again = measured("sweep", "sweep-cosine-resolution")
    # Nothing is told apart at the same distance, and everything else is.
    assert verdict("sweep", "sweep-cosine-resolution", again)["verdict"] != "regime-dependent"
    assert again["regimes"]["export"]["told_apart"]["value"] == 1.0


def test_the_inventory_is_that_of_the_published_model(origin: dict[str, Any]) -> None:
    # 28 layers of 7 projections, 3 biases, 2 norms; embedding, norm, head. Its makers say 7.61 billion.
    counts = origin["inventory"]
    assert (counts["tensors"], counts["projections"], counts["biases"]) == (28 * 12 + 3, 28 * 7, 28 * 3)
    assert counts["values"] == 7_615_616_512


def test_only_an_export_reaches_the_published_floor(origin: dict[str, Any]) -> None:
    document = verdict("sweep", "sweep-origin", origin)
    assert document["verdict"] == "regime-dependent"
    assert document["reason"].endswith("only in export-f32, export-f16")
    assert origin["regimes"]["full-precision"]["below"] == 196
    # Rounding to 11 bits: 4^-11 / 6 in energy and half of it in distance; and 64 times that for 8 bits.
    export = origin["regimes"]["export-f16"]["distance"]["value"]
    assert export == pytest.approx(4**-11 / 12, rel=0.2)
    assert origin["regimes"]["export-bf16"]["distance"]["value"] == pytest.approx(64 * export, rel=0.1)


def test_a_quantizer_that_loses_nothing_would_reach_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_origin, "_quantized", dict)
    assert verdict("sweep", "sweep-origin", measured("sweep", "sweep-origin"))["verdict"] == "supported"


def test_who_answers_rightly(faults: dict[str, Any]) -> None:
    ours = verdict("sweep", "sweep-our-answers", faults)
    theirs = verdict("sweep", "sweep-published-answers", faults)
    assert ours["verdict"] == "supported"
    assert theirs["verdict"] == "regime-dependent"
    assert theirs["reason"].endswith("only in copy, other-weights")
    codes = {name: regime["published"]["right_code"]["value"] for name, regime in faults["regimes"].items()}
    assert {name for name, share in codes.items() if share} == {"copy", "zero-biases", "transposed"}


def test_a_published_sweep_that_answered_rightly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Honest:
        def __init__(self, a: Any, b: Any, threshold: float | None) -> None:
            document = pair_diff.diff_models(
                sweep_faults._artifact(a), sweep_faults._artifact(b), band=sweep_faults._BAND
            )
            self.passes = sweep_faults._accepts(document)

    monkeypatch.setattr(sweep_faults, "published_sweep", Honest)
    again = measured("sweep", "sweep-published-answers")
    assert verdict("sweep", "sweep-published-answers", again)["verdict"] == "supported"


def _blind_to_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "nan_b": 0,
        "compared_count": row["element_count"],
        "identical_count": row["element_count"],
    }


@pytest.mark.parametrize("broken", ["non-finite values are passed over", "missing tensors are not listed"])
def test_a_sweep_of_ours_that_passes_over_a_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken.startswith("missing"):
        original = pair_diff.inventory

        def inventory(a: Any, b: Any) -> dict[str, Any]:
            found = original(a, b)
            compared = found["coverage"]["compared"]
            return {**found, "missing": [], "coverage": {"expected": compared, "compared": compared}}

        monkeypatch.setattr(pair_diff, "inventory", inventory)
    else:
        compare = pair_diff.compare_tensor
        monkeypatch.setattr(
            pair_diff,
            "compare_tensor",
            lambda *args, **more: _blind_to_nan(row) if (row := compare(*args, **more))["nan_b"] else row,
        )
    document = verdict("sweep", "sweep-our-answers", measured("sweep", "sweep-our-answers"))
    assert document["verdict"] == "regime-dependent"


def test_the_same_arguments_give_the_same_bytes() -> None:
    regimes = {"copy": {"fault": "copy"}, "missing": {"fault": "missing"}}
    first, second = (
        json.dumps(sweep_faults.measure({"draws": 2, **SMALL}, regimes, [1], NOWHERE)) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("module", "parameters", "regime", "named"),
    [
        (sweep_faults, {"draws": 2}, {"fault": "none"}, "`fault`"),
        (sweep_cosine, {"draws": 2, "values": 256}, {"distance": 1e-3, "sums": "f16"}, "`sums`"),
        (sweep_origin, {"values": 256}, {"origin": "elsewhere"}, "`origin`"),
        (sweep_origin, {"values": 300}, {"origin": "export-f16"}, "`values`"),
    ],
)
def test_bad_parameters_are_named(
    module: Any, parameters: dict[str, Any], regime: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        module.measure({**parameters, **SMALL}, {"a": regime}, [1], NOWHERE)
