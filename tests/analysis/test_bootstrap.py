"""The block bootstrap against SciPy's and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from driftscope.analysis.bootstrap import interval, position_blocks, resampled_sums


def test_blocks_do_not_span_sequences() -> None:
    sequences = ["a"] * 5 + ["b"] * 2 + ["c"] * 4
    assert position_blocks(sequences, 2).tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5]
    assert position_blocks(sequences, 1).tolist() == list(range(11))
    assert position_blocks(sequences, 100).tolist() == [0] * 5 + [1] * 2 + [2] * 4


def test_a_block_as_long_as_a_sequence_does_not_run_into_the_next() -> None:
    assert position_blocks(["a", "a", "b", "b"], 2).tolist() == [0, 0, 1, 1]


def test_independent_positions_give_scipy_s_interval() -> None:
    values = np.random.Generator(np.random.Philox(5)).gamma(2.0, size=400)
    drawn = resampled_sums(np.stack([values, np.ones(400)]), np.arange(400), 4000, seed=1)
    low, high = interval(drawn[0] / drawn[1], 0.95)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.05 * width)
    assert high == pytest.approx(theirs.high, abs=0.05 * width)


def test_the_interval_of_a_mean_has_its_analytic_width() -> None:
    n = 900
    values = np.random.Generator(np.random.Philox(6)).standard_normal(n)
    drawn = resampled_sums(values[None], np.arange(n), 5000, seed=3)[0] / n
    # The bootstrap's variance of a mean is the biased sample variance over n (Efron 1979).
    assert drawn.std() == pytest.approx(values.std() / np.sqrt(n), rel=0.05)
    low, high = interval(drawn, 0.95)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(n), rel=0.06)


def test_blocks_widen_the_interval_of_positions_that_go_together() -> None:
    length, n_blocks = 16, 60
    shared = np.random.Generator(np.random.Philox(7)).standard_normal(n_blocks)
    values = np.repeat(shared, length)
    sequences = ["text"] * len(values)

    def width(block: int) -> float:
        drawn = resampled_sums(values[None], position_blocks(sequences, block), 4000, seed=1)[0]
        low, high = interval(drawn / len(values), 0.95)
        return high - low

    assert width(length) / width(1) == pytest.approx(np.sqrt(length), rel=0.1)


def test_one_draw_serves_every_item() -> None:
    values = np.random.Generator(np.random.Philox(8)).random(32)
    drawn = resampled_sums(np.stack([values, 3 * values]), position_blocks(["a"] * 32, 4), 100, seed=4)
    np.testing.assert_allclose(drawn[1], 3 * drawn[0], rtol=1e-14)


def test_the_seed_decides_the_draw() -> None:
    values = np.arange(20.0)[None]
    blocks = position_blocks(["a"] * 20, 3)
    first = resampled_sums(values, blocks, 50, seed=1)
    assert np.array_equal(first, resampled_sums(values, blocks, 50, seed=1))
    assert not np.array_equal(first, resampled_sums(values, blocks, 50, seed=2))


def test_a_single_block_leaves_no_uncertainty() -> None:
    drawn = resampled_sums(np.ones((1, 8)), np.zeros(8, dtype=np.int64), 100, seed=0)
    assert interval(drawn[0], 0.9) == (8.0, 8.0)


def test_the_ends_of_an_interval_are_quantiles() -> None:
    assert interval(np.arange(101.0), 0.9) == pytest.approx((5.0, 95.0))
