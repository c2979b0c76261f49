from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
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
