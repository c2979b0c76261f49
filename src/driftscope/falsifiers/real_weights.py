"""The model's own quantized blocks, path A against path B: do real weights err more than random ones?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from driftscope.artifacts.model import Artifact
from driftscope.falsifiers.layer_memory import published_step
from driftscope.falsifiers.own_activations import PROMPTS, OwnActivations, own_activations
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.falsifiers.super_block import F32, VALUES, Rows, gaussian_rows, random_rows
from driftscope.forward.architecture import site_tensor
from driftscope.forward.policy import LAYER_SITES
from driftscope.kernels.formats import format_of
from driftscope.kernels.matmul import matmul_f32_quantized, matmul_quantized
from driftscope.kernels.reference import published

_CANDIDATE = "models/candidate.json"
_PATH = "candidate.f32"
_SUB_BLOCK = 32
_MIRRORED = (0.0, 0.5, 0.9, 1.0)
_SYNTHETIC_TENSORS, _SYNTHETIC_BLOCKS = 12, 256
_TAIL = 0.01
_FLOOR = 1e-9

_PUBLISHED_LARGEST, _PUBLISHED_LAYERS = 4.41978, 28
"""The published figure of layer 24, the largest of its table."""

_QUANT_BYTES: Mapping[str, tuple[int, int]] = {
    "Q4_0": (2, 18),
    "Q4_1": (4, 20),
    "Q5_0": (2, 22),
    "Q5_1": (4, 24),
    "Q8_0": (2, 34),
    "Q2_K": (16, 80),
    "Q3_K": (0, 96),
    "Q4_K": (16, 144),
    "Q5_K": (16, 176),
    "Q6_K": (0, 192),
    "IQ4_NL": (2, 18),
    "IQ4_XS": (8, 136),
    "MXFP4": (1, 17),
}
"""Format to the first and the last byte (not included) of a block that hold quants; scales are elsewhere."""


@dataclass(frozen=True)
class Tensor:
    """Blocks of one projection.

    Attributes:
        layer: layer number.
        site: q, k, v, o, gate, up or down.
        dtype: format.
        rows: ``uint8[r, n * bytes of 256 values]``: sampled rows, cut to whole runs of 256 values.
        blocks: number of runs of 256 values in the whole tensor.
    """

    layer: int
    site: str
    dtype: str
    rows: Rows
    blocks: int

    @property
    def flat(self) -> Rows:
        """``uint8[r * n, bytes of 256 values]``."""
        return self.rows.reshape(-1, VALUES // format_of(self.dtype).block_size * self.block_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the format."""
        return format_of(self.dtype).block_bytes

    @property
    def columns(self) -> int:
        """Values of a row as it was cut."""
        return self.rows.shape[1] // self.block_bytes * format_of(self.dtype).block_size


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: the candidate and the prompts of its own activations."""
    return [_CANDIDATE, PROMPTS]


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Compare the two paths on the blocks of every projection, and on matched blocks of random quants.

    A block is a run of 256 stored values of a row. Path B rounds the activation as ggml does for the weight's
    format. The matched blocks keep scales and minima byte for byte and draw every quant anew; the permuted
    ones are the real blocks with the activation shuffled inside its runs of 32, which leaves every step of
    the rounding as it is.

    Args:
        parameters: `blocks` of a tensor at most (rows in even steps beyond that), `activations` drawn for
            ``normal`` and `most_tokens` of each prompt for ``own``, `resamples`, `confidence`.
        regimes: name to `activation`: ``ramp`` (the published one), ``normal`` or ``own`` (what the model's
            sites are given).
        seeds: of quants, activations and shuffles.
        evidence: the candidate, the prompts.

    Returns:
        In each regime, without unit: `over_random` and `over_permuted`, the error ``||A-B|| / ||A||`` of a
        tensor's blocks over that of the matched ones, geometric mean over tensors (bootstrap over
        tensors); `error`, its median; `by_site`; `scalar`, quantiles of ``|A-B| / |A|`` of single blocks;
        `tail`, the exponent of that figure's distribution in its largest hundredth (Hill 1975), below 1
        where it has no mean, below 2 where it has no variance. `coverage`: what was read. `first_blocks`:
        the published figures of the first block of each layer's last matrix, where it is Q4_K.
    """
    if not evidence.has(_CANDIDATE):
        return {"status": "not-run", "reason": f"{_CANDIDATE} is not there: no candidate was made"}
    most = parameter(parameters, "blocks", int, least=1)
    resampling = Resampling.of(parameters)
    artifact = evidence.model(_CANDIDATE)
    tensors, coverage = _tensors(artifact, most)
    if not tensors:
        return {"status": "not-run", "reason": "no projection of the candidate is in blocks of integers"}
    drawn = parameter(parameters, "activations", int, least=1)
    own = None
    if any(regime.get("activation") == "own" for regime in regimes.values()):
        most_tokens = parameter(parameters, "most_tokens", int, least=1)
        own = own_activations(artifact, _PATH, evidence.document(PROMPTS), most_tokens=most_tokens)
    return {
        "samples": sum(len(tensor.flat) for tensor in tensors) * len(regimes),
        "coverage": coverage,
        "first_blocks": _first_blocks(artifact),
        "regimes": {
            name: _metrics(
                tensors, _activation(parameter(regime, "activation", str), drawn, own), seeds, resampling
            )
            for name, regime in regimes.items()
        },
        **_synthetic_samples(seeds, resampling),
    }


