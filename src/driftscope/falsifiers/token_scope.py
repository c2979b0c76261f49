"""One path, one pass: how far do the std over all tokens and the std over the last token part?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.statistic import Statistic
from driftscope.errors import InadmissibleError, InputError
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval

if TYPE_CHECKING:
    import polars as pl

SCOPES = ("all", "all-but-first", "last")
_GAINS = (0.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_PLANTED_GAIN = 1000.0
_SYNTHETIC_LAYERS, _SYNTHETIC_TOKENS, _SYNTHETIC_CHANNELS = 12, 7, 512
_SYNTHETIC_TAP = "synthetic"


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: the trace of one path."""
    return [f"trace/{parameter(parameters, 'path', str)}.parquet"]


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Compare the scopes of the same tap in the same pass.

    Args:
        parameters: `path`, whose trace is read; `tap`, the one that the metrics are of; `taps`, those
            whose figures are shown beside it; `resamples`, `confidence`; `published`, the published
            layers' std of both sides (see `_published`).
        regimes: name to `least_tokens` and `most_tokens` of the prompts in it.
        seeds: of the synthetic passes of the controls and the domain.
        evidence: the trace.

    Returns:
        In each regime, of `tap`: `largest`, the largest over layers of the std over all tokens over that
        over the last, `typical`, the median over layers, `largest_without_first` with the first token left
        out of the numerator (each a factor of at least 1, whichever of the two is larger; geometric means
        over prompts, bootstrap over prompts and layers), `cause`, the layer, token and channel of the
        largest, and `layers`, the ratio of each layer as it is. `refusal` says whether the ratio across
        scopes is refused by the type that carries statistics.
    """
    name = inputs(parameters)[0]
    if not evidence.has(name):
        return {"status": "not-run", "reason": f"{name} is not there: the path was not traced"}
    resampling = Resampling.of(parameters)
    tap = parameter(parameters, "tap", str)
    taps = [tap, *(other for other in parameters.get("taps", []) if other != tap)]
    trace = _of_taps(evidence.table(name, "trace"), taps)
    measured: dict[str, Any] = {}
    prompts: dict[str, list[str]] = {}
    for regime, limits in regimes.items():
        part = _of_length(trace, limits)
        prompts[regime] = sorted(set(part["prompt"].to_list()))
        metrics = {other: scope_metrics(part, other, resampling) for other in taps if prompts[regime]}
        if metrics.get(tap):
            measured[regime] = {**metrics[tap], "prompts": prompts[regime], "taps": metrics}
    planted = [_synthetic(seed, _PLANTED_GAIN) for seed in seeds]
    plain = [_synthetic(seed, 0.0) for seed in seeds]
    return {
        "samples": sum(len(metrics["layers"]) * len(metrics["prompts"]) for metrics in measured.values()),
        "tap": tap,
        "population": _population(trace),
        "refusal": _refusal(trace, tap),
        "published": _published(parameters),
        "regimes": measured,
        "controls": {
            "planted-first-token": scope_metrics(_joined(planted), _SYNTHETIC_TAP, resampling),
            "like-tokens": scope_metrics(_joined(plain), _SYNTHETIC_TAP, resampling),
        },
        "domain": [scope_metrics(_synthetic(seeds[0], gain), _SYNTHETIC_TAP, resampling) for gain in _GAINS],
    }


def scope_metrics(trace: pl.DataFrame, tap: str, resampling: Resampling) -> dict[str, Any]:
    """Return the metrics of one tap over the prompts and layers of a trace; empty where there are none.

    Args:
        trace: rows of the ``trace`` table.
        tap: op output.
        resampling: how intervals are made.
    """
    rows = trace.filter(trace["tap"] == tap)
    std = {
        (row["prompt"], row["layer"], row["scope"]): row["std"]
        for row in rows.filter(rows["scope"].is_in(list(SCOPES))).iter_rows(named=True)
    }
    prompts = sorted({key[0] for key in std})
    layers = sorted({key[1] for key in std})
    if not layers:
        return {}
    stds = np.array(
        [[[std.get((prompt, layer, scope)) for scope in SCOPES] for layer in layers] for prompt in prompts],
        dtype=np.float64,
    )
    usable = np.all(np.isfinite(stds) & (stds > 0.0), axis=(0, 2))
    left_out = [layer for layer, keep in zip(layers, usable, strict=True) if not keep]
    layers = [layer for layer, keep in zip(layers, usable, strict=True) if keep]
    if not layers:
        return {}
    stds = stds[:, usable]
    # Layers come first: they are what the bootstrap draws.
    logs = np.swapaxes(np.log(stds[:, :, :2] / stds[:, :, 2:]), 0, 1)
    mean = np.exp(logs.mean(axis=1))
    largest = int(np.argmax(np.abs(logs[:, :, 0]).mean(axis=1)))
    return {
        "largest": _as_factor(_largest, logs[:, :, 0], resampling),
        "typical": _as_factor(_typical, logs[:, :, 0], resampling),
        "largest_without_first": _as_factor(_largest, logs[:, :, 1], resampling),
        "typical_without_first": _as_factor(_typical, logs[:, :, 1], resampling),
        "cause": _cause(rows, layers[largest]),
        "layers": [
            {"layer": layer, "all_over_last": rounded(mean[i, 0]), "without_first": rounded(mean[i, 1])}
            for i, layer in enumerate(layers)
        ],
        "layers_left_out": left_out,
    }


def _largest(sample: F64) -> F64:
    """Mean over prompts of the largest departure over layers: ``f64[b, layers, prompts] -> f64[b]``."""
    largest: F64 = np.abs(sample).max(axis=1).mean(axis=1)
    return largest


def _typical(sample: F64) -> F64:
    typical: F64 = np.median(np.abs(sample), axis=1).mean(axis=1)
    return typical


def _as_factor(statistic: Any, logs: F64, resampling: Resampling) -> dict[str, float]:
    interval = with_interval(statistic, logs, resampling)
    return {end: rounded(np.exp(value)) for end, value in interval.items()}


def _cause(rows: pl.DataFrame, layer: int) -> dict[str, Any]:
    """Name the token and channel of the largest value in a layer, over all prompts of it.

    `energy_share` is the part of the sum of squares over all tokens that this one token carries.
    """
    part = rows.filter(rows["layer"] == layer)
    whole = part.filter(part["scope"] == "all")
    size = whole.select(largest=_larger_end()).to_series()
    row = whole.row(int(np.argmax(size.to_numpy())), named=True)
    position = row["argmax_position"]
    single = part.filter(
        (part["prompt"] == row["prompt"]) & (part["scope"] == "token") & (part["position"] == position)
    )
    share = None
    if single.height == 1 and row["rms"]:
        token = single.row(0, named=True)
        share = rounded(token["rms"] ** 2 * token["count"] / (row["rms"] ** 2 * row["count"]))
    return {
        "layer": layer,
        "prompt": row["prompt"],
        "position": position,
        "channel": row["argmax_channel"],
        "value": rounded(row["max"] if abs(row["max"]) >= abs(row["min"]) else row["min"]),
        "energy_share": share,
    }


def _larger_end() -> pl.Expr:
    import polars as pl

    return pl.max_horizontal(pl.col("max").abs(), pl.col("min").abs())


def _of_taps(trace: pl.DataFrame, taps: Sequence[str]) -> pl.DataFrame:
    return trace.filter(trace["tap"].is_in(list(taps)) & (trace["layer"] >= 0))


def _of_length(trace: pl.DataFrame, limits: Mapping[str, Any]) -> pl.DataFrame:
    """Keep the prompts whose number of tokens is in a regime's range; one token has nothing to part."""
    least = parameter(limits, "least_tokens", int, least=2)
    most = parameter(limits, "most_tokens", int, least=least)
    whole = trace.filter(trace["scope"] == "all")
    fitting = whole.filter((whole["token_count"] >= least) & (whole["token_count"] <= most))
    return trace.filter(trace["prompt"].is_in(fitting["prompt"].unique().to_list()))


