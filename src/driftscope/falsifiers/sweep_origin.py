"""Which origins of the full-precision side leave the published smallest cosine, on a 7B model's inventory?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.derive.quantize import quantize
from driftscope.artifacts.model import ModelConfig
from driftscope.errors import InputError
from driftscope.falsifiers.published_sweep import ACCEPTED_COSINE, F32, exact_distance, printed_cosine
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.kernels.dequantize import dequantize

INVENTORY = ModelConfig(
    architecture="qwen2",
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18944,
    vocab_size=152064,
    context_length=32768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    attention_bias=True,
)
"""Qwen2.5-Coder-7B-Instruct, as its config.json says."""

ORIGINS = ("full-precision", "heavy-tails", "export-f32", "export-f16", "export-bf16")

_SPREAD = 0.02
_DOMAIN_BITS = (4, 6, 8, 9, 10, 11, 12, 14)

Model = dict[str, F32]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, weights are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Draw a model of the published inventory, its projections in Q4_K, and compare it with where it is from.

    Args:
        parameters: `values` drawn of each tensor, a multiple of 256; `resamples`, `confidence`.
        regimes: name to `origin` of the other side: ``full-precision``, normal weights in BF16 before they
            were quantized; ``heavy-tails``, likewise of Student's t with 4 degrees of freedom;
            ``export-f32``, ``export-f16``, ``export-bf16``, the quantized values written out again.
        seeds: each draws a model.
        evidence: not read.

    Returns:
        In each regime: `floor` and `top`, the smallest and the largest printed cosine; `below`, how many
        tensors print less than 0.999; `distance`, the median of ``1 - cosine`` of the projections, with its
        interval over tensors; `max_diff`. `inventory` counts tensors and values.
    """
    values = parameter(parameters, "values", int, least=256)
    if values % 256:
        raise InputError(f"measurement parameter `values` is {values}; expected a multiple of 256")
    resampling = Resampling.of(parameters)
    shapes = expected_shapes(INVENTORY)
    models = [(_drawn(seed, values, heavy=False), _drawn(seed, values, heavy=True)) for seed in seeds]
    quantized = [(_quantized(normal), _quantized(heavy)) for normal, heavy in models]

    def regime(name: str, origin: str) -> dict[str, Any]:
        if origin not in ORIGINS:
            raise InputError(f"regime {name}: `origin` is {origin!r}; expected one of {', '.join(ORIGINS)}")
        heavy = int(origin == "heavy-tails")
        pairs = []
        for drawn, stored in zip(models, quantized, strict=True):
            export = origin.startswith("export-")
            source = stored[0] if export else drawn[heavy]
            kind = origin.removeprefix("export-") if export else "bf16"
            pairs.append(({key: _as(kind, part) for key, part in source.items()}, stored[heavy]))
        return _metrics(pairs, resampling)

    return {
        "samples": values * len(shapes) * len(seeds) * len(regimes),
        "inventory": {
            "tensors": len(shapes),
            "projections": sum(map(_is_projection, shapes)),
            "biases": sum(name.endswith(".bias") for name in shapes),
            "values": int(sum(np.prod(shape) for shape in shapes.values())),
        },
        "regimes": {name: regime(name, parameter(found, "origin", str)) for name, found in regimes.items()},
        "controls": {
            "copy": _metrics([(stored, stored) for stored, _ in quantized], resampling),
            "other-weights": _metrics([(models[0][0], models[0][1])], resampling),
        },
        "domain": [
            _metrics([(_significand(bits, quantized[0][0]), quantized[0][0])], resampling)
            for bits in _DOMAIN_BITS
        ],
    }


def _is_projection(name: str) -> bool:
    return "_proj.weight" in name


def _drawn(seed: int, values: int, *, heavy: bool) -> Model:
    """Some values of each tensor of the inventory: the first of them, for all are alike."""
    model = {}
    for index, (name, shape) in enumerate(expected_shapes(INVENTORY).items()):
        random = generator(seed, index, int(heavy))
        count = min(values, int(np.prod(shape)))
        if name.endswith("norm.weight"):
            # Learned gains of one layer are alike, and those of layers are not.
            level = random.uniform(0.5, 2.5)
            drawn = level * (1.0 + 0.05 * random.standard_normal(count))
        elif heavy:
            drawn = _SPREAD * random.standard_t(4, count)
        else:
            drawn = _SPREAD * random.standard_normal(count)
        # Full-precision weights are published in BF16.
        model[name] = _as("bf16", drawn.astype(np.float32))
    return model


def _quantized(model: Model) -> Model:
    """The model with its projections in Q4_K, dequantized again; the rest stays in f32."""
    names = [name for name in model if _is_projection(name)]
    rows = np.stack([model[name] for name in names])
    back = dequantize(quantize(rows, "Q4_K"), "Q4_K")
    return {**model, **dict(zip(names, back, strict=True))}


def _as(kind: str, values: F32) -> F32:
    """Values rounded to a float format, half to even."""
    if kind == "f32":
        return values
    if kind == "f16":
        return values.astype(np.float16).astype(np.float32)
    words = np.ascontiguousarray(values).view(np.uint32)
    kept = (words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return kept.view(np.float32)


def _significand(bits: int, model: Model) -> Model:
    """Values with so many bits of significand, the leading one included; exponents as they are."""
    found = {}
    for name, values in model.items():
        part, exponent = np.frexp(values.astype(np.float64))
        found[name] = np.ldexp(np.rint(np.ldexp(part, bits)), exponent - bits).astype(np.float32)
    return found


def _metrics(pairs: Sequence[tuple[Model, Model]], resampling: Resampling) -> dict[str, Any]:
    printed = [printed_cosine(a[name], b[name]) for a, b in pairs for name in a]
    distances: F64 = np.array(
        [exact_distance(a[name], b[name]) for a, b in pairs for name in a if _is_projection(name)]
    )
    largest = max(float(np.abs(a[name] - b[name]).max()) for a, b in pairs for name in a)
    below = sum(cosine < ACCEPTED_COSINE for cosine in printed)
    return {
        "floor": min(printed),
        "top": max(printed),
        "below": below // len(pairs) if below % len(pairs) == 0 else rounded(below / len(pairs)),
        "distance": with_interval(lambda sample: np.median(sample, axis=1), distances, resampling),
        "max_diff": rounded(largest),
    }
