"""Rotary embedding: does it enlarge a relative drift of the query, in norm and in the score?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import F32
from driftscope.kernels.forward import rope, rope_tables

_DRIFT = 0.00077
_PAIRINGS = {"split-half": False, "interleaved": True}
_DRIFTS = ("scaling", "direction")
_SLIPS = (0.0, 1e-6, 1e-4, 0.01, 1.0)
_DISTANCES = (0, 1, 4, 16, 64, 256, 1024, 4096)
_PUBLISHED_HEAD = 64
_PUBLISHED_BASE = 10000.0


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, queries and keys are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Follow a drift of 0.077 % of the query through the rotation and into the score.

    Args:
        parameters: `head` (channels), `base` of the frequencies, `positions` (queries and keys lie in
            0 .. positions, keys not after their query), `draws` for each seed, `resamples`, `confidence`.
        regimes: name to `pairing` (``split-half`` or ``interleaved``), `drift` (``scaling``: the query as a
            whole; ``direction``: a random direction) and `alignment`, the cosine of query and key before
            they are rotated.
        seeds: each draws queries, keys, drifts and positions.
        evidence: not read.

    Returns:
        In each regime, without unit: `norm`, relative drift of the rotated over that of the given query,
        mean over draws; `norm_largest`; `score`, the median relative drift of the score ``q.k`` over its
        median without rotation; `score_absolute`, the same of the drift as it is, not divided by the score,
        as a root of mean squares; `score_by_distance`, `score` for keys that far before their query.
    """
    head = parameter(parameters, "head", int, least=2)
    base = parameter(parameters, "base", float, least=1.0)
    positions = parameter(parameters, "positions", int, least=1)
    draws = parameter(parameters, "draws", int, least=16)
    resampling = Resampling.of(parameters)
    if head % 2:
        raise InputError(f"measurement parameter `head` is {head}; expected an even number")
    tables = _tables(head, base, positions)

    def follow(regime: Mapping[str, Any], *, slip: float = 0.0, rotate: bool = True) -> dict[str, Any]:
        interleaved = _choice(regime, "pairing", tuple(_PAIRINGS)) == "interleaved"
        drift = _choice(regime, "drift", _DRIFTS)
        alignment = parameter(regime, "alignment", float, least=0.0)
        if alignment > 1.0:
            raise InputError(f"regime parameter `alignment` is {alignment}; expected at most 1")
        drawn = [_Draw(seed, draws, head, positions, drift, alignment) for seed in seeds]
        return _metrics(drawn, _Rotation(tables, base, interleaved, slip, rotate), resampling)

    generic = {"pairing": "split-half", "drift": "direction", "alignment": 0.0}
    return {
        "samples": draws * len(seeds) * len(regimes),
        "published": _published(),
        "regimes": {name: follow(regime) for name, regime in regimes.items()},
        "controls": {
            "drifted-query-one-position-on": follow(generic, slip=1.0),
            "not-rotated": follow(generic, rotate=False),
        },
        "domain": [follow(generic, rotate=False), *(follow(generic, slip=slip) for slip in _SLIPS)],
    }


