"""One outlier in a block of an activation: how much do the block's other values lose?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.own_activations import INPUT_TAPS, PROMPTS, own_activations
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import F32
from driftscope.kernels.activations import QuantizedActivation, quantize_activation

_CANDIDATE = "models/candidate.json"
_PATH = "candidate.f32"
_WIDEST = 256
_PLANTED_GAIN = 30.0
_DOMAIN_GAINS = (1.0, 3.0, 10.0, 30.0, 100.0, 1000.0, 10000.0)
_BLOCKS = 64
_FLOOR = 1e-30


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: the candidate and the prompts of its own activations."""
    return [_CANDIDATE, PROMPTS]


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Compare what a block's other values lose to rounding with what its largest value predicts.

    The step of a block is its largest magnitude over 127, and a value that is rounded to a step s errs by
    s / sqrt(12) on average (Bennett 1948), whatever its own size. The same block with its largest value cut
    down to its second largest gives the error without the outlier.

    Args:
        parameters: `least_ratio`, of a block's largest to its second largest magnitude, from which on it has
            an outlier in the model's own activations; `most_tokens` of each prompt; `resamples`,
            `confidence`.
        regimes: name to `format` and `activation`: ``own``, or ``normal`` with the `gain` of one value.
        seeds: of the normal activations.
        evidence: the candidate, the prompts.

    Returns:
        In each regime, without unit: `excess`, the rms error of a block's other values over the predicted
        one, geometric mean over blocks; `multiplier`, their error with the outlier over without, and
        `multiplier_predicted`, the ratio of the two largest magnitudes, geometric means; `multiplier_excess`,
        one over the other; `lost`, the share of the other values' energy that rounding takes, median; the
        bootstrap is over layers and seeds. `outlier_blocks` is the share of blocks that were kept.
    """
    if not evidence.has(_CANDIDATE):
        return {"status": "not-run", "reason": f"{_CANDIDATE} is not there: no candidate was made"}
    resampling = Resampling.of(parameters)
    ratio = parameter(parameters, "least_ratio", float, least=1.0)
    most_tokens = parameter(parameters, "most_tokens", int, least=1)
    own: list[F32] = []
    if any(regime.get("activation") == "own" for regime in regimes.values()):
        activations = own_activations(
            evidence.model(_CANDIDATE), _PATH, evidence.document(PROMPTS), most_tokens=most_tokens
        )
        own = _by_layer(activations.arrays)
    found, samples = {}, 0
    for name, regime in regimes.items():
        fmt, kind = parameter(regime, "format", str), parameter(regime, "activation", str)
        if kind == "own":
            metrics = _metrics(own, fmt, ratio, resampling)
        elif kind == "normal":
            gain = parameter(regime, "gain", float, least=1.0)
            metrics = _of_planted(gain, fmt, seeds, resampling)
        else:
            raise InputError(f"measurement parameter `activation` is {kind!r}; expected own or normal")
        if metrics:
            found[name] = metrics
            samples += metrics["blocks"]
    return {
        "samples": samples,
        "regimes": found,
        "controls": {
            "planted": _of_planted(_PLANTED_GAIN, "q8_K", seeds, resampling),
            "no-shared-step": _of_planted(_PLANTED_GAIN, "f16", seeds, resampling),
        },
        "domain": [_of_planted(gain, "q8_K", seeds, resampling) for gain in _DOMAIN_GAINS]
        + [_of_planted(_PLANTED_GAIN, "f16", seeds, resampling)],
    }


def _by_layer(arrays: Mapping[tuple[int, str], F32]) -> list[F32]:
    """Return what the sites of each layer are given, in rows of 256: ``float32[n, 256]`` a layer."""
    layers = sorted({layer for layer, _ in arrays})
    parts = []
    for layer in layers:
        rows = [arrays[layer, tap] for tap in sorted(set(INPUT_TAPS.values()))]
        parts.append(
            np.concatenate([row[:, : row.shape[1] // _WIDEST * _WIDEST].reshape(-1, _WIDEST) for row in rows])
        )
    return [part for part in parts if len(part)]


def _of_planted(gain: float, fmt: str, seeds: Sequence[int], resampling: Resampling) -> dict[str, Any]:
    # In a narrow format the runs hold blocks without the planted value: they are left out.
    return _metrics(_planted(gain, seeds), fmt, 0.99 * gain if gain > 1.0 else 1.0, resampling)


def _planted(gain: float, seeds: Sequence[int]) -> list[F32]:
    """Normal values; the first of each run of 256 is `gain` times the largest of the others in magnitude."""
    groups = []
    for seed in seeds:
        x = generator(seed).standard_normal((_BLOCKS, _WIDEST))
        x[:, 0] = gain * np.abs(x[:, 1:]).max(axis=1)
        groups.append(x.astype(np.float32))
    return groups


def block_size_of(fmt: str) -> int:
    """Values that share a step in an activation format; 256 for those that share none."""
    probe = quantize_activation(np.zeros((1, _WIDEST), np.float32), fmt)
    return probe.block_size if isinstance(probe, QuantizedActivation) else _WIDEST


def _metrics(groups: Sequence[F32], fmt: str, least_ratio: float, resampling: Resampling) -> dict[str, Any]:
    """Metrics over groups of rows of 256; the groups are the bootstrap's clusters."""
    size = block_size_of(fmt)
    sums, lost, kept, total = [], [], 0, 0
    for rows in groups:
        losses = _losses(rows, fmt, size, least_ratio)
        total += rows.size // size
        kept += len(losses)
        if len(losses):
            logs = np.log(np.maximum(losses[:, :3], _FLOOR)).sum(axis=0)
            sums.append([len(losses), *logs])
            lost.append(losses[:, 3])
    if not sums:
        return {}
    clusters = np.array(sums)
    return {
        "excess": _factor(1, clusters, resampling),
        "multiplier": _factor(2, clusters, resampling),
        "multiplier_predicted": _factor(3, clusters, resampling),
        "multiplier_excess": _as_factor(_difference, clusters, resampling),
        "lost": rounded(float(np.median(np.concatenate(lost)))),
        "blocks": kept,
        "outlier_blocks": rounded(kept / total),
        "block_size": size,
    }


