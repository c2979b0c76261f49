"""Traces of the same tokens side by side, without their models: what may be compared, and where they part.

What is compared here is propagated: each engine computes from its own values. Where the error is made is
asked of a replay (`driftscope.analysis.diagnosis`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.admissibility import Place, Population, TraceMetadata, admissibility
from driftscope.analysis.divergence import TokenSums, pooled, token_sums
from driftscope.analysis.identities import check_identities
from driftscope.analysis.vote import CHUNK, topological, values_of, vote
from driftscope.artifacts.model import ModelConfig
from driftscope.engines.trace import Trace
from driftscope.errors import InputError
from driftscope.forward.architecture import embedding_op, head_ops, layer_ops, tap_name

F32 = NDArray[np.float32]


def compare_traces(
    traces: Mapping[str, Trace],
    *,
    layers: Iterable[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compare two or more traces, each with the first.

    Args:
        traces: by name; the first is the reference.
        layers: only these, -1 for embedding, final norm and head; None for all.
        progress: called with the taps compared and their number.

    Returns:
        Plain values: ``admissibility``, ``left_out`` (taps that are not compared, and why), ``identities``
        (those inside of a trace that do not hold), ``pairs`` (for each other trace its ``taps`` in
        topological order and ``first``, the first that differs), ``vote`` of three or more traces, else None.
    """
    names, kept = list(traces), None if layers is None else set(layers)
    reference = traces[names[0]]
    same_tokens = all(trace.manifest.prompts == reference.manifest.prompts for trace in traces.values())
    places = _common(traces, kept) if same_tokens else []
    left_out = _left_out(traces, kept) if same_tokens else []
    pairs = {name: _pair_header(names[0], name) for name in names[1:]}
    statistics: dict[str, dict[Place, Population]] = {name: {} for name in names}
    for index, place in enumerate(places):
        try:
            arrays = {name: values_of(trace, *place) for name, trace in traces.items()}
        except InputError as error:
            left_out.append({"tap": tap_name(*place), "reason": str(error)})
            continue
        for name, trace in traces.items():
            statistics[name].update(_populations(trace, place, arrays[name]))
        first = arrays[names[0]]
        for name in names[1:]:
            if arrays[name].shape == first.shape:
                sums = _token_sums(first, arrays[name])
                pairs[name]["taps"].append(_figures(place, sums, reference))
        progress(index + 1, len(places))
    judged = admissibility(
        [TraceMetadata(name, traces[name].manifest.token_digests, statistics[name]) for name in names]
    )
    admissible = judged["admissible"]
    for pair in pairs.values():
        pair["taps"] = pair["taps"] if admissible else []
        pair["first"] = next((tap for tap in pair["taps"] if tap["differs"]), None)
    return {
        "traces": [_about(name, trace) for name, trace in traces.items()],
        "admissibility": judged,
        "left_out": left_out,
        "identities": [
            {"trace": name, **found}
            for name, trace in traces.items()
            if admissible
            for found in broken_identities(trace, kept)
        ],
        "pairs": list(pairs.values()),
        "vote": vote(traces, layers=layers) if admissible and len(traces) > 2 else None,
    }


