"""Does it matter? The candidate's next-token distribution against the teacher's, in llama.cpp's units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.bootstrap import interval, position_blocks, resampled_sums
from driftscope.analysis.decomposition import Resampling

if TYPE_CHECKING:
    import polars as pl

_LARGEST_EXPONENT = float(np.log(np.finfo(np.float64).max))
_SIGNIFICANT_DIGITS = 10
"""exp and log differ in the last bits between C libraries; the evidence keeps what they agree on."""

_MEASURES = ("kl", "top1_a", "top1_b", "same_top1", "margin_a", "logit_noise", "nll_a", "nll_b", "delta_p")
_UNDEFINED: dict[str, Any] = dict.fromkeys(_MEASURES)


def impact_rows(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    next_ids: NDArray[np.int64],
    places: Sequence[tuple[str, int]],
    pair: str,
) -> list[dict[str, Any]]:
    """Compare two sets of logits position by position.

    Args:
        a: ``float32[n_positions, vocabulary]`` of the reference.
        b: the same of the other path.
        next_ids: the token that follows at each position, -1 where none does.
        places: sequence id and position of each row.
        pair: ``<path>|<path>``, the reference first.

    Returns:
        Rows of the ``impact`` table. `kl` is KL(a || b) in nats; `margin_a` the distance of the reference's
        two largest logits; `logit_noise` the rms of the centred logit difference; `nll` in nats;
        `delta_p` the change of the next token's probability, b minus a. All of them are None at a position
        where a logit is not finite.
    """
    rows: list[dict[str, Any]] = []
    for index, (sequence, position) in enumerate(places):
        if not (np.isfinite(a[index]).all() and np.isfinite(b[index]).all()):
            rows.append({"pair": pair, "sequence": sequence, "position": position, **_UNDEFINED})
            continue
        log_p, log_q = _log_softmax(a[index]), _log_softmax(b[index])
        p = np.exp(log_p)
        difference = b[index].astype(np.float64) - a[index].astype(np.float64)
        difference -= difference.mean()
        first, second = np.partition(a[index], -2)[[-1, -2]].astype(np.float64)
        top1_a, top1_b = int(np.argmax(a[index])), int(np.argmax(b[index]))
        following = int(next_ids[index])
        known = following >= 0
        rows.append(
            {
                "pair": pair,
                "sequence": sequence,
                "position": position,
                "kl": _rounded(float((p * (log_p - log_q)).sum())),
                "top1_a": top1_a,
                "top1_b": top1_b,
                "same_top1": top1_a == top1_b,
                "margin_a": _rounded(float(first - second)),
                "logit_noise": _rounded(float(np.sqrt(np.square(difference).mean()))),
                "nll_a": _rounded(-float(log_p[following])) if known else None,
                "nll_b": _rounded(-float(log_q[following])) if known else None,
                "delta_p": _rounded(float(np.exp(log_q[following]) - p[following])) if known else None,
            }
        )
    return rows


def summarise(frame: pl.DataFrame, resampling: Resampling) -> dict[str, Any]:
    """Summarise the ``impact`` table pair by pair, with block-bootstrap intervals.

    Nothing is summarised, and the status is ``inadmissible``, where some position has no distribution.
    """
    undefined = frame.filter(frame["kl"].is_null())
    if not undefined.is_empty():
        places = undefined.select("sequence", "position").n_unique()
        every = frame.select("sequence", "position").n_unique()
        return {
            "status": "inadmissible",
            "reason": f"the logits are not finite at {places} of {every} token positions",
            "confidence": resampling.confidence,
            "pairs": [],
        }
    pairs = []
    for (pair,), part in frame.group_by("pair", maintain_order=True):
        pairs.append(_summary(str(pair), part, resampling))
    return {
        "status": "done",
        "units": "KL and NLL in nats, margins and noise in logits, perplexity over known next tokens",
        "confidence": resampling.confidence,
        "pairs": pairs,
    }


def mean_kl_difference(
    frame: pl.DataFrame, first: str, second: str, resampling: Resampling
) -> tuple[float, float, float]:
    """Return mean KL of pair `first` less that of pair `second`, with its paired block-bootstrap interval.

    Both pairs are over the same positions, so each sample draws the same blocks of both.
    """
    a, b = (frame.filter(frame["pair"] == pair) for pair in (first, second))
    difference = a["kl"].to_numpy() - b["kl"].to_numpy()
    blocks = position_blocks(a["sequence"].to_list(), resampling.block_positions)
    values = np.stack([difference, np.ones(len(difference))])
    drawn = resampled_sums(values, blocks, resampling.resamples, resampling.seed)
    return (float(difference.mean()), *interval(drawn[0] / drawn[1], resampling.confidence))


def _summary(pair: str, part: pl.DataFrame, resampling: Resampling) -> dict[str, Any]:
    sequences = part["sequence"].to_list()
    kl = part["kl"].to_numpy()
    same = part["same_top1"].to_numpy()
    blocks = position_blocks(sequences, resampling.block_positions)
    values = np.stack([kl, same.astype(np.float64), np.ones(len(kl))])
    drawn = resampled_sums(values, blocks, resampling.resamples, resampling.seed)
    kl_low, kl_high = interval(drawn[0] / drawn[2], resampling.confidence)
    same_low, same_high = interval(drawn[1] / drawn[2], resampling.confidence)
    known = part.drop_nulls("nll_a")
    nll_a, nll_b = float(known["nll_a"].to_numpy().mean()), float(known["nll_b"].to_numpy().mean())
    delta_p = known["delta_p"].to_numpy()
    flipped = part.filter(~part["same_top1"])
    return {
        "pair": pair,
        "positions": len(kl),
        "mean_kl": float(kl.mean()),
        "mean_kl_low": kl_low,
        "mean_kl_high": kl_high,
        "median_kl": float(np.median(kl)),
        "p90_kl": float(np.quantile(kl, 0.90)),
        "p99_kl": float(np.quantile(kl, 0.99)),
        "max_kl": float(kl.max()),
        "same_top1": float(same.mean()),
        "same_top1_low": same_low,
        "same_top1_high": same_high,
        "known_next_tokens": known.height,
        "ppl_a": _perplexity(nll_a),
        "ppl_b": _perplexity(nll_b),
        "log_ppl_ratio": nll_b - nll_a,
        "mean_delta_p": float(delta_p.mean()),
        "rms_delta_p": float(np.sqrt(np.square(delta_p).mean())),
        "flips": [
            {
                "sequence": row["sequence"],
                "position": row["position"],
                "top1_a": row["top1_a"],
                "top1_b": row["top1_b"],
                "margin": row["margin_a"],
                "logit_noise": row["logit_noise"],
            }
            for row in flipped.sort("margin_a", descending=True).iter_rows(named=True)
        ],
        "flips_total": flipped.height,
        "flips_within_noise": int((flipped["margin_a"] <= 2.0 * flipped["logit_noise"]).sum()),
    }


def _perplexity(nll: float) -> float | None:
    """Return exp of a mean NLL; None where that is beyond float64, as for a model that is badly broken."""
    return float(np.exp(nll)) if nll < _LARGEST_EXPONENT else None


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max()
    return values - np.log(np.exp(values).sum())


def _rounded(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT_DIGITS - 1}e}")