def _losses(rows: F32, fmt: str, size: int, least_ratio: float) -> F64:
    """Of each block with an outlier: error over predicted, multiplier, predicted multiplier, energy lost."""
    blocks = rows.reshape(-1, size)
    order = np.sort(np.abs(blocks), axis=1).astype(np.float64)
    largest, second = order[:, -1], order[:, -2]
    keep = (second > 0.0) & (largest >= least_ratio * second)
    blocks, largest, second = blocks[keep], largest[keep], second[keep]
    if not len(blocks):
        return np.zeros((0, 4))
    at = np.abs(blocks).argmax(axis=1)
    cut = blocks.copy()
    index = np.arange(len(blocks))
    cut[index, at] = np.copysign(second, blocks[index, at]).astype(np.float32)
    error, calm = _error(blocks, at, fmt), _error(cut, at, fmt)
    others = np.square(order[keep, :-1]).sum(axis=1)
    predicted = largest / 127.0 / np.sqrt(12.0)
    return np.stack(
        [
            np.sqrt(error / (size - 1)) / predicted,
            np.sqrt(np.maximum(error, _FLOOR) / np.maximum(calm, _FLOOR)),
            largest / second,
            error / others,
        ],
        axis=1,
    )


def _error(blocks: F32, left_out: Any, fmt: str) -> F64:
    """Energy of the rounding error of each block's values but one: ``float64[n]``."""
    # A row of blocks of 32 is as good as a row of one block: blocks do not touch each other.
    rounded_values = quantize_activation(blocks, fmt).dequantize()
    error = np.square(blocks.astype(np.float64) - rounded_values)
    error[np.arange(len(blocks)), left_out] = 0.0
    total: F64 = error.sum(axis=1)
    return total


def _factor(column: int, clusters: F64, resampling: Resampling) -> dict[str, float]:
    def mean(sample: F64) -> F64:
        totals = sample.sum(axis=1)
        ratio: F64 = totals[:, column] / totals[:, 0]
        return ratio

    return _as_factor(mean, clusters, resampling)


def _difference(sample: F64) -> F64:
    totals = sample.sum(axis=1)
    ratio: F64 = (totals[:, 2] - totals[:, 3]) / totals[:, 0]
    return ratio


def _as_factor(statistic: Any, clusters: F64, resampling: Resampling) -> dict[str, float]:
    interval = with_interval(statistic, clusters, resampling)
    return {end: rounded(np.exp(value)) for end, value in interval.items()}
