"""How much of the output difference each mechanism, layer and matmul site brings in.

The output is the logits, centred at every position (a constant added to all logits changes no
probability). With ``y_T`` the teacher in f32, ``y_C`` the candidate's weights in f32 and ``y_Q`` the
candidate on the integer path::

    D = y_Q - y_T = W + A,   W = y_C - y_T (weights),   A = y_Q - y_C (activations)
    |D|^2 = |W|^2 + |A|^2 + 2 <W, A>

so the two first-order energies and the interaction ``2 <W, A>`` add up to the total exactly. Within a
mechanism, promoting one group ``g`` (a layer or a site) alone gives the first-order energy ``|W_g|^2``;
what the groups leave of ``|W|^2`` is that mechanism's interaction. These are Sobol's first-order terms
for switches that are on or off (Sobol 1993), with energy in the place of variance.

Rounding is chaotic over depth: a last-bit difference flips a quant by a whole step, and the flips
decorrelate. A third control measures how much of the total such an innocent difference makes by itself:
the integer path with its keys and values rounded to f16, as llama.cpp's cache does, against itself without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.bootstrap import interval, position_blocks, resampled_sums
from driftscope.errors import InputError

if TYPE_CHECKING:
    import polars as pl

MECHANISMS = ("weight", "activation")


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: block length in positions, number of resamples, confidence, seed."""

    block_positions: int
    resamples: int
    confidence: float
    seed: int


