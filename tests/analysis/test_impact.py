"""Next-token figures against SciPy, in the definitions of llama.cpp's perplexity tool."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax, rel_entr, softmax

from driftscope.analysis.decomposition import Resampling
from driftscope.analysis.impact import impact_rows, summarise
from driftscope.evidence.schemas import frame_of

RESAMPLING = Resampling(block_positions=4, resamples=400, confidence=0.9, seed=1)
N, VOCABULARY = 24, 101
PLACES = [("a", i) for i in range(12)] + [("b", i) for i in range(12)]
NEXT = np.array([*range(3, 14), -1, *range(20, 31), -1])


def logits(noise: float = 0.3) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits of two paths."""
    random = np.random.Generator(np.random.Philox(1))
    a = (4 * random.standard_normal((N, VOCABULARY))).astype(np.float32)
    return a, a + (noise * random.standard_normal((N, VOCABULARY))).astype(np.float32)


def rows(a: NDArray[np.float32], b: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Rows of one pair."""
    return impact_rows(a, b, NEXT, PLACES, "a|b")


def summary(a: NDArray[np.float32], b: NDArray[np.float32]) -> dict[str, Any]:
    """The summary of one pair."""
    document = summarise(frame_of(rows(a, b), "impact"), RESAMPLING)
    assert document["status"] == "done"
    pair: dict[str, Any] = document["pairs"][0]
    return pair


def test_each_position_agrees_with_scipy() -> None:
    a, b = logits()
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    for i, row in enumerate(rows(a, b)):
        p, q = softmax(wide_a[i]), softmax(wide_b[i])
        assert row["kl"] == pytest.approx(rel_entr(p, q).sum(), rel=1e-8)
        assert (row["top1_a"], row["top1_b"]) == (p.argmax(), q.argmax())
        assert row["same_top1"] == (p.argmax() == q.argmax())
        ordered = np.sort(wide_a[i])
        assert row["margin_a"] == pytest.approx(ordered[-1] - ordered[-2], rel=1e-8)
        assert row["logit_noise"] == pytest.approx((wide_b[i] - wide_a[i]).std(), rel=1e-8)
        token = NEXT[i]
        if token < 0:
            assert (row["nll_a"], row["nll_b"], row["delta_p"]) == (None, None, None)
        else:
            assert row["nll_a"] == pytest.approx(-log_softmax(wide_a[i])[token], rel=1e-8)
            assert row["nll_b"] == pytest.approx(-log_softmax(wide_b[i])[token], rel=1e-8)
            assert row["delta_p"] == pytest.approx(q[token] - p[token], rel=1e-6, abs=1e-12)


def test_the_summary_is_llama_cpp_s_table() -> None:
    a, b = logits()
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    p, q = softmax(wide_a, axis=1), softmax(wide_b, axis=1)
    kl = rel_entr(p, q).sum(axis=1)
    known = NEXT >= 0
    index = np.flatnonzero(known)
    delta = q[index, NEXT[known]] - p[index, NEXT[known]]
    found = summary(a, b)
    assert found["positions"] == N
    assert found["known_next_tokens"] == N - 2
    assert found["mean_kl"] == pytest.approx(kl.mean(), rel=1e-8)
    assert found["median_kl"] == pytest.approx(np.median(kl), rel=1e-8)
    assert found["p99_kl"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-8)
    assert found["max_kl"] == pytest.approx(kl.max(), rel=1e-8)
    assert found["same_top1"] == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert found["ppl_a"] == pytest.approx(np.exp(-np.log(p[index, NEXT[known]]).mean()), rel=1e-8)
    assert found["ppl_b"] == pytest.approx(np.exp(-np.log(q[index, NEXT[known]]).mean()), rel=1e-8)
    assert found["log_ppl_ratio"] == pytest.approx(np.log(found["ppl_b"] / found["ppl_a"]), abs=1e-9)
    assert found["mean_delta_p"] == pytest.approx(delta.mean(), rel=1e-6)
    assert found["rms_delta_p"] == pytest.approx(np.sqrt(np.square(delta).mean()), rel=1e-6)
    assert found["mean_kl_low"] < found["mean_kl"] < found["mean_kl_high"]


def test_equal_logits_have_no_impact() -> None:
    a, _ = logits()
    found = summary(a, a)
    assert (found["mean_kl"], found["max_kl"], found["same_top1"], found["flips_total"]) == (0, 0, 1, 0)
    assert (found["mean_kl_low"], found["mean_kl_high"]) == (0, 0)


def test_a_constant_on_all_logits_changes_nothing() -> None:
    a, _ = logits()
    assert summary(a, a + np.float32(8))["max_kl"] < 1e-10


def test_large_logits_do_not_overflow() -> None:
    a, b = logits()
    found = summary(a * np.float32(1e4), b * np.float32(1e4))
    assert np.isfinite(found["mean_kl"])
    # exp of the mean NLL is beyond double precision; the NLL itself is not.
    assert found["ppl_a"] is None
    assert np.isfinite(found["log_ppl_ratio"])


def test_flips_are_listed_by_margin_and_judged_by_noise() -> None:
    a = np.zeros((N, VOCABULARY), np.float32)
    a[:, 0], a[:, 1] = 5.0, 4.0
    b = a.copy()
    b[3, 1], b[7, 1] = 5.5, 90.0
    a[7, 1] = b[7, 0] = 1.0
    found = summary(a, b)
    assert found["flips_total"] == 2
    assert [flip["position"] for flip in found["flips"]] == [7, 3]
    # rms of the centred difference: 89 of 1.0 to 90.0 over 101 logits against a margin of 4
    assert found["flips"][0]["margin"] == 4.0
    noise = (b[7].astype(float) - a[7].astype(float)).std()
    assert found["flips"][0]["logit_noise"] == pytest.approx(noise, rel=1e-8)
    assert found["flips_within_noise"] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_counted_and_give_no_summary(value: float) -> None:
    a, b = logits()
    b[5, 7] = b[20, 0] = value
    found = rows(a, b)
    assert [row["position"] for row in found if row["kl"] is None] == [5, 8]
    frame = frame_of(found, "impact")
    assert frame.filter(pl.col("kl").is_null()).height == 2
    document = summarise(frame, RESAMPLING)
    assert document["status"] == "inadmissible"
    assert f"2 of {N} token positions" in document["reason"]
    assert document["pairs"] == []
