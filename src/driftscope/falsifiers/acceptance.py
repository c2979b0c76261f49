"""The acceptance of the published fix: what its criteria say of the published layers and of our own runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval

if TYPE_CHECKING:
    import polars as pl

_DIVERGENCE = "divergence.parquet"
_TRACE = "trace/candidate.f32.parquet"
_FIX_SCOPE = "fix_scope.json"
_LOGITS = "lm_head"
_NOISE = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_LAYERS, _PASSES, _CHANNELS = 28, 4, 512
_FACTORS = (1.0, 1.2, 1.5, 1.9, 2.2, 3.0, 5.0)


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: the propagated error, the trace of one path, and what a fix changes."""
    return [_DIVERGENCE, _TRACE, *([_FIX_SCOPE] if parameters.get("fidelity") else [])]


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Form what the criteria ask for: std ratios by layer, last token on both sides, and the logits' cosine.

    A departure is max(r, 1/r) of a ratio r, so that either direction counts alike.

    Args:
        parameters: `tap`, whose std is compared; `published`, the std of both sides by layer
            (`last_token_a`, `last_token_b`); `bands`, by name, in which layers are counted, and the `prompt`
            whose layers they are; `fidelity`, true to quote the counterfactual runs; `resamples`,
            `confidence`.
        regimes: name to `compared`: ``published``; ``pair`` with the `pair` of paths; ``other-text`` or
            ``other-layer``, comparisons that are wrong by design within one path; ``shuffled``, drawn values
            against the same in another order of channels.
        seeds: of drawn values.
        evidence: the ``divergence`` and ``trace`` tables, ``fix_scope.json``.

    Returns:
        In each regime: `departure`, the largest over layers, geometric mean over prompts (or pairs of
        prompts), `typical`, the median over layers; `logits_cosine`, mean over prompts, where there are
        logits on both sides; each with its interval over prompts; `layers`. `counts`: of the layers of
        `prompt`, how many have a ratio in each band. `stds`: of `prompt`, over all tokens and the last.
    """
    for name in inputs(parameters):
        if not evidence.has(name):
            return {"status": "not-run", "reason": f"{name} is not there: no paths were compared"}
    resampling = Resampling.of(parameters)
    tap, prompt = parameter(parameters, "tap", str), parameter(parameters, "prompt", str)
    divergence = _last(evidence.table(_DIVERGENCE, "divergence"))
    whole_trace = evidence.table(_TRACE, "trace")
    trace = _last(whole_trace.filter(whole_trace["tap"] == tap))
    published = _published(parameters)
    bands = _bands(parameters)
    found: dict[str, Any] = {}
    counts: dict[str, Any] = {"published": _counts(published[0], bands)}
    for name, regime in regimes.items():
        kind = parameter(regime, "compared", str)
        cosines: F64 | None = None
        if kind == "published":
            ratios = published
        elif kind == "pair":
            ratios, cosines, prompts = _of_pair(divergence, parameter(regime, "pair", str), tap)
            if prompt in prompts:
                counts[name] = _counts(ratios[prompts.index(prompt)], bands)
        elif kind == "shuffled":
            ratios = np.concatenate([_shuffled(seed) for seed in seeds])
        elif kind in _WRONG:
            ratios = _WRONG[kind](_stds(trace))
        else:
            known = ", ".join(["published", "pair", "shuffled", *_WRONG])
            raise InputError(f"measurement parameter `compared` is {kind!r}; expected one of {known}")
        if ratios.size:
            found[name] = _metrics(ratios, cosines, resampling)
    noisy = [_metrics(*_noisy(level, seeds), resampling) for level in _NOISE]
    scaled = [_metrics(np.full((2, _LAYERS), factor), None, resampling) for factor in _FACTORS]
    return {
        "samples": sum(metrics["ratios"] for metrics in found.values()),
        "tap": tap,
        "counts": counts,
        "stds": _stds_of(whole_trace, prompt),
        **_fidelity(parameters, evidence),
        "regimes": found,
        "controls": {
            "nearly-equal": noisy[1],
            "noisy": noisy[-1],
            "tripled": scaled[5],
            "same": scaled[0],
        },
        "domain": [*noisy, *scaled],
    }


def _fidelity(parameters: Mapping[str, Any], evidence: EvidenceReader) -> dict[str, Any]:
    """Quote the mean KL divergence from the teacher with and without the fix, in nats."""
    if not parameters.get("fidelity"):
        return {}
    document = evidence.document(_FIX_SCOPE)
    found: dict[str, Any] = {"closer_to_teacher": document.get("closer_to_teacher", "undecided")}
    for option in document.get("options", []):
        found[f"option_{str(option['option']).lower()}"] = {
            "value": option["mean_kl"],
            "low": option["mean_kl_low"],
            "high": option["mean_kl_high"],
        }
    return {"fidelity": found}


def _last(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(table["scope"] == "last")


def _of_pair(table: pl.DataFrame, pair: str, tap: str) -> tuple[F64, F64, list[str]]:
    """Return ratios ``float64[prompts, layers]``, the logits' cosines and the prompts, in order of name."""
    rows = table.filter(table["pair"] == pair)
    layers = rows.filter((rows["tap"] == tap) & (rows["layer"] >= 0)).sort("prompt", "layer")
    logits = rows.filter(rows["tap"] == _LOGITS).sort("prompt")
    prompts = layers["prompt"].unique(maintain_order=True).to_list()
    ratios = layers["std_ratio"].to_numpy().astype(np.float64)
    if not len(prompts) or ratios.size % len(prompts):
        return np.zeros((0, 0)), np.zeros(0), []
    return (
        ratios.reshape(len(prompts), -1),
        logits["cosine_similarity"].to_numpy().astype(np.float64),
        prompts,
    )


