"""The published step from one layer to the next: does a layer's figure depend on the layers before it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.chain import normalized
from driftscope.falsifiers.layer_series import scalar_difference
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import F32, Rows, gaussian_rows, path_a, path_b, random_rows
from driftscope.kernels.reference import published

_HANDED_ON = 1.0
_DOMAIN = (0.0, 0.001, 0.01, 0.1, 0.5, 1.0)
_PULL = np.float32(0.001)
_CONTROL_SEEDS = 3


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, blocks are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Run the published step through drawn layers, and each layer alone, and compare their figures.

    The published step multiplies the initial activation with one number, ``1 + 0.001 r / max(|r|, 1)``, r
    the dot product of the layer. Both paths and the figure ``|A-B| / |A|`` scale with the activation, so
    that nothing but the last bits can be handed on.

    Args:
        parameters: `layers` in a chain, `resamples`, `confidence`.
        regimes: name to `blocks` (``random`` or ``gaussian``) and `activation_format`.
        seeds: a chain each.
        evidence: not read.

    Returns:
        In each regime `history`, the median over layers of by how much, relatively, a layer's figure moves
        when the layers before it are there (bootstrap over chains), and `moved`, the largest such move.
    """
    layers = parameter(parameters, "layers", int, least=2)
    resampling = Resampling.of(parameters)

    def follow(blocks: str, activation: str, handed_on: float, chosen: Sequence[int]) -> dict[str, Any]:
        moves = np.stack([_moves(blocks, activation, handed_on, seed, layers) for seed in chosen])
        return {
            "history": with_interval(_median, moves, resampling),
            "moved": rounded(float(moves.max())),
        }

    few = seeds[:_CONTROL_SEEDS]
    return {
        "samples": layers * len(seeds) * len(regimes),
        "regimes": {
            name: follow(
                parameter(regime, "blocks", str), parameter(regime, "activation_format", str), 0.0, seeds
            )
            for name, regime in regimes.items()
        },
        "controls": {
            "handed-on": follow("gaussian", "apr_q8k", _HANDED_ON, few),
            "alone": follow("gaussian", "none", 0.0, few),
        },
        # The first hands nothing on, whatever state the step is in.
        "domain": [
            follow("gaussian", "none", 0.0, few),
            *(follow("gaussian", "apr_q8k", handed_on, few) for handed_on in _DOMAIN),
        ],
    }


def _median(sample: F64) -> F64:
    flat: F64 = np.median(sample.reshape(sample.shape[0], -1), axis=1)
    return flat


def published_step(initial: F32, result: np.float32) -> F32:
    """The published next activation: the initial one times ``1 + 0.001 r / max(|r|, 1)``, in f32."""
    one = np.float32(1.0)
    return initial * (one + _PULL * result / max(abs(result), one))


def _moves(blocks: str, activation: str, handed_on: float, seed: int, layers: int) -> F64:
    """Return how far each layer's figure but the first's moves through the layers before: ``f64[layers-1]``.

    `handed_on` is the part of the next activation that is the layer's own output, scaled to the size of the
    initial activation; the rest is the published step.
    """
    draws = {"random": random_rows, "gaussian": gaussian_rows}
    if blocks not in draws:
        raise InputError(f"measurement parameter `blocks` is {blocks!r}; expected one of {', '.join(draws)}")
    random = generator(seed, 0)
    initial = published.activation()
    size = np.sqrt(np.square(initial.astype(np.float64)).mean()).astype(np.float32)
    x, moves = initial, []
    for layer in range(layers):
        # As many rows as there are values, where the output is handed on; the figure is the first row's.
        rows = draws[blocks](random, published.VALUES if handed_on else 1)
        chained, alone = _figure(rows[:1], x, activation), _figure(rows[:1], initial, activation)
        if layer:
            moves.append(abs(chained - alone) / alone if alone else float(chained != alone))
        result = path_a(rows[:1], x[None])[0, 0]
        x = published_step(initial, result)
        if handed_on:
            output = size * normalized(path_a(rows, x[None]))[0]
            x = np.float32(1.0 - handed_on) * x + np.float32(handed_on) * output
    return np.array(moves)


def _figure(row: Rows, x: F32, activation: str) -> float:
    a = path_a(row, x[None])[0]
    # With no activation format both sides are path A.
    b = a if activation == "none" else path_b(row, x[None], activation)[0]
    return float(scalar_difference(a, b)[0])