def _population(trace: pl.DataFrame) -> dict[str, Any]:
    """Say that it is one path, one artifact and one pass a prompt."""
    return {
        "paths": sorted(set(trace["path"].to_list())),
        "path_count": trace["path"].n_unique(),
        "artifact_count": trace["artifact"].n_unique(),
        "prompts": trace["prompt"].n_unique(),
        "layers": trace["layer"].n_unique(),
    }


def _refusal(trace: pl.DataFrame, tap: str) -> dict[str, Any]:
    """Ask for the std over all tokens over that over the last, both of one pass."""
    rows = trace.filter(trace["tap"] == tap)
    pair = [rows.filter(rows["scope"] == scope) for scope in ("all", "last")]
    if any(part.is_empty() for part in pair):
        return {"asked": False, "refused": False, "reason": f"the trace has no {tap}"}
    above, below = (_statistic(part.row(0, named=True)) for part in pair)
    return {"asked": True, **_ratio(above, below)}


def _statistic(row: Mapping[str, Any]) -> Statistic:
    return Statistic(
        value=row["std"],
        name="std",
        tap=f"layers.{row['layer']}.{row['tap']}",
        scope=row["scope"],
        position=row["position"],
        token_count=row["token_count"],
        count=row["count"],
        capture_point=row["capture_point"],
        path=row["path"],
        token_ids_sha256=row["prompt"],  # one pass: the prompt's name stands for its tokens
    )


