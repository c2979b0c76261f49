"""What can be wrong with any op: a constant ratio, channels in other places, one channel alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from driftscope.analysis.explanations.base import F64, I64, Candidate, Case, figure, rounded
from driftscope.forward.arithmetic import round_to

_SHIFTS = (1, -1, 2, -2, 4, -4, 8, -8, 16, -16, 32, -32, 64, -64)
_MOST_CHANNELS = 8192
_PROJECTIONS = ("qkv_matmul", "qkv_bias", "attn_out", "ffn_gate", "ffn_up", "ffn_out")

OUTLYING = {"engine": 64.0, "model": 8.0}
"""By component: a channel outlies whose error, in units of its noise, is so many times the median channel's.

Against a reference a damaged block has quantization noise beside it; an engine's own noise is much smaller.
"""


LONE = 100.0
"""Error over noise of the median channel beyond which a few channels are not wrong alone."""


def ratio_class(case: Case) -> str:
    """What a constant ratio is called: of a projection a lost scale, else a wrong multiplier."""
    return "scale-dropped" if case.op.tap in _PROJECTIONS else "output-scale"


def slope(target: F64, expected: F64) -> float:
    """Least-squares factor from expected to found, both without what does not count."""
    energy = float(np.sum(expected * expected))
    return float(np.sum(target * expected)) / energy if energy else 0.0


def constant_ratio(case: Case) -> Iterator[Candidate]:
    """The output is the expected one times a number, the same for all tokens and channels."""
    mask = case.masks[0]
    target, expected = np.where(mask, case.target, 0.0), np.where(mask, case.expected, 0.0)
    factor = slope(target, expected)
    if factor == 0.0:
        return
    predicted = case.expected * factor
    total = float(np.sum(target * target))
    r2 = 1.0 - case.error(predicted) / total if total else 0.0
    evidence = {"ratio": rounded(factor), "r2": rounded(r2)}
    if abs(factor + 1.0) < 1e-3:
        yield Candidate("cross-match", "the sign is inverted", -case.expected, 1, evidence)
        return
    what = f"the output is {figure(factor)} times the expected one (R^2 {r2:.6f})"
    yield Candidate(ratio_class(case), what, predicted, 1, evidence)


def ratio_by_channel(case: Case) -> Iterator[Candidate]:
    """Each channel has a ratio of its own: the scale of each row is lost or another one."""
    if case.tokens.size < 4:
        return
    mask = case.masks[0]
    target, expected = np.where(mask, case.target, 0.0), np.where(mask, case.expected, 0.0)
    energy = np.sum(expected * expected, axis=0)
    factors = np.sum(target * expected, axis=0) / np.where(energy > 0, energy, 1.0)
    low, middle, high = (float(np.quantile(factors, share)) for share in (0.05, 0.5, 0.95))
    if not _helps_most_channels(case, expected * factors):
        return
    yield Candidate(
        ratio_class(case),
        f"each channel is off by a ratio of its own, {figure(low)} to {figure(high)}",
        case.expected * factors,
        6,
        {"ratio_low": rounded(low), "ratio": rounded(middle), "ratio_high": rounded(high)},
    )


def _helps_most_channels(case: Case, predicted: F64) -> bool:
    """Whether a prediction halves the error of most channels; what is wrong in a few is another fault."""
    mask = case.masks[0]
    before = np.sum(case.residual * case.residual, axis=0)
    after = np.sum(np.where(mask, case.target - predicted, 0.0) ** 2, axis=0)
    return bool(np.mean((after <= 0.5 * before) & (before > case.floor_per_channel)) > 0.5)


def constant_offset(case: Case) -> Iterator[Candidate]:
    """A vector, the same for all tokens, is added."""
    if case.tokens.size < 4:
        return
    count = np.maximum(case.masks[0].sum(axis=0), 1)
    offset = case.residual.sum(axis=0) / count
    if not _helps_most_channels(case, case.expected + offset):
        return
    yield Candidate(
        "cross-match",
        "the same vector is added to every token",
        case.expected + offset,
        6,
        {"offset_rms": rounded(float(np.sqrt(np.mean(offset * offset))))},
    )


def shifted_channels(case: Case) -> Iterator[Candidate]:
    """The channels lie some places further on, over the whole row or within each head."""
    for shift in _SHIFTS:
        if abs(shift) < case.target.shape[1]:
            yield Candidate(
                "cross-match",
                f"channels are shifted by {shift}",
                np.roll(case.expected, shift, axis=1),
                1,
                {"shift": shift},
            )


def permuted_channels(case: Case) -> Iterator[Candidate]:
    """Each channel holds what was expected in another."""
    channels = case.target.shape[1]
    if case.tokens.size < 6 or not 2 <= channels <= _MOST_CHANNELS:
        return
    tokens = np.linspace(0, case.tokens.size - 1, min(16, case.tokens.size)).astype(np.int64)
    target = np.where(np.isfinite(case.target), case.target, 0.0)[tokens]
    expected = np.where(np.isfinite(case.expected), case.expected, 0.0)[tokens]
    sample = np.unique(np.linspace(0, channels - 1, min(64, channels)).astype(np.int64))
    distance, _ = _nearest(target[:, sample], expected)
    energy = float(np.sum(target[:, sample] ** 2))
    # Most faults do not permute, so that a few channels are asked first.
    if energy == 0.0 or float(distance.sum()) > 0.05 * energy:
        return
    _, source = _nearest(target, expected)
    moved = int(np.count_nonzero(source != np.arange(channels)))
    if moved == 0:
        return
    yield Candidate(
        "cross-match",
        f"{moved} of {channels} channels hold what belongs in another channel",
        case.expected[:, source],
        5,
        {"moved": moved, "channels": channels, "first_sources": [int(i) for i in source[:8]]},
    )


def _nearest(target: F64, expected: F64) -> tuple[F64, I64]:
    """For each channel of `target` the squared distance to the nearest of `expected`, and which it is."""
    norms = np.sum(expected * expected, axis=0)
    distances, sources = [], []
    for left in range(0, target.shape[1], 256):
        part = target[:, left : left + 256]
        products = np.zeros((part.shape[1], expected.shape[1]))
        for token in range(part.shape[0]):
            products += part[token][:, None] * expected[token][None, :]
        distance = np.sum(part * part, axis=0)[:, None] + norms[None, :] - 2.0 * products
        sources.append(distance.argmin(axis=1))
        distances.append(np.maximum(distance.min(axis=1), 0.0))
    return np.concatenate(distances), np.concatenate(sources)


def outlying_channels(case: Case) -> I64:
    """The few channels whose error outlies that of all others; empty where there are none, or many."""
    error = np.sum(case.residual * case.residual, axis=0)
    noise = np.maximum(case.floor_per_channel, 1e-300)
    score = error / noise
    count = score.size
    limit = OUTLYING["engine" if case.is_engine else "model"]
    found = np.flatnonzero(score > limit * max(float(np.median(score)), 1.0))
    # Where the others are far from their noise as well, none is wrong alone: all of the weights differ.
    apart = float(np.median(score)) > LONE
    if apart or not found.size or found.size > max(1, count // 100):
        return np.zeros(0, np.int64)
    order = np.argsort(-error[found], kind="stable")
    return np.asarray(found[order], np.int64)


def one_channel(case: Case) -> Iterator[Candidate]:
    """One or a few channels alone are wrong."""
    channels = outlying_channels(case)
    if not channels.size:
        return
    predicted = case.expected.copy()
    predicted[:, channels] = case.target[:, channels]
    worst = int(channels[0])
    energy = float(np.sum(case.residual[:, channels] ** 2))
    share = energy / case.before if case.before else 0.0
    others = f" and {channels.size - 1} more are" if channels.size > 1 else " alone is"
    yield Candidate(
        "corrupt-block",
        f"channel {worst}{others} wrong, with {100 * share:.0f} % of the error",
        predicted,
        4,
        {"row": worst, "rows": [int(c) for c in channels[:16]], "share": rounded(share)},
        accepted=True,
    )


def rounded_output(case: Case) -> Iterator[Candidate]:
    """The output is rounded to 16 bits."""
    if case.ragged or case.dtype != "f32":
        return
    for dtype in ("bf16", "f16"):
        predicted = round_to(case.expected.astype(np.float32), dtype).astype(np.float64)
        yield Candidate("cross-match", f"the output is rounded to {dtype}", predicted, 2, {"dtype": dtype})


HYPOTHESES = (
    rounded_output,
    constant_ratio,
    shifted_channels,
    permuted_channels,
    constant_offset,
    ratio_by_channel,
    one_channel,
)
