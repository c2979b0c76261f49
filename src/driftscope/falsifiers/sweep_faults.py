"""Pairs of models with one fault put in, and the answers of two tensor sweeps: the published one and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.weights.pair_diff import diff_models
from driftscope.analysis.weights.relations import Band
from driftscope.analysis.weights.thresholds import Threshold
from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError
from driftscope.falsifiers.published_sweep import EXIT_CODE, F32, published_sweep
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import Resampling, generator, parameter, share_with_interval

_CONFIG = ModelConfig(
    architecture="qwen2",
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=48,
    context_length=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    attention_bias=True,
)
_BAND = Band(0.0, 1.6)
_SPREAD = 0.02
_DOMAIN = (0.0, 1e-7, 1e-5, 1e-3, 1e-1, 1.0)

Model = dict[str, F32]
Random = np.random.Generator


@dataclass(frozen=True)
class Case:
    """Two models, and what a sweep should say of them.

    Attributes:
        a: the reference.
        b: under test.
        same: whether b holds a's weights: the right answer.
        bound: a threshold that the user sets, as the command line takes it; ``same`` then says whether it is
            held.
    """

    a: Model
    b: Model
    same: bool
    bound: str = ""


@dataclass(frozen=True)
class _InMemory(TensorRef):
    """A tensor that is not on disk."""

    values: F32 = field(kw_only=True, repr=False)

    def raw(self) -> NDArray[np.uint8]:
        """The bytes of the values."""
        rows = np.ascontiguousarray(self.values).reshape(self.n_rows, self.shape[-1])
        return rows.view(np.uint8)


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: none, models are drawn."""
    return []


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Put one fault into a drawn model, let both sweeps answer, and see which answers are right.

    Args:
        parameters: `draws` of a model for each seed, `resamples` (not used), `confidence`.
        regimes: name to `fault`, one of `FAULTS`.
        seeds: each draws models and where a fault goes.
        evidence: not read.

    Returns:
        In each regime, for `published` and for `ours`: `right`, the share of right answers by what is
        printed; `right_code`, the share by the exit code alone.
    """
    draws = parameter(parameters, "draws", int, least=2)
    resampling = Resampling.of(parameters)

    def answers(fault: Callable[[Random, Model], Case]) -> dict[str, Any]:
        cases = []
        for seed in seeds:
            for draw in range(draws):
                random = generator(seed, draw)
                cases.append(fault(random, _drawn(random)))
        return _metrics(cases, resampling)

    return {
        "samples": draws * len(seeds) * len(regimes),
        "regimes": {name: answers(_fault_of(name, regime)) for name, regime in regimes.items()},
        "controls": {
            "gross": answers(_other_weights),
            "said-of-a-copy": answers(_said_of_a_copy),
        },
        "domain": [answers(_nudged(size)) for size in _DOMAIN],
    }


def _metrics(cases: Sequence[Case], resampling: Resampling) -> dict[str, Any]:
    found: dict[str, dict[str, int]] = {name: {"right": 0, "right_code": 0} for name in ("published", "ours")}
    for case in cases:
        bound = Threshold.parse(case.bound) if case.bound else None
        theirs = published_sweep(case.a, case.b, bound.value if bound else None)
        found["published"]["right"] += theirs.passes == case.same
        found["published"]["right_code"] += (EXIT_CODE == 0) == case.same
        document = diff_models(
            _artifact(case.a), _artifact(case.b), band=_BAND, thresholds=[] if bound is None else [bound]
        )
        found["ours"]["right"] += _accepts(document) == case.same
        found["ours"]["right_code"] += document["holds"] == case.same
    return {
        side: {name: share_with_interval(hits, len(cases), resampling) for name, hits in counts.items()}
        for side, counts in found.items()
    }


def _accepts(document: Mapping[str, Any]) -> bool:
    """Whether a reader of our diff finds the values to be the same, if perhaps stored in another way."""
    return bool(document["holds"]) or document["summary"]["conclusion"] == "transformed"


def _drawn(random: Random) -> Model:
    """A whole model."""
    return {
        name: (_SPREAD * random.standard_normal(shape) + (1.0 if "norm" in name else 0.0)).astype(np.float32)
        for name, shape in expected_shapes(_CONFIG).items()
    }


def _artifact(model: Model) -> Artifact:
    path = Path("drawn")
    tensors: dict[str, TensorRef] = {
        name: _InMemory(name, name, values.shape, "F32", path, 0, values.nbytes, values=values)
        for name, values in model.items()
    }
    return Artifact(path, "safetensors", _CONFIG, tensors)


def _somewhere(random: Random, model: Model, *parts: str) -> str:
    """The name of a tensor whose name has one of the parts in it."""
    names = [name for name in model if any(part in name for part in parts)]
    return names[int(random.integers(len(names)))]


def _copy(random: Random, model: Model) -> Case:
    return Case(model, {name: values.copy() for name, values in model.items()}, same=True)


def _zero_biases(random: Random, model: Model) -> Case:
    """Biases of zeros on both sides, as a converter fills in where a model has none."""
    zeros = {name: np.zeros_like(values) for name, values in model.items() if name.endswith(".bias")}
    return _copy(random, {**model, **zeros})


def _not_finite(random: Random, model: Model) -> Case:
    name = _somewhere(random, model, "_proj.weight")
    values = model[name].copy()
    values.reshape(-1)[int(random.integers(values.size))] = np.nan
    return Case(model, {**model, name: values}, same=False)


def _missing(random: Random, model: Model) -> Case:
    name = _somewhere(random, model, "_proj.weight")
    return Case(model, {key: values for key, values in model.items() if key != name}, same=False)


def _nothing_in_common(random: Random, model: Model) -> Case:
    return Case(model, {f"transformer.{name}": values for name, values in model.items()}, same=False)


def _transposed(random: Random, model: Model) -> Case:
    """A matrix stored column by column, and its shape says so: the same values."""
    name = _somewhere(random, model, "mlp.")
    return Case(model, {**model, name: np.ascontiguousarray(model[name].T)}, same=True)


def _unmoved(random: Random, model: Model) -> Case:
    """A matrix whose shape was reversed and whose values stayed where they were."""
    name = _somewhere(random, model, "mlp.")
    return Case(model, {**model, name: model[name].reshape(model[name].shape[::-1])}, same=False)


def _other_weights(random: Random, model: Model) -> Case:
    """A matrix with the weights of another training."""
    name = _somewhere(random, model, "_proj.weight")
    other = (_SPREAD * random.standard_normal(model[name].shape)).astype(np.float32)
    return Case(model, {**model, name: other}, same=False)


def _bound_broken(random: Random, model: Model) -> Case:
    """A matrix off by a hundredth of itself, where the user asks for a thousandth of that energy."""
    name = _somewhere(random, model, "_proj.weight")
    return Case(model, {**model, name: _off(random, model[name], 1e-2)}, same=False, bound=".* nmse<1e-7")


def _said_of_a_copy(random: Random, model: Model) -> Case:
    """A copy of which it is said that it has a fault: no sweep may find one."""
    return Case(model, dict(model), same=False)


def _nudged(size: float) -> Callable[[Random, Model], Case]:
    """A matrix off by a share of itself: a fault, however small."""

    def fault(random: Random, model: Model) -> Case:
        name = _somewhere(random, model, "_proj.weight")
        values = _off(random, model[name], size)
        return Case(model, {**model, name: values}, same=False)

    return fault


def _off(random: Random, values: F32, share: float) -> F32:
    found: F32 = (values + share * _SPREAD * random.standard_normal(values.shape)).astype(np.float32)
    return found


FAULTS: dict[str, Callable[[Random, Model], Case]] = {
    "copy": _copy,
    "zero-biases": _zero_biases,
    "not-finite": _not_finite,
    "missing": _missing,
    "nothing-in-common": _nothing_in_common,
    "transposed": _transposed,
    "unmoved": _unmoved,
    "other-weights": _other_weights,
    "bound-broken": _bound_broken,
}
"""What can be put in."""


def _fault_of(name: str, regime: Mapping[str, Any]) -> Callable[[Random, Model], Case]:
    fault = parameter(regime, "fault", str)
    if fault not in FAULTS:
        raise InputError(f"regime {name}: `fault` is {fault!r}; expected one of {', '.join(FAULTS)}")
    return FAULTS[fault]