def broken_identities(trace: Trace, layers: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """Identities inside of one trace that do not hold, layers put together.

    They need no weights (`driftscope.analysis.identities`). One that fails says that a tap was captured at
    another point than is said, or that the engine does another operation.

    Returns:
        ``tap``, ``identity``, ``layers``, and of the worst of them ``nmse``, ``tolerance`` and ``reading``.
    """
    found: dict[str, dict[str, Any]] = {}
    for check in check_identities(trace, layers):
        if check["holds"]:
            continue
        entry = found.setdefault(check["identity"], {**check, "layers": []})
        entry["layers"].append(check["layer"])
        if check["nmse"] > entry["nmse"]:
            entry.update({key: check[key] for key in ("nmse", "tolerance", "reading")})
    for entry in found.values():
        del entry["layer"], entry["holds"]
    return list(found.values())


def standard_point(tap: str, text: str | None) -> bool:
    """Whether a capture point is that of `driftscope.forward.architecture`, in one of its wordings."""
    if text is None:
        return True
    return any(
        text == known or (tap == "attn_softmax" and text.startswith(known)) for known in _points()[tap]
    )


def _common(traces: Mapping[str, Trace], layers: set[int] | None) -> list[tuple[int, str]]:
    """Taps that all traces have at the same capture point."""
    everywhere = frozenset.intersection(*(trace.places for trace in traces.values()))
    return [
        (layer, tap)
        for layer, tap in topological(everywhere)
        if (layers is None or layer in layers) and len(_points_of(traces, tap)) == 1
    ]


def _left_out(traces: Mapping[str, Trace], layers: set[int] | None) -> list[dict[str, str]]:
    """Taps that at least one trace has and that are not compared, with the reason; layers put together."""
    somewhere = frozenset.union(*(trace.places for trace in traces.values()))
    reasons: dict[tuple[str, str], int] = {}
    for layer, tap in topological(somewhere):
        if layers is not None and layer not in layers:
            continue
        lacking = [name for name, trace in traces.items() if not trace.has(layer, tap)]
        if lacking:
            why = "; ".join(
                f"{name} has none" + (f": {text}" if (text := traces[name].manifest.absent.get(tap)) else "")
                for name in lacking
            )
        elif len(points := _points_of(traces, tap)) > 1:
            why = f"captured at different points: {'; '.join(points)}"
        else:
            continue
        reasons[tap, why] = reasons.get((tap, why), 0) + 1
    return [{"tap": tap, "reason": why} for tap, why in reasons]


def _points_of(traces: Mapping[str, Trace], tap: str) -> list[str]:
    """The capture points that the traces say for a tap."""
    found = (_point(trace, tap) for trace in traces.values())
    return list(dict.fromkeys(found))


def _point(trace: Trace, tap: str) -> str:
    text = trace.manifest.capture_points.get(tap)
    return "standard" if text is None or standard_point(tap, text) else text


@cache
def _points() -> dict[str, frozenset[str]]:
    """Every wording of the standard capture points."""
    sizes: dict[str, Any] = dict.fromkeys(
        ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"), 1
    )
    sizes |= dict.fromkeys(("intermediate_size", "vocab_size", "context_length"), 1)
    plain = ModelConfig("llama", **sizes, rms_norm_eps=1e-5, rope_theta=1e4)
    found: dict[str, set[str]] = {}
    for switch in range(16):
        config = replace(
            plain,
            attention_bias=bool(switch & 1),
            qk_norm=bool(switch & 2),
            tie_word_embeddings=bool(switch & 4),
            rope_scaling={"rope_type": "yarn"} if switch & 8 else None,
        )
        for op in (embedding_op(config), *layer_ops(config), *head_ops(config)):
            found.setdefault(op.tap, set()).add(op.capture_point)
    return {tap: frozenset(texts) for tap, texts in found.items()}


def _token_sums(a: F32, b: F32) -> TokenSums:
    """`token_sums`, some tokens at a time."""
    step = max(1, CHUNK // max(1, a.shape[1]))
    parts = [token_sums(a[i : i + step], b[i : i + step]) for i in range(0, a.shape[0], step)]
    names = [item.name for item in fields(TokenSums) if item.name != "channels"]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return TokenSums(**joined, channels=a.shape[1])


def _populations(trace: Trace, place: tuple[int, str], array: F32) -> dict[Place, Population]:
    """What a tap is over in each prompt: all tokens."""
    layer, tap = place
    found: dict[Place, Population] = {}
    for (prompt, ids), tokens in zip(trace.manifest.prompts, trace.batch.slices, strict=True):
        found[prompt, layer, tap, "all", -1] = Population(len(ids), array[tokens].size, _point(trace, tap))
    return found


def _about(name: str, trace: Trace) -> dict[str, Any]:
    manifest = trace.manifest
    return {
        "name": name,
        "folder": str(trace.folder),
        "engine": dict(manifest.engine),
        "model": dict(manifest.model),
        "arithmetic": None if manifest.arithmetic is None else manifest.arithmetic.to_dict(),
        "prompts": len(manifest.prompts),
        "tokens": trace.batch.n_tokens,
    }


def _pair_header(a: str, b: str) -> dict[str, Any]:
    return {"a": a, "b": b, "taps": [], "first": None}


def _figures(place: tuple[int, str], sums: TokenSums, trace: Trace) -> dict[str, Any]:
    """One tap of a pair: all tokens, and without the first token of each prompt where there are others."""
    starts = np.array(trace.batch.starts)
    rest = np.setdiff1d(np.arange(trace.batch.n_tokens), starts)
    every = pooled(sums, slice(0, trace.batch.n_tokens))
    count = every["count"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = sums.dd / sums.aa
    usable = np.isfinite(ratio)
    worst = int(np.argmax(np.where(usable, ratio, -1.0))) if usable.any() else None
    sequence = None if worst is None else int(np.searchsorted(starts, worst, side="right")) - 1
    aa, dd = float(sums.aa[rest].sum()), float(sums.dd[rest].sum())
    return {
        "layer": place[0],
        "tap": place[1],
        "nmse": every["nmse"],
        "nmse_all_but_first": dd / aa if aa > 0 else None,
        "cosine_similarity": every["cosine_similarity"],
        "max_abs_diff": every["max_abs_diff"],
        "not_finite": count - every["compared_count"],
        "worst": None
        if worst is None or sequence is None
        else {
            "prompt": trace.manifest.prompts[sequence][0],
            "position": worst - int(starts[sequence]),
            "nmse": float(ratio[worst]),
        },
        "differs": bool(every["max_abs_diff"]) or every["compared_count"] < count,
    }