def _ratio(above: Statistic, below: Statistic) -> dict[str, Any]:
    try:
        return {"refused": False, "ratio": rounded(above.ratio(below)), "reason": ""}
    except InadmissibleError as error:
        return {"refused": True, "ratio": None, "reason": str(error)}


def _published(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Form the published ratios from the published std of both sides.

    `published` of the parameters holds `layer`, `channels`, `token_ids`, and the std of ``ffn_swiglu`` by
    layer: `all_tokens_a`, `last_token_a`, `last_token_b`.
    """
    given = parameters.get("published")
    if not isinstance(given, Mapping):
        raise InputError("measurement parameter `published` is missing; expected the published std by layer")
    try:
        layer, channels, ids = int(given["layer"]), int(given["channels"]), list(given["token_ids"])
        all_a, last_a, last_b = (
            {int(key): float(value) for key, value in given[name].items()}
            for name in ("all_tokens_a", "last_token_a", "last_token_b")
        )
        pairs = [(at, last_a[at], last_b[at]) for at in sorted(last_a)]
        headline = all_a[layer], last_a[layer], last_b[layer]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"measurement parameter `published` is malformed: {error!r}") from error

    def statistic(value: float, scope: str, at: int, path: str) -> Statistic:
        tokens = len(ids) if scope == "all" else 1
        return Statistic(
            value=value,
            name="std",
            tap=f"layers.{at}.ffn_swiglu",
            scope=scope,
            position=-1,
            token_count=tokens,
            count=tokens * channels,
            capture_point="ffn_swiglu",
            path=path,
            token_ids_sha256=hashlib.sha256(str(ids).encode()).hexdigest(),
        )

    crossed = _ratio(
        statistic(headline[0], "all", layer, "apr"), statistic(headline[2], "last", layer, "gguf")
    )
    ratios = {
        at: _ratio(statistic(a, "last", at, "apr"), statistic(b, "last", at, "gguf"))["ratio"]
        for at, a, b in pairs
    }
    return {
        "layer": layer,
        "tokens": len(ids),
        "crossed": {"quotient": rounded(headline[0] / headline[2]), **crossed},
        "like_for_like": ratios[layer],
        "same_side_quotient": rounded(headline[0] / headline[1]),
        "by_layer": [{"layer": at, "ratio": ratio} for at, ratio in ratios.items()],
    }


def _synthetic(seed: int, gain: float) -> pl.DataFrame:
    """A pass of independent standard normal values; one channel of the first token is `gain` larger."""
    shape = (_SYNTHETIC_LAYERS, _SYNTHETIC_TOKENS, _SYNTHETIC_CHANNELS)
    values = generator(seed).standard_normal(shape)
    values[:, 0, 7] += gain
    return trace_of(values, f"seed-{seed}", _SYNTHETIC_TAP)


def trace_of(values: F64, prompt: str, tap: str) -> pl.DataFrame:
    """Return rows of the ``trace`` table for an array.

    Args:
        values: ``f64[layers, tokens, channels]``.
        prompt: its name.
        tap: its name.
    """
    from driftscope.evidence.schemas import frame_of

    rows = []
    for layer, tensor in enumerate(values):
        scopes = [("all", -1, tensor), ("all-but-first", -1, tensor[1:]), ("last", -1, tensor[-1:])]
        scopes += [("token", position, tensor[position : position + 1]) for position in range(len(tensor))]
        for scope, position, part in scopes:
            row = {"prompt": prompt, "layer": layer, "tap": tap, "scope": scope, "position": position}
            rows.append(row | _moments(part, max(position, 0)))
    return frame_of(rows, "trace")


def _moments(part: NDArray[np.float64], first_position: int) -> dict[str, Any]:
    at, channel = np.unravel_index(int(np.argmax(np.abs(part))), part.shape)
    return {
        "token_count": part.shape[0],
        "count": part.size,
        "capture_point": _SYNTHETIC_TAP,
        "path": _SYNTHETIC_TAP,
        "artifact": _SYNTHETIC_TAP,
        "activation_format": "none",
        "min": float(part.min()),
        "max": float(part.max()),
        "mean": float(part.mean()),
        "std": float(part.std(ddof=1)),
        "rms": float(np.sqrt(np.square(part).mean())),
        "nan_count": 0,
        "inf_count": 0,
        "zero_count": int((part == 0.0).sum()),
        "argmax_channel": int(channel),
        "argmax_position": first_position + int(at),
    }


def _joined(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    import polars as pl

    return pl.concat(frames)