def _stds(trace: pl.DataFrame) -> F64:
    """``float64[prompts, layers]`` of one path."""
    ordered = trace.sort("prompt", "layer")
    prompts = ordered["prompt"].n_unique()
    values = ordered["std"].to_numpy().astype(np.float64)
    return values.reshape(prompts, -1) if prompts and values.size % prompts == 0 else np.zeros((0, 0))


def _other_text(stds: F64) -> F64:
    """Every prompt over every other: another text altogether."""
    pairs = itertools.combinations(range(len(stds)), 2)
    ratios = [stds[a] / stds[b] for a, b in pairs]
    return np.stack(ratios) if ratios else np.zeros((0, 0))


def _other_layer(stds: F64) -> F64:
    """Every layer over the next one."""
    return stds[:, :-1] / stds[:, 1:] if stds.size and stds.shape[1] > 1 else np.zeros((0, 0))


_WRONG = {"other-text": _other_text, "other-layer": _other_layer}


def _values(seed: int) -> F64:
    """Heavy-tailed values, as a feed-forward's are: ``float64[passes, layers, channels]``."""
    return generator(seed).standard_t(4, (_PASSES, _LAYERS, _CHANNELS))


def _shuffled(seed: int) -> F64:
    values = _values(seed)
    moved = generator(seed, 1).permuted(values, axis=2)
    ratios: F64 = moved.std(axis=2, ddof=1) / values.std(axis=2, ddof=1)
    return ratios


def _noisy(level: float, seeds: Sequence[int]) -> tuple[F64, F64]:
    """Ratios and cosines of drawn values against the same with noise of a relative size added."""
    ratios, cosines = [], []
    for seed in seeds:
        values = _values(seed)
        other = values + level * values.std() * generator(seed, 2).standard_normal(values.shape)
        ratios.append(other.std(axis=2, ddof=1) / values.std(axis=2, ddof=1))
        a, b = values[:, -1], other[:, -1]
        norms = np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))
        cosines.append((a * b).sum(axis=1) / norms)
    return np.concatenate(ratios), np.concatenate(cosines)


def _metrics(ratios: F64, cosines: F64 | None, resampling: Resampling) -> dict[str, Any]:
    logs = np.abs(np.log(ratios))
    usable = np.all(np.isfinite(logs), axis=0)
    logs = logs[:, usable]
    found: dict[str, Any] = {
        "departure": _as_factor(_largest, logs, resampling),
        "typical": _as_factor(_middle, logs, resampling),
        "logits_cosine": None,
        "ratios": int(logs.size),
        "layers": [rounded(value) for value in np.exp(np.log(ratios[:, usable]).mean(axis=0))],
    }
    if cosines is not None and len(cosines):
        found["logits_cosine"] = with_interval(_mean, cosines, resampling)
    return found


def _largest(sample: F64) -> F64:
    largest: F64 = sample.max(axis=2).mean(axis=1)
    return largest


def _middle(sample: F64) -> F64:
    middle: F64 = np.median(sample, axis=2).mean(axis=1)
    return middle


def _mean(sample: F64) -> F64:
    mean: F64 = sample.mean(axis=1)
    return mean


def _as_factor(statistic: Any, logs: F64, resampling: Resampling) -> dict[str, float]:
    interval = with_interval(statistic, logs, resampling)
    return {end: rounded(np.exp(value)) for end, value in interval.items()}


def _published(parameters: Mapping[str, Any]) -> F64:
    """Return the ratio of both published sides: ``float64[1, layers]``."""
    try:
        a, b = (
            {int(key): float(value) for key, value in parameters["published"][side].items()}
            for side in ("last_token_a", "last_token_b")
        )
        return np.array([[a[layer] / b[layer] for layer in sorted(a)]])
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"measurement parameter `published` is malformed: {error!r}") from error


def _bands(parameters: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    try:
        return {str(name): (float(low), float(high)) for name, (low, high) in parameters["bands"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"measurement parameter `bands` is malformed: {error!r}") from error


def _counts(ratios: F64, bands: Mapping[str, tuple[float, float]]) -> dict[str, int]:
    return {"layers": len(ratios)} | {
        name: int(((ratios >= low) & (ratios <= high)).sum()) for name, (low, high) in bands.items()
    }


def _stds_of(trace: pl.DataFrame, prompt: str) -> dict[str, Any]:
    """Tap to the std of each layer over all tokens and over the last, of one prompt."""
    rows = trace.filter((trace["prompt"] == prompt) & (trace["layer"] >= 0))
    rows = rows.filter(rows["tap"].is_in(["ffn_swiglu", "ffn_out", "post_ffn_residual"]))
    stds: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows.filter(rows["scope"].is_in(["all", "last"])).iter_rows(named=True):
        at = stds.setdefault(row["tap"], {}).setdefault(row["layer"], {"layer": row["layer"]})
        at[row["scope"]] = None if row["std"] is None else rounded(row["std"])
    return {tap: [layers[layer] for layer in sorted(layers)] for tap, layers in sorted(stds.items())}