def _choice(regime: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str:
    value = parameter(regime, name, str)
    if value not in known:
        raise InputError(f"regime parameter `{name}` is {value!r}; expected one of {', '.join(known)}")
    return value


def _frequencies(head: int, base: float) -> F64:
    """``base ** (-2 i / head)``, radians per position (Su et al. 2021, section 3.2.2)."""
    frequencies: F64 = base ** (-2.0 * np.arange(head // 2) / head)
    return frequencies


def _tables(head: int, base: float, positions: int) -> tuple[F32, F32]:
    return rope_tables(_frequencies(head, base).astype(np.float32), positions + 1)


class _Draw:
    """Queries, drifted queries, keys (``f32[n, head]``) and positions of one seed."""

    def __init__(
        self, seed: int, count: int, head: int, positions: int, drift: str, alignment: float
    ) -> None:
        random = generator(seed)
        q = random.standard_normal((count, head))
        k = alignment * q + np.sqrt(1.0 - alignment**2) * random.standard_normal((count, head))
        direction = random.standard_normal((count, head))
        direction *= _DRIFT * _norm(q)[:, None] / _norm(direction)[:, None]
        moved = q + direction if drift == "direction" else q * (1.0 + _DRIFT)
        self.q, self.moved, self.k = (x.astype(np.float32) for x in (q, moved, k))
        self.at_q = random.integers(0, positions + 1, count)
        # As in causal attention, a key is never after its query; half of the keys are near.
        near = np.floor(np.exp(random.uniform(0.0, np.log(positions + 1.0), count))).astype(np.int64) - 1
        far = np.floor(random.uniform(0.0, 1.0, count) * (self.at_q + 1)).astype(np.int64)
        distance = np.where(random.integers(0, 2, count) == 0, np.minimum(near, self.at_q), far)
        self.at_k = self.at_q - distance
        self.positions = positions


class _Rotation:
    """The rotation of queries and keys, as it is or with a fault."""

    def __init__(
        self, tables: tuple[F32, F32], base: float, interleaved: bool, slip: float, rotate: bool
    ) -> None:
        self.tables, self.interleaved, self.rotate = tables, interleaved, rotate
        head = 2 * tables[0].shape[1]
        # A drifted query that is also rotated on by a part of a position.
        self.slip = rope_tables((slip * _frequencies(head, base)).astype(np.float32), 2) if slip else None

    def __call__(self, x: F32, positions: Any) -> F32:
        if not self.rotate:
            return x
        return rope(x, *self.tables, positions, interleaved=self.interleaved)

    def of_moved(self, x: F32, positions: Any) -> F32:
        turned = self(x, positions)
        if self.slip is None:
            return turned
        return rope(turned, *self.slip, np.ones(len(x), np.int64), interleaved=self.interleaved)


def _norm(x: Any) -> F64:
    norm: F64 = np.sqrt(np.square(np.asarray(x, np.float64)).sum(axis=-1))
    return norm


def _dot(x: Any, y: Any) -> F64:
    dot: F64 = (np.asarray(x, np.float64) * np.asarray(y, np.float64)).sum(axis=-1)
    return dot


def _metrics(draws: Sequence[_Draw], rotation: _Rotation, resampling: Resampling) -> dict[str, Any]:
    """Summarise; seeds are the clusters of the bootstrap."""
    norms, scores, energies = [], [], []
    for draw in draws:
        given = _norm(draw.moved.astype(np.float64) - draw.q) / _norm(draw.q)
        q, moved = rotation(draw.q, draw.at_q), rotation.of_moved(draw.moved, draw.at_q)
        norms.append(_norm(moved.astype(np.float64) - q) / _norm(q) / given)
        with_rope = _score_drifts(q, moved, rotation(draw.k, draw.at_k))
        without = _score_drifts(draw.q, draw.moved, draw.k)
        scores.append(np.stack([with_rope[0] / given, without[0] / given], axis=1))
        energies.append([np.square(with_rope[1]).sum(), np.square(without[1]).sum()])
    norm = np.stack(norms)
    return {
        "norm": with_interval(lambda sample: sample.mean(axis=1), norm.mean(axis=1), resampling),
        "norm_largest": rounded(norm.max()),
        "score": with_interval(_ratio_of_medians, np.stack(scores), resampling),
        "score_absolute": with_interval(_ratio_of_roots, np.array(energies), resampling),
        "score_by_distance": _by_distance(draws, rotation),
    }


def _score_drifts(q: F32, moved: F32, k: F32) -> tuple[F64, F64]:
    """Drift of the score over the score, and over the drift's and the key's lengths."""
    score = _dot(q, k)
    drift = np.abs(_dot(moved, k) - score)
    lengths = _norm(q) * _norm(k)
    return drift / np.maximum(np.abs(score), 1e-9 * lengths), drift / lengths


def _ratio_of_medians(sample: F64) -> F64:
    flat = sample.reshape(sample.shape[0], -1, 2)
    medians = np.median(flat, axis=1)
    ratio: F64 = medians[:, 0] / medians[:, 1]
    return ratio


def _ratio_of_roots(sample: F64) -> F64:
    energies = sample.sum(axis=1)
    ratio: F64 = np.sqrt(energies[:, 0] / energies[:, 1])
    return ratio


def _by_distance(draws: Sequence[_Draw], rotation: _Rotation) -> list[dict[str, float]]:
    found = []
    for distance in (each for each in _DISTANCES if each <= draws[0].positions):
        drifts = []
        for draw in draws:
            at_q = np.maximum(draw.at_q, distance)
            k = rotation(draw.k, at_q - distance)
            with_rope, _ = _score_drifts(rotation(draw.q, at_q), rotation.of_moved(draw.moved, at_q), k)
            without, _ = _score_drifts(draw.q, draw.moved, draw.k)
            drifts.append(np.stack([with_rope, without], axis=1))
        found.append(
            {"distance": distance, "score": rounded(float(_ratio_of_medians(np.stack(drifts)[None])[0]))}
        )
    return found


def _published() -> dict[str, Any]:
    """Return the published case, and how far any position or pairing could move its figure from 1."""
    i = np.arange(_PUBLISHED_HEAD)
    centred = (i - _PUBLISHED_HEAD // 2).astype(np.float32)
    q = centred * np.float32(0.05) + (i % 5).astype(np.float32) * np.float32(0.02)
    k = centred * np.float32(0.04) + (i % 7).astype(np.float32) * np.float32(0.015)
    moved = q * (np.float32(1.0) + np.float32(_DRIFT))
    tables = _tables(_PUBLISHED_HEAD, _PUBLISHED_BASE, 4096)
    given = float(_norm(moved.astype(np.float64) - q) / _norm(q))

    def amplification(at_q: int, at_k: int, interleaved: bool) -> float:
        rotation = _Rotation(tables, _PUBLISHED_BASE, interleaved, 0.0, True)
        turned = [rotation(x[None], np.array([at])) for x, at in ((q, at_q), (moved, at_q), (k, at_k))]
        return float(_score_drifts(*turned)[0][0]) / given

    sampled = (0, 1, 2, 7, 63, 640, 4096)
    everywhere = [
        amplification(at_q, at_k, interleaved)
        for interleaved in _PAIRINGS.values()
        for at_q in sampled
        for at_k in sampled
    ]
    at_zero = rope(q[None], *tables, np.array([0]))[0]
    return {
        "amplification": rounded(amplification(0, 1, False)),
        "input_percent": rounded(100.0 * given),
        "query_unchanged_at_position_0": bool(np.array_equal(at_zero, q)),
        "cases": len(everywhere),
        "farthest_from_one": rounded(max(abs(each - 1.0) for each in everywhere)),
    }