def centred_energy(difference: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the energy of a logit difference at each position.

    Args:
        difference: ``float32[n_positions, vocabulary]``.

    Returns:
        ``float64[n_positions]``: sum over the vocabulary of the squared difference, its mean over the
        vocabulary taken off. Exactly zero where the difference is zero.
    """
    energy = np.empty(difference.shape[0])
    for position, row in enumerate(difference):
        values = row.astype(np.float64)
        values -= values.mean()
        energy[position] = np.square(values).sum()
    return energy


def decompose(energies: pl.DataFrame, resampling: Resampling, minimum_positions: int) -> dict[str, Any]:
    """Turn energies per position into shares with intervals, interactions and controls.

    Args:
        energies: the ``energies`` evidence table.
        resampling: how intervals are made.
        minimum_positions: fewer positions than this give no shares.

    Returns:
        The ``decomposition`` section of the report: ``shares`` over all positions, the same with the first
        token of every sequence left out, the controls, and the population. Without shares, and with the
        status ``inadmissible``, where an energy is null or the positions are too few.

    Raises:
        InputError: the table lacks a run that the shares need.
    """
    items, values, sequences, positions = _matrix(energies)
    total = values[items.index(("total", "all", "both"))]
    document: dict[str, Any] = {
        "status": "done",
        "output": "logits, centred over the vocabulary",
        "unit": "share of the energy of the output difference",
        "positions": len(positions),
        "sequences": len(set(sequences)),
        "minimum_positions": minimum_positions,
        "confidence": resampling.confidence,
        "block_positions": resampling.block_positions,
        "resamples": resampling.resamples,
    }
    undefined = ~np.isfinite(values)
    if undefined.any():
        where = int(undefined.any(axis=0).sum())
        return {
            **document,
            "status": "inadmissible",
            "reason": f"the logits are not finite at {where} of {len(positions)} token positions",
            "controls": {},
            "shares": [],
            "shares_all_but_first": [],
        }
    document |= {
        "mean_energy": float(total.mean()),
        "controls": _controls(items, values),
    }
    if len(positions) < minimum_positions:
        return {
            **document,
            "status": "inadmissible",
            "reason": f"{len(positions)} token positions, at least {minimum_positions} are asked for",
            "shares": [],
            "shares_all_but_first": [],
        }
    if not total.sum() > 0.0:
        return {**document, "reason": "the outputs do not differ", "shares": [], "shares_all_but_first": []}
    inner = np.array([position > 0 for position in positions])
    kept = [sequence for sequence, keep in zip(sequences, inner, strict=True) if keep]
    document["first_token_energy_share"] = float(total[~inner].sum() / total.sum())
    document["shares"] = _shares(items, values, sequences, resampling)
    document["shares_all_but_first"] = _shares(items, values[:, inner], kept, resampling)
    return document


Item = tuple[str, str, str]


def _matrix(energies: pl.DataFrame) -> tuple[list[Item], NDArray[np.float64], list[str], list[int]]:
    """Return items, ``float64[n_items, n_positions]``, and the sequence and position of each column."""
    groups = dict(energies.group_by("by", "item", "mechanism", maintain_order=True))
    if ("total", "all", "both") not in groups:
        raise InputError("energies: the run of the total difference is missing")
    reference = groups["total", "all", "both"]
    columns = list(zip(reference["sequence"].to_list(), reference["position"].to_list(), strict=True))
    items: list[Item] = []
    rows = []
    for key, frame in groups.items():
        where = list(zip(frame["sequence"].to_list(), frame["position"].to_list(), strict=True))
        if where != columns:
            raise InputError(f"energies: run {key} is over other token positions than the total")
        items.append((str(key[0]), str(key[1]), str(key[2])))
        rows.append(frame["energy"].fill_null(float("nan")).to_numpy())
    return items, np.stack(rows), [sequence for sequence, _ in columns], [place for _, place in columns]


def _controls(items: list[Item], values: NDArray[np.float64]) -> dict[str, Any]:
    """Judge nothing: give the energy of the two controls beside what it must be."""
    sums = dict(zip(items, values.sum(axis=1), strict=True))
    try:
        no_op = sums["control", "no-op", "both"]
        everything = sums["control", "all", "both"]
        rounded_cache = sums["control", "f16-cache", "both"]
    except KeyError as error:
        raise InputError(f"energies: the control run {error} is missing") from error
    total = sums["total", "all", "both"]
    return {
        "no_op_energy": float(no_op),
        "all_promoted_share": float(everything / total) if total > 0 else None,
        "all_promoted_exact": bool(
            np.array_equal(
                values[items.index(("control", "all", "both"))],
                values[items.index(("total", "all", "both"))],
            )
        ),
        "f16_cache_share": float(rounded_cache / total) if total > 0 else None,
    }


def _shares(
    items: list[Item], values: NDArray[np.float64], sequences: list[str], resampling: Resampling
) -> list[dict[str, Any]]:
    blocks = position_blocks(sequences, resampling.block_positions)
    drawn = resampled_sums(values, blocks, resampling.resamples, resampling.seed)
    point = values.sum(axis=1)
    index = {item: row for row, item in enumerate(items)}
    everything = index["total", "all", "both"]

    def share(rows_plus: list[int], rows_minus: list[int]) -> tuple[float, float, float]:
        def of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
            return (sums[rows_plus].sum(axis=0) - sums[rows_minus].sum(axis=0)) / sums[everything]

        samples = of(drawn)
        return (float(of(point)), *interval(samples[np.isfinite(samples)], resampling.confidence))

    def row(by: str, item: str, mechanism: str, plus: list[int], minus: list[int]) -> dict[str, Any]:
        value, low, high = share(plus, minus)
        return {"by": by, "item": item, "mechanism": mechanism, "share": value, "low": low, "high": high}

    firsts = [index["total", mechanism, mechanism] for mechanism in MECHANISMS]
    shares = [
        row("mechanism", mechanism, mechanism, [first], [])
        for mechanism, first in zip(MECHANISMS, firsts, strict=True)
    ]
    shares.append(row("mechanism", "interaction", "both", [everything], firsts))
    for by in ("layer", "site"):
        for mechanism, first in zip(MECHANISMS, firsts, strict=True):
            members = [i for i, item in enumerate(items) if item[0] == by and item[2] == mechanism]
            shares += [row(by, items[member][1], mechanism, [member], []) for member in members]
            shares.append(row(by, "interaction", mechanism, [first], members))
    return shares
