from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from driftscope.kernels.reference import statistics as reference
from driftscope.kernels.statistics import tap_statistics


def assert_agrees(x: NDArray[np.float32], first: int, end: int) -> None:
    found = dataclasses.asdict(tap_statistics(x).pooled(first, end, origin=first))
    expected = reference.pooled(x[first:end])
    scale = float(np.abs(x[np.isfinite(x)]).max(initial=0.0))
    for name, value in expected.items():
        if name in ("mean", "std", "rms") and value is not None:
            assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-13 * scale), name
        else:
            assert found[name] == value, name


VALUES = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_agrees_with_numpy_on_any_values(data: st.DataObject) -> None:
    n, channels = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    value = data.draw(st.sampled_from([VALUES, st.floats(-2, 2, width=32), st.just(math.nan)]))
    x = np.array(data.draw(st.lists(value, min_size=n * channels, max_size=n * channels)), np.float32)
    first = data.draw(st.integers(0, n - 1))
    assert_agrees(x.reshape(n, channels), first, data.draw(st.integers(first + 1, n)))


@pytest.mark.parametrize("scope", [(0, 7), (6, 7), (1, 7)])
def test_agrees_with_numpy_behind_a_massive_activation(scope: tuple[int, int]) -> None:
    x = np.random.Generator(np.random.Philox(3)).standard_normal((7, 1536), dtype=np.float32)
    x[0, 11] = 8000.0
    assert_agrees(x, *scope)


def test_std_is_sound_far_from_zero() -> None:
    noise = np.random.Generator(np.random.Philox(4)).standard_normal((5, 999), dtype=np.float32)
    assert_agrees(np.float32(4096) + np.float32(2**-9) * noise, 0, 5)


def test_same_bits_whatever_the_threads() -> None:
    x = np.random.Generator(np.random.Philox(5)).standard_normal((33, 100), dtype=np.float32)
    one, three = tap_statistics(x), tap_statistics(x, threads=3)
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(three, field.name))


def test_the_position_of_the_maximum_counts_from_the_prompt() -> None:
    x = np.zeros((6, 4), np.float32)
    x[4, 2] = -9.0
    found = tap_statistics(x).pooled(3, 6, origin=2)
    assert (found.argmax_position, found.argmax_channel, found.zero_count) == (2, 2, 11)


def test_no_tokens_have_no_statistics() -> None:
    with pytest.raises(ValueError, match="at least one"):
        tap_statistics(np.zeros((2, 3), np.float32)).pooled(1, 1)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_moments_have_the_bits_of_the_documented_order(data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 100))
    value = data.draw(st.sampled_from([VALUES, st.floats(-2, 2, width=32)]))
    row = np.array(data.draw(st.lists(value, min_size=channels, max_size=channels)), np.float32)
    found = tap_statistics(row[None, :])
    if np.isfinite(row).any():
        assert (found.mean[0], found.centred[0]) == reference.lane_moments(row)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 64, 3584])
def test_statistics_of_one_token_are_scipys(channels: int) -> None:
    x = np.random.Generator(np.random.Philox(channels)).normal(3, 2, (1, channels)).astype(np.float32)
    found = tap_statistics(x).pooled(0, 1)
    described = scipy.stats.describe(x[0].astype(np.float64), ddof=min(1, channels - 1))
    assert (found.count, found.min, found.max) == (described.nobs, *described.minmax)
    assert found.mean == pytest.approx(described.mean, rel=1e-13)
    if channels > 1:
        assert found.std == pytest.approx(np.sqrt(described.variance), rel=1e-12)
    assert found.rms == pytest.approx(scipy.stats.pmean(np.abs(x[0].astype(float)), 2), rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -0.0, 9e9, -9e9])
def test_a_value_is_found_in_every_lane_and_in_the_rest(value: float) -> None:
    for at in (0, 5, 15, 16, 31, 32, 36):
        x = np.random.Generator(np.random.Philox(6)).standard_normal((3, 37), dtype=np.float32)
        x[1, at] = value
        assert_agrees(x, 0, 3)
        assert_agrees(x, 1, 2)


def test_a_channel_is_found_wherever_it_is_and_the_first_of_equals() -> None:
    for at in (0, 63, 64, 65, 127, 199):
        x = np.zeros((1, 200), np.float32)
        x[0, at:] = -7.0
        assert tap_statistics(x).pooled(0, 1).argmax_channel == at


def test_pooling_does_not_depend_on_what_is_around() -> None:
    x = np.random.Generator(np.random.Philox(7)).standard_normal((9, 40), dtype=np.float32)
    assert tap_statistics(x).pooled(2, 6, origin=2) == tap_statistics(x[2:6]).pooled(0, 4)


def test_the_two_zeros_are_one() -> None:
    found = tap_statistics(np.array([[-0.0, -0.0]], np.float32)).pooled(0, 1)
    assert math.copysign(1, found.min) == math.copysign(1, found.max) == 1  # type: ignore[arg-type]


def test_nothing_finite() -> None:
    found = tap_statistics(np.full((2, 20), np.nan, np.float32)).pooled(0, 2)
    assert (found.mean, found.std, found.min, found.argmax_channel, found.nan_count) == (
        *(None, None, None),
        -1,
        40,
    )
