"""The same tokens through two artifacts or two paths: do they choose the same next token, and if not, why?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.artifacts.model import Artifact
from driftscope.errors import InputError
from driftscope.falsifiers.case_logits import (
    F32,
    PROMPTS,
    Difference,
    difference,
    finite,
    manifest,
    missing,
    policy_of,
    prompt_batch,
)
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass

_NOISE_LEVELS = (0.0, 0.01, 0.1, 1.0)
_NULL_CHOICES = 32
"""Tokens a position that the null model lets compete; those further down do not get ahead."""
_NULL_DRAWS = 200


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: the models of the case that are compared, and the prompts."""
    return [*(manifest(role) for role in _roles(parameters)), PROMPTS]


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Compare logits and argmax over all positions of the case's prompts.

    Args:
        parameters: `roles`, the models that are compared; `text_tokens` of the case's first text beside the
            traced prompts; `published_margins` in logits; `resamples`, `confidence`.
        regimes: name to the two paths `a` and `b`, each a role and an arithmetic (``teacher.f32``).
        seeds: of the noise in the controls, the domain and the null model.
        evidence: models and prompts.

    Returns:
        In each regime: `cosine`, the smallest over positions; `centred_cosine`, of logits with their mean
        taken off, median over positions; `same_argmax`, share of positions; `flips`, positions with another
        argmax; `largest_flip`, the largest movement of two tokens against each other at a flip over what the
        noise moves two tokens by (its standard deviation over the vocabulary times root two), 0 without
        flips; `noise`, in logits, median over positions; `largest_margin`, the largest margin that flipped;
        `expected_flips` by the null model, independent normal noise of each position's size on the logits.
        `near_ties`: how often that noise turns margins of the published sizes around. `source`: logits that
        differ between the teacher and the model that it was derived from, where the case has one. A regime
        with logits that are not finite is left out.
    """
    absent = missing(inputs(parameters), evidence)
    if absent:
        return absent
    resampling = Resampling.of(parameters)
    artifacts = {role: evidence.model(manifest(role)) for role in _roles(parameters)}
    batch = prompt_batch(parameters, evidence)
    logits: dict[str, F32] = {}

    def along(path: str) -> F32:
        if path not in logits:
            logits[path] = _run(artifacts, path, batch)
        return logits[path]

    pairs = {
        name: (along(parameter(regime, "a", str)), along(parameter(regime, "b", str)))
        for name, regime in regimes.items()
    }
    pairs = {name: pair for name, pair in pairs.items() if finite(*pair)}
    if not pairs:
        return {"samples": 0, "regimes": {}, "controls": {}, "domain": []}
    found = {name: _metrics(a, b, seeds, resampling) for name, (a, b) in pairs.items()}
    base = next(iter(pairs.values()))[0]
    first = parameter(regimes[next(iter(pairs))], "a", str)
    scale = float(np.median(base.astype(np.float64).std(axis=1)))

    def noisy(level: float, seed: int) -> F32:
        noise = generator(seed, 7).standard_normal(base.shape, dtype=np.float32)
        return base + np.float32(level * scale) * noise

    return {
        "samples": batch.n_tokens * len(pairs),
        "positions": batch.n_tokens,
        "sequences": batch.n_sequences,
        "regimes": found,
        "source": _against_source(evidence, along, batch),
        "near_ties": {name: _near_ties(parameters, metrics["noise"]) for name, metrics in found.items()},
        "controls": {
            "noise-only": _metrics(base, noisy(1e-5, seeds[0]), seeds, resampling),
            "permuted-rows": _metrics(base, _permuted(artifacts, first, batch), seeds, resampling),
        },
        "domain": [
            *(_metrics(base, noisy(level, seeds[0]), seeds, resampling) for level in _NOISE_LEVELS),
            _metrics(base, _exchanged(base), seeds, resampling),
        ],
    }


def _against_source(
    evidence: EvidenceReader, along: Callable[[str], F32], batch: TokenBatch
) -> dict[str, Any]:
    """Compare the teacher with its source. A derived teacher has one, and is made after it."""
    name = manifest("source")
    if not evidence.has(name) or not evidence.has(manifest("teacher")):
        return {"status": "not present"}
    found = difference(along("teacher.f32"), _run({"source": evidence.model(name)}, "source.f32", batch))
    return {
        "status": "compared",
        "differing": int(found.differing.sum()),
        "flips": int((~found.same_argmax).sum()),
    }


def _roles(parameters: Mapping[str, Any]) -> list[str]:
    roles = parameters.get("roles")
    if not isinstance(roles, list) or not roles or not all(isinstance(role, str) for role in roles):
        raise InputError(f"measurement parameter `roles` is {roles!r}; expected a list of models")
    return roles


def _run(artifacts: Mapping[str, Artifact], path: str, batch: TokenBatch) -> F32:
    return ForwardPass(artifacts, policy_of(path)).run(batch)


def _permuted(artifacts: Mapping[str, Artifact], path: str, batch: TokenBatch) -> F32:
    """A conversion fault: rows of q and k in the order of the other rotary pairing.

    Where an artifact stores them in that order, the order is not undone; where it does not, they are taken
    as if they were in it.
    """
    role = path.partition(".")[0]
    artifact = artifacts[role]
    heads = {"q_proj": artifact.config.num_heads, "k_proj": artifact.config.num_kv_heads}
    tensors = dict(artifact.tensors)
    for name, ref in tensors.items():
        module = name.split(".")[-2] if name.count(".") > 1 else ""
        if module in heads and name.endswith(".weight"):
            tensors[name] = dataclasses.replace(ref, rope_heads=0 if ref.rope_heads else heads[module])
    return _run({role: dataclasses.replace(artifact, tensors=tensors)}, path, batch)


def _exchanged(logits: F32) -> F32:
    """At every tenth position the largest and the smallest logit change places: rows of a head mixed up."""
    changed = logits.copy()
    for i in range(0, len(changed), 10):
        ends = [changed[i].argmax(), changed[i].argmin()]
        changed[i, ends] = changed[i, ends[::-1]]
    return changed


def _metrics(a: F32, b: F32, seeds: Sequence[int], resampling: Resampling) -> dict[str, Any]:
    found = difference(a, b)
    flipped = ~found.same_argmax
    moved_by_noise = math.sqrt(2.0) * found.noise[flipped]
    return {
        "cosine": rounded(found.cosine.min()),
        "centred_cosine": with_interval(_median, found.centred_cosine, resampling),
        "same_argmax": with_interval(_mean, found.same_argmax.astype(np.float64), resampling),
        "flips": int(flipped.sum()),
        "largest_flip": rounded((found.movement[flipped] / moved_by_noise).max()) if flipped.any() else 0.0,
        "largest_margin": rounded(found.margin_a[flipped].max()) if flipped.any() else 0.0,
        "noise": rounded(float(np.median(found.noise))),
        "margin": rounded(float(np.median(found.margin_a))),
        "expected_flips": _expected_flips(a, found, seeds),
        "differing": int(found.differing.sum()),
    }


def _median(sample: F64) -> F64:
    return np.median(sample, axis=1)


def _mean(sample: F64) -> F64:
    mean: F64 = sample.mean(axis=1)
    return mean


def _expected_flips(a: F32, found: Difference, seeds: Sequence[int]) -> dict[str, float]:
    """Null model: the flips of independent normal noise, mean and 95 % range over draws."""
    count = min(_NULL_CHOICES, a.shape[1])
    top = -np.sort(np.partition(-a.astype(np.float64), count - 1, axis=1)[:, :count], axis=1)
    counts = []
    for seed in seeds:
        noise = generator(seed, 8).standard_normal((max(1, _NULL_DRAWS // len(seeds)), *top.shape))
        choices = (top + found.noise[:, None] * noise).argmax(axis=2)
        counts.append((choices != 0).sum(axis=1))
    flips = np.concatenate(counts).astype(np.float64)
    low, high = np.quantile(flips, [0.025, 0.975])
    return {"value": rounded(flips.mean()), "low": rounded(low), "high": rounded(high)}


def _near_ties(parameters: Mapping[str, Any], noise: float) -> list[dict[str, Any]]:
    """How often normal noise turns two tokens around: P(N(0, 2 noise^2) > margin)."""
    margins = parameters.get("published_margins", [])
    return [
        {
            "margin": float(margin),
            "turned": rounded(0.5 * math.erfc(float(margin) / (2.0 * noise))) if noise > 0.0 else 0.0,
        }
        for margin in margins
    ]
