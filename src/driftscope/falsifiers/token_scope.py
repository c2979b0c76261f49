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
STAGES = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swiglu", "ffn_out")
"""Taps of a feed-forward in the order in which they run."""
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
            whose figures are shown beside it; `prompt`, whose pass is shown layer by layer (the first one
            where it is not there); `resamples`, `confidence`; `published`, the published tables (see
            `_published`).
        regimes: name to `least_tokens` and `most_tokens` of the prompts in it.
        seeds: of the synthetic passes of the controls and the domain.
        evidence: the trace.

    Returns:
        In each regime, of `tap`: `largest`, the largest over layers of the std over all tokens over that
        over the last, `typical`, the median over layers, `largest_without_first` with the first token left
        out of the numerator (each a factor of at least 1, whichever of the two is larger; geometric means
        over prompts, bootstrap over prompts and layers), `cause`, the layer, token and channel of the
        largest, `first_token_share`, the first token's part of that layer's energy (mean over prompts,
        bootstrap over prompts), and `layers`, the ratio of each layer as it is with its cause. `pass` is one
        pass by itself, layer by layer; `refusal` says whether the ratio across scopes is refused by the type
        that carries statistics.
    """
    name = inputs(parameters)[0]
    if not evidence.has(name):
        return {"status": "not-run", "reason": f"{name} is not there: the path was not traced"}
    resampling = Resampling.of(parameters)
    tap = parameter(parameters, "tap", str)
    taps = [tap, *(other for other in parameters.get("taps", []) if other != tap)]
    whole = evidence.table(name, "trace")
    trace = _of_taps(whole, taps)
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
        "pass": one_pass(whole, tap, parameter(parameters, "prompt", str)),
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
        "first_token_share": _first_token_share(rows, layers[largest], resampling),
        "layers": [
            {
                "layer": layer,
                "all_over_last": rounded(mean[i, 0]),
                "without_first": rounded(mean[i, 1]),
                "cause": _cause(rows, layer),
            }
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
    value = row["max"] if abs(row["max"]) >= abs(row["min"]) else row["min"]
    energy = row["rms"] ** 2 * row["count"]
    share = None
    if single.height == 1 and energy:
        token = single.row(0, named=True)
        share = rounded(token["rms"] ** 2 * token["count"] / energy)
    return {
        "layer": layer,
        "prompt": row["prompt"],
        "position": position,
        "channel": row["argmax_channel"],
        "value": rounded(value),
        "energy_share": share,
        "value_share": rounded(value**2 / energy) if energy else None,
    }


def _first_token_share(rows: pl.DataFrame, layer: int, resampling: Resampling) -> dict[str, float] | None:
    """Return the first token's part of a layer's energy, mean over prompts; None where it is not traced."""
    part = rows.filter(rows["layer"] == layer)
    whole = {
        row["prompt"]: row["rms"] ** 2 * row["count"]
        for row in part.filter(part["scope"] == "all").iter_rows(named=True)
    }
    first = part.filter((part["scope"] == "token") & (part["position"] == 0)).sort("prompt")
    shares = [
        row["rms"] ** 2 * row["count"] / whole[row["prompt"]]
        for row in first.iter_rows(named=True)
        if whole.get(row["prompt"])
    ]
    return with_interval(_mean, np.array(shares), resampling) if shares else None


def _mean(sample: F64) -> F64:
    mean: F64 = sample.mean(axis=1)
    return mean


def one_pass(trace: pl.DataFrame, tap: str, prompt: str) -> dict[str, Any]:
    """Show one pass of one path by itself: both stds of every layer, and what causes the larger one.

    Args:
        trace: rows of the ``trace`` table of one path.
        tap: op output.
        prompt: name of the prompt; the first by name where the trace has none of that name.

    Returns:
        `prompt`, `tokens`; `layers`, for each layer `all`, `last`, their ratio, and the `cause`; `largest`,
        the layer that departs most; `stages`, the std over all tokens of each stage of that layer's
        feed-forward and of the layer's before it.
    """
    names = sorted(set(trace["prompt"].to_list()))
    chosen = prompt if prompt in names else next(iter(names), "")
    part = trace.filter((trace["prompt"] == chosen) & (trace["layer"] >= 0))
    rows = part.filter(part["tap"] == tap)
    std = {
        (row["layer"], row["scope"]): row["std"]
        for row in rows.filter(rows["scope"].is_in(["all", "last"])).iter_rows(named=True)
    }
    layers = []
    for layer in sorted({layer for layer, _ in std}):
        pair = std.get((layer, "all")), std.get((layer, "last"))
        if all(value is not None and np.isfinite(value) and value > 0.0 for value in pair):
            both = float(pair[0]), float(pair[1])  # type: ignore[arg-type]
            layers.append(
                {
                    "layer": layer,
                    "all": rounded(both[0]),
                    "last": rounded(both[1]),
                    "all_over_last": rounded(both[0] / both[1]),
                    "cause": _cause(rows, layer),
                }
            )
    shown: dict[str, Any] = {"prompt": chosen, "layers": layers}
    if layers:
        largest = max(layers, key=lambda row: abs(np.log(row["all_over_last"])))
        shown |= {"tokens": rows["token_count"].max(), "largest": largest}
        shown["stages"] = _stages(part, largest["layer"])
    return shown


def _stages(part: pl.DataFrame, layer: int) -> list[dict[str, Any]]:
    """Where in the feed-forward a layer parts from the one before it, in std over all tokens."""
    rows = part.filter((part["scope"] == "all") & part["layer"].is_in([layer - 1, layer]))
    std = {(row["tap"], row["layer"]): row["std"] for row in rows.iter_rows(named=True)}
    found = []
    for stage in STAGES:
        here, before = std.get((stage, layer)), std.get((stage, layer - 1))
        if here and before:
            found.append(
                {
                    "stage": stage,
                    "std": rounded(here),
                    "before": rounded(before),
                    "over": rounded(here / before),
                }
            )
    return found


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

    `published` of the parameters holds `layer`, `channels`, `token_ids`, the std of ``ffn_swiglu`` by layer
    (`all_tokens_a`, `last_token_a`, `last_token_b`), `like_for_like_before`, the printed ratio before the
    fix, and `stages_a`, the std over all tokens of one side's stages by layer.
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
        before = float(given["like_for_like_before"])
        stages = {
            int(at): {str(stage): float(value) for stage, value in values.items()}
            for at, values in given["stages_a"].items()
        }
        over = {stage: stages[layer][stage] / stages[layer - 1][stage] for stage in stages[layer]}
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
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
        "like_for_like_before": before,
        "same_side_quotient": rounded(headline[0] / headline[1]),
        "same_side_refused": _ratio(
            statistic(headline[0], "all", layer, "apr"), statistic(headline[1], "last", layer, "apr")
        )["refused"],
        "by_layer": [
            {
                "layer": at,
                "ratio": ratio,
                "scope_quotient": rounded(all_a[at] / last_a[at]) if at in all_a else None,
            }
            for at, ratio in ratios.items()
        ],
        "stages": [
            {"stage": stage, "std": stages[layer][stage], "before": stages[layer - 1][stage]}
            | {"over": rounded(factor)}
            for stage, factor in over.items()
        ],
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