def _tensors(artifact: Artifact, most: int) -> tuple[list[Tensor], dict[str, Any]]:
    found: list[Tensor] = []
    left_out, total, whole = [], 0, 0
    for layer in range(artifact.config.num_layers):
        for site in LAYER_SITES:
            ref = artifact.tensors[site_tensor(artifact.config, layer, site)]
            layout = format_of(ref.dtype)
            runs = ref.shape[-1] // VALUES
            total += ref.n_elements
            if ref.dtype not in _QUANT_BYTES or not runs:
                left_out.append(ref.name)
                continue
            raw = ref.raw()
            kept = min(raw.shape[0], max(1, most // runs))
            # Even steps: the same rows on every machine, and from every part of the tensor.
            chosen = np.arange(kept) * raw.shape[0] // kept
            width = runs * (VALUES // layout.block_size) * layout.block_bytes
            rows = np.ascontiguousarray(raw[chosen, :width])
            found.append(Tensor(layer, site, ref.dtype, rows, raw.shape[0] * runs))
            whole += kept * runs * VALUES
    return found, {
        "tensors": len(found),
        "tensors_left_out": left_out,
        "blocks": sum(len(tensor.flat) for tensor in found),
        "blocks_there": sum(tensor.blocks for tensor in found),
        "share_of_values": rounded(whole / total),
        "formats": {
            dtype: sum(tensor.dtype == dtype for tensor in found)
            for dtype in sorted({tensor.dtype for tensor in found})
        },
    }


class _Ramp:
    """The published activation."""

    def of(self, tensor: Tensor, random: np.random.Generator) -> F32:
        return published.activation()[None]


class _Normal:
    """Standard normal activations."""

    def __init__(self, count: int) -> None:
        self._count = count

    def of(self, tensor: Tensor, random: np.random.Generator) -> F32:
        return random.standard_normal((self._count, VALUES)).astype(np.float32)


class _Own:
    """What the site is given in a pass of the model: whole rows."""

    def __init__(self, own: OwnActivations) -> None:
        self._own = own

    def of(self, tensor: Tensor, random: np.random.Generator) -> F32:
        return np.ascontiguousarray(self._own.at(tensor.layer, tensor.site)[:, : tensor.columns])


def _activation(kind: str, drawn: int, own: OwnActivations | None) -> Any:
    from driftscope.errors import InputError

    if kind == "own" and own is not None:
        return _Own(own)
    if kind == "ramp":
        return _Ramp()
    if kind == "normal":
        return _Normal(drawn)
    raise InputError(f"measurement parameter `activation` is {kind!r}; expected one of ramp, normal, own")


def with_random_quants(rows: Rows, dtype: str, random: np.random.Generator) -> Rows:
    """The same blocks, scales and minima kept byte for byte, with every quant drawn anew.

    Args:
        rows: ``uint8[r, n * block_bytes]``.
        dtype: their format.
        random: where the quants come from.
    """
    first, last = _QUANT_BYTES[dtype]
    blocks = rows.reshape(-1, format_of(dtype).block_bytes).copy()
    blocks[:, first:last] = random.integers(0, 256, (len(blocks), last - first), dtype=np.uint8)
    return blocks.reshape(rows.shape)


def shuffled(x: F32, random: np.random.Generator) -> F32:
    """``float32[n, k]`` with each row's values in another order inside every run of 32."""
    runs = x.reshape(-1, _SUB_BLOCK)
    return random.permuted(runs, axis=1).reshape(x.shape)


def products(rows: Rows, dtype: str, x: F32) -> tuple[F32, F32]:
    """Path A and path B, ``float32[n, blocks or rows]`` each."""
    return matmul_f32_quantized(x, rows, dtype), matmul_quantized(x, rows, dtype)


@dataclass(frozen=True)
class _Errors:
    """Of one tensor: relative errors, and the scalar figures of its single products."""

    site: str
    real: float
    random: float
    permuted: float
    scalars: F64


def _metrics(
    tensors: Sequence[Tensor], activation: Any, seeds: Sequence[int], resampling: Resampling
) -> dict[str, Any]:
    errors = list(_of_tensors(tensors, activation, seeds))
    logs = np.log([[item.real / item.random, item.real / item.permuted] for item in errors])
    sites = sorted({item.site for item in errors})
    return {
        "over_random": _as_factor(logs[:, 0], resampling),
        "over_permuted": _as_factor(logs[:, 1], resampling),
        "error": with_interval(_median, np.array([item.real for item in errors]), resampling),
        "by_site": {site: _of_site(site, errors, logs) for site in sites},
        **_tail([item.scalars for item in errors], resampling),
    }


def _of_site(site: str, errors: Sequence[_Errors], logs: F64) -> dict[str, float]:
    at = [index for index, item in enumerate(errors) if item.site == site]
    over_random, over_permuted = np.exp(logs[at].mean(axis=0))
    return {
        "over_random": rounded(over_random),
        "over_permuted": rounded(over_permuted),
        "error": rounded(float(np.median([errors[index].real for index in at]))),
    }


def _of_tensors(tensors: Sequence[Tensor], activation: Any, seeds: Sequence[int]) -> Iterator[_Errors]:
    for index, tensor in enumerate(tensors):
        random = generator(seeds[0], index)
        x = activation.of(tensor, random)
        rows = tensor.flat if x.shape[1] == VALUES else tensor.rows
        yield _compare(tensor.site, tensor.dtype, rows, x, [generator(seed, index, 1) for seed in seeds])


def _compare(site: str, dtype: str, rows: Rows, x: F32, randoms: Sequence[np.random.Generator]) -> _Errors:
    a, b = products(rows, dtype, x)
    real = _relative(a, b)
    drawn, permuted = [], []
    for random in randoms:
        drawn.append(_relative(*products(with_random_quants(rows, dtype, random), dtype, x)))
        permuted.append(_relative(*products(rows, dtype, shuffled(x, random))))
    exact = np.abs(a.astype(np.float64))
    scalars = np.abs(a.astype(np.float64) - b) / np.maximum(exact, _FLOOR)
    return _Errors(site, real, _geometric(drawn), _geometric(permuted), scalars.ravel())


def _relative(a: F32, b: F32) -> float:
    """``||A-B|| / ||A||`` over outputs, median over activations."""
    exact = a.astype(np.float64)
    error = np.sqrt(np.square(exact - b).sum(axis=1))
    ratio = error / np.maximum(np.sqrt(np.square(exact).sum(axis=1)), _FLOOR)
    return max(float(np.median(ratio)), _FLOOR)


def _geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _as_factor(logs: F64, resampling: Resampling) -> dict[str, float]:
    interval = with_interval(_mean, logs, resampling)
    return {end: rounded(np.exp(value)) for end, value in interval.items()}


def _mean(sample: F64) -> F64:
    mean: F64 = sample.mean(axis=1)
    return mean


def _median(sample: F64) -> F64:
    middle: F64 = np.median(sample, axis=1)
    return middle


def _tail(groups: Sequence[F64], resampling: Resampling) -> dict[str, Any]:
    """Quantiles of single figures and the exponent of their tail; tensors are the bootstrap's clusters."""
    together = np.concatenate(groups)
    p50, p99, threshold = (float(value) for value in np.quantile(together, [0.5, 0.99, 1.0 - _TAIL]))
    threshold = max(threshold, _FLOOR)
    above = [group[group > threshold] for group in groups]
    clusters = np.array([[len(part), np.log(part / threshold).sum()] for part in above], np.float64)
    largest = float(together.max())
    as_far = float((together >= _PUBLISHED_LARGEST).mean())
    return {
        "scalar": {
            "median": rounded(p50),
            "p99": rounded(p99),
            "largest": rounded(largest),
            "largest_over_median": rounded(largest / max(p50, _FLOOR)),
            "above_published": rounded(as_far),
            "one_of_28_above_published": rounded(1.0 - (1.0 - as_far) ** _PUBLISHED_LAYERS),
        },
        "tail": with_interval(_exponent, clusters, resampling),
    }


def _exponent(sample: F64) -> F64:
    totals = sample.sum(axis=1)
    exponent: F64 = totals[:, 0] / np.maximum(totals[:, 1], _FLOOR)
    return exponent


def _synthetic_samples(seeds: Sequence[int], resampling: Resampling) -> dict[str, Any]:
    """Controls and domain: blocks of which a share is mirrored, so that their sum with a ramp cancels."""

    def mirrored(share: float) -> dict[str, Any]:
        tensors = []
        for index in range(_SYNTHETIC_TENSORS):
            random = generator(seeds[0], index, 2)
            rows = gaussian_rows(random, _SYNTHETIC_BLOCKS)
            count = round(share * len(rows))
            rows[:count] = mirror(rows[:count])
            tensors.append(Tensor(index, "synthetic", "Q4_K", rows, len(rows)))
        return _metrics(tensors, _Ramp(), seeds[:1], resampling)

    def drawn() -> dict[str, Any]:
        tensors = [
            Tensor(index, "synthetic", "Q4_K", random_rows(generator(seeds[0], index, 3), 256), 256)
            for index in range(_SYNTHETIC_TENSORS)
        ]
        return _metrics(tensors, _Ramp(), seeds[:1], resampling)

    def scalars(denominators: int) -> dict[str, Any]:
        """Figures of normal differences over 1, or over as many normal sums as there are figures."""
        random = generator(seeds[0], 4, denominators)
        figures = []
        for _ in range(_SYNTHETIC_TENSORS):
            below = random.standard_normal(4096) if denominators else np.ones(4096)
            figures.append(np.abs(random.standard_normal(4096) / below) / 100.0)
        return {"over_random": None, "over_permuted": None, **_tail(figures, resampling)}

    shares = {share: mirrored(share) for share in _MIRRORED}
    bounded, ratio = scalars(0), scalars(1)
    return {
        "controls": {
            "mirrored": shares[1.0],
            "random-blocks": drawn(),
            "bounded": bounded,
            "ratio-of-normals": ratio,
        },
        "domain": [*shares.values(), bounded, ratio],
    }


def mirror(rows: Rows) -> Rows:
    """Q4_K blocks with one scale whose second half repeats the first backwards.

    Against an activation that is odd about its middle their sum cancels.
    """
    mirrored = rows.copy()
    nibbles = rows[:, 16:].reshape(-1, 4, 32)
    values = np.stack([nibbles & 15, nibbles >> 4], axis=2).reshape(len(rows), VALUES)
    values[:, 128:] = values[:, 127::-1]
    pairs = values.reshape(-1, 4, 2, 32)
    mirrored[:, 16:] = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(rows), 128)
    return mirrored


def _first_blocks(artifact: Artifact) -> dict[str, Any]:
    """The published set-up: the first block of each layer's last matrix, chained by the published step."""
    start = published.activation()
    x, rows = start, []
    for layer in range(artifact.config.num_layers):
        ref = artifact.tensors[site_tensor(artifact.config, layer, "down")]
        if ref.dtype != "Q4_K" or ref.shape[-1] < VALUES:
            continue
        block = np.ascontiguousarray(ref.raw()[0, : format_of(ref.dtype).block_bytes])
        a, b = published.path_a_dot(block, x), published.path_b_dot(block, x)
        alone_a, alone_b = published.path_a_dot(block, start), published.path_b_dot(block, start)
        d, dmin = block[:4].view(np.float16).astype(np.float64)
        rows.append(
            {
                "layer": layer,
                "d": rounded(float(d)),
                "dmin": rounded(float(dmin)),
                "percent": rounded(100.0 * published.relative_difference(float(a), float(b))),
                "a": float(alone_a),
                "b": float(alone_b),
                "percent_alone": rounded(
                    100.0 * published.relative_difference(float(alone_a), float(alone_b))
                ),
            }
        )
        x = published_step(start, a)
    return {"layers": rows, "count": len(rows)}
