"""Draws, intervals and parameters."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from driftscope.errors import InputError
from driftscope.falsifiers.sampling import (
    Resampling,
    generator,
    parameter,
    rounded,
    share_with_interval,
    with_interval,
)


def test_a_generator_depends_on_its_whole_key() -> None:
    first = generator(1, 2).standard_normal(4)
    assert np.array_equal(first, generator(1, 2).standard_normal(4))
    assert not np.array_equal(first, generator(1, 3).standard_normal(4))
    assert not np.array_equal(first, generator(2, 1).standard_normal(4))


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    resampling = Resampling(400, 0.9)
    draws = generator(5).standard_normal((200, 40))
    covered = 0
    for draw in draws:
        interval = with_interval(lambda sample: sample.mean(axis=1), draw, resampling)
        covered += interval["low"] <= 0.0 <= interval["high"]
    # 0.9 of 200 with a standard deviation of 4.2; the percentile interval of 40 values is a little narrow.
    assert 165 <= covered <= 195


def test_whole_clusters_are_drawn() -> None:
    """A cluster of copies is one observation: the interval does not shrink with the copies."""
    values = generator(6).standard_normal(12)
    resampling = Resampling(500, 0.95)

    def mean(sample: np.ndarray) -> np.ndarray:
        return sample.reshape(sample.shape[0], -1).mean(axis=1)

    single = with_interval(mean, values, resampling)
    copies = with_interval(mean, np.repeat(values[:, None], 50, axis=1), resampling)
    assert single == pytest.approx(copies, rel=1e-9)


@pytest.mark.parametrize(("hits", "count"), [(0, 50), (3, 50), (50, 50), (14000, 14336)])
def test_the_interval_of_a_share_is_scipys_exact_one(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(0.9, method="exact")
    found = share_with_interval(hits, count, Resampling(100, 0.9))
    assert found == pytest.approx({"value": hits / count, "low": expected.low, "high": expected.high})


def test_ten_significant_digits_are_kept() -> None:
    assert rounded(1.23456789012345) == 1.234567890
    assert rounded(-1.23456789012345e-7) == -1.234567890e-7


@pytest.mark.parametrize("value", ["8", 8.5, True, None, 1])
def test_a_parameter_of_the_wrong_kind_or_size_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="`rows`"):
        parameter({"rows": value}, "rows", int, least=2)


def test_a_missing_parameter_and_a_confidence_of_one_are_refused() -> None:
    with pytest.raises(InputError, match="`rows` is missing"):
        parameter({}, "rows", int)
    with pytest.raises(InputError, match="between 0 and 1"):
        Resampling.of({"resamples": 100, "confidence": 1.0})
    assert parameter({"gain": 1}, "gain", float) == 1.0
