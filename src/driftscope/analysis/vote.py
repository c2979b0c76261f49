"""Three or more traces of the same tokens: which one is the odd one out, op by op.

The distance of two sources at an op is the energy of their difference over the mean of their energies, token
by token, averaged over the tokens: one massive token does not hide the others. A source's separation is its
distance to the nearest other one; what is usual among the others is the median of their separations without
it. A source is odd where its separation is `THRESHOLD` times what is usual or more. `FLOORS` stand in for
what is usual where the others agree better: to the rounding of float32 sums or, where a source rounds its
activations, to a few roundings that fall on the other side of a step. Sources that are equal bit for bit at
an op count as one there: two runs of one program are not a jury. With fewer than three left there is no vote.

Where no source is odd the sources are ``alike``, or ``split`` into groups that agree within and not between:
then no vote decides.

Being odd is no fault by itself: the only quantized source among float32 ones is odd, as it should be. So each
odd source comes with what it declares differently. Local errors, where replays are given, need no such care:
each source's op is measured against that source's own declaration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.engines.trace import RAGGED, Trace
from driftscope.errors import InputError
from driftscope.forward.architecture import LAYER_TAPS, WHOLE_TAPS, op_order, tap_name
from driftscope.forward.policy import WHOLE_MODEL

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

CHUNK = 1 << 21
"""Values of a tap that are looked at at once: logits of many tokens do not fit in memory several times."""

THRESHOLD = 100.0
"""Times the usual distance from which on a source is odd."""

FLOORS = {"f32": 1e-12, "rounded": 1e-6}
"""Least usual distance. ``f32``: 300 roundings, the mean square of an accumulation's error. ``rounded``: one
in some hundred 8-bit activations that is rounded the other way."""

LOCAL_DECADES = 1.0
"""Decades by which a local error must exceed the median of the others', each over its own prediction."""

STATISTIC = (
    "separation (distance to the nearest source: energy of the difference over mean energy, mean over the "
    "tokens) over the median separation of the other sources without it"
)

Place = tuple[int, str]


def topological(places: Iterable[Place]) -> list[Place]:
    """Sort layers and taps as they run; what is no tap of ours is left out."""
    known = {
        (layer, tap) for layer, tap in places if tap in (WHOLE_TAPS if layer == WHOLE_MODEL else LAYER_TAPS)
    }
    return sorted(known, key=lambda place: op_order(*place))


def vote(
    traces: Mapping[str, Trace],
    *,
    layers: Iterable[int] | None = None,
    replays: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Find the odd one out.

    Args:
        traces: three or more sources by name, over the same prompts and token ids.
        layers: only these, -1 for embedding and head; None for all.
        replays: rows of the ``replay`` table by source, for the vote on local errors.

    Returns:
        Plain values: ``sources``, ``ops`` (the matrix of distances and what it says, op by op), ``odd`` (the
        first op and the number of ops of each odd source), ``local`` (the same of local errors),
        ``conclusion``.

    Raises:
        InputError: fewer than three traces, or other tokens in one of them.
    """
    names = list(traces)
    if len(names) < 3:
        raise InputError(f"a vote needs three or more traces; got {len(names)}")
    first = traces[names[0]]
    for trace in traces.values():
        if trace.manifest.prompts != first.manifest.prompts:
            raise InputError(
                f"{trace.folder}: is not over the prompts and token ids of {first.folder}; expected the same"
            )
    everywhere = frozenset.intersection(*(trace.places for trace in traces.values()))
    somewhere = frozenset.union(*(trace.places for trace in traces.values()))
    if layers is not None:
        kept = set(layers)
        everywhere, somewhere = (
            frozenset(place for place in places if place[0] in kept) for places in (everywhere, somewhere)
        )
    floor = FLOORS["rounded" if any(_rounds(trace) for trace in traces.values()) else "f32"]
    ops = [_op(names, traces, place, floor) for place in topological(everywhere)]
    declared = [_declared(name, trace) for name, trace in traces.items()]
    odd = _first_odd(names, ops, declared)
    local = _local(names, replays) if replays else None
    return {
        "statistic": STATISTIC,
        "threshold": THRESHOLD,
        "floor": floor,
        "sources": declared,
        "prompts": len(first.manifest.prompts),
        "compared": len(ops),
        "not_in_all": len(somewhere - everywhere),
        "ops": ops,
        "odd": odd,
        "local": local,
        "conclusion": _conclusion(names, ops, odd, local),
    }


def distances(arrays: Sequence[F32]) -> F64:
    """Distance of each pair of sources, ``float64[n, n]``.

    Args:
        arrays: of each source ``float32[tokens, channels]``. Where a value is not finite in one of them it is
            left out of all.
    """
    n_tokens, channels = arrays[0].shape
    total = np.zeros((len(arrays), len(arrays)))
    step = max(1, CHUNK // max(1, channels))
    for first in range(0, n_tokens, step):
        total += _summed(np.stack([x[first : first + step] for x in arrays]).astype(np.float64))
    found: F64 = total / max(1, n_tokens)
    return found


def _summed(x: F64) -> F64:
    """Sum over some tokens of the distances of each pair; `x` is ``float64[n, tokens, channels]``."""
    x = np.where(np.isfinite(x).all(axis=0), x, 0.0)
    energies = np.square(x).sum(axis=2)
    found = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        for j in range(i):
            between = np.square(x[i] - x[j]).sum(axis=1)
            mean = (energies[i] + energies[j]) / 2
            ratio = np.divide(between, mean, out=np.zeros_like(between), where=mean > 0)
            found[i, j] = found[j, i] = ratio.sum()
    return found


def ratios(matrix: F64, floor: float) -> F64:
    """Separation of each source over what is usual among the others, ``float64[n]``, n at least 3."""
    n = matrix.shape[0]
    apart = matrix + np.diag(np.full(n, np.inf))
    found = np.empty(n)
    for i in range(n):
        rest = np.delete(np.delete(apart, i, 0), i, 1)
        found[i] = apart[i].min() / max(float(np.median(rest.min(axis=1))), floor)
    return found


def judge(matrix: F64, floor: float) -> tuple[str, list[int], list[list[int]]]:
    """Say of one op's distances whether there is an odd one out.

    Args:
        matrix: ``float64[n, n]``.
        floor: least usual distance.

    Returns:
        ``odd``, ``alike``, ``split``, ``too-few`` where only two of the sources differ, or ``equal`` where
        none does; the odd sources, fewer than half of them; groups of sources that agree where it is
        ``split``.
    """
    distinct = _groups(matrix == 0)
    if len(distinct) < 3:
        return "too-few" if len(distinct) == 2 else "equal", [], []
    first = [group[0] for group in distinct]
    cut = matrix[np.ix_(first, first)]
    odd = [i for i, ratio in enumerate(ratios(cut, floor)) if ratio >= THRESHOLD]
    if odd and 2 * len(odd) < len(distinct):
        return "odd", sorted(member for i in odd for member in distinct[i]), []
    apart = cut + np.diag(np.full(len(first), np.inf))
    reach = THRESHOLD * max(float(np.median(apart.min(axis=1))), floor)
    groups = _groups(matrix < reach)
    return ("split", [], groups) if len(groups) > 1 else ("alike", [], [])


def _groups(linked: NDArray[np.bool_]) -> list[list[int]]:
    """Sources that are linked with each other, directly or not."""
    left, groups = list(range(linked.shape[0])), []
    while left:
        group = [left.pop(0)]
        for member in group:
            near = [i for i in left if linked[member, i]]
            group += near
            left = [i for i in left if i not in near]
        groups.append(sorted(group))
    return groups


def _op(names: Sequence[str], traces: Mapping[str, Trace], place: Place, floor: float) -> dict[str, Any]:
    layer, tap = place
    arrays = [values_of(traces[name], layer, tap) for name in names]
    if len({array.shape for array in arrays}) > 1:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in zip(names, arrays, strict=True))
        raise InputError(f"{tap_name(layer, tap)} has unlike shapes: {shapes}")
    broken = [int(np.count_nonzero(~np.isfinite(array))) for array in arrays]
    matrix = distances(arrays)
    status, odd, groups = judge(matrix, floor)
    # Values that only a minority has not finite are left out of the distances, and speak for themselves.
    lost = [i for i, count in enumerate(broken) if count]
    if lost and 2 * len(lost) < len(names):
        status, odd, groups = "odd", sorted({*odd, *lost}), []
    pairs = {
        f"{names[i]}|{names[j]}": float(matrix[i, j])
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }
    return {
        "layer": layer,
        "tap": tap,
        "status": status,
        "odd": [names[i] for i in odd],
        "groups": [[names[i] for i in group] for group in groups],
        "distances": pairs,
        "ratios": {name: float(value) for name, value in zip(names, ratios(matrix, floor), strict=True)},
        "non_finite": {names[i]: broken[i] for i in lost},
    }


def values_of(trace: Trace, layer: int, tap: str) -> F32:
    """A tap of all tokens, ``float32[n_tokens, channels]``; of scores what a causal query sees."""
    if tap not in RAGGED:
        return trace.tap(layer, tap)
    rows = []
    parts = trace.ragged(layer, tap)
    widest = max(part.shape[1] for part in parts)
    for part in parts:
        length = part.shape[0]
        heads = part.reshape(length, -1, length)
        seen = np.tril(np.ones((length, length), dtype=bool))[:, None, :]
        flat = np.where(seen, heads, np.float32(0)).reshape(length, -1)
        rows.append(np.pad(flat, ((0, 0), (0, widest - flat.shape[1]))))
    return np.concatenate(rows)


def _rounds(trace: Trace) -> bool:
    """Whether a source rounds between its ops, or may: nobody says."""
    arithmetic = trace.manifest.arithmetic
    if arithmetic is None:
        return True
    policy = arithmetic.policy
    choices = [policy.base, *(item.choice for item in policy.overrides)]
    exact = all(choice.path == "f32" and choice.activation in (None, "none") for choice in choices)
    return not exact or policy.kv_type != "f32" or arithmetic.dtype != "f32"


def _declared(name: str, trace: Trace) -> dict[str, Any]:
    manifest = trace.manifest
    return {
        "name": name,
        "engine": str(manifest.engine.get("name", "unknown")),
        "model": manifest.model.get("sha256"),
        "arithmetic": None if manifest.arithmetic is None else manifest.arithmetic.to_dict(),
    }


def _first_odd(
    names: Sequence[str], ops: Sequence[Mapping[str, Any]], declared: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    found = []
    for index, name in enumerate(names):
        at = [i for i, op in enumerate(ops) if name in op["odd"]]
        if not at:
            continue
        op = ops[at[0]]
        found.append(
            {
                "source": name,
                "layer": op["layer"],
                "tap": op["tap"],
                "ratio": op["ratios"][name],
                "non_finite": op["non_finite"].get(name, 0),
                "ops": len(at),
                "share_from_there": len(at) / (len(ops) - at[0]),
                "declares_alone": _alone(declared, index),
            }
        )
    return sorted(found, key=lambda item: [(op["layer"], op["tap"]) for op in ops].index(_place(item)))


def _place(item: Mapping[str, Any]) -> Place:
    return item["layer"], item["tap"]


def _alone(declared: Sequence[Mapping[str, Any]], index: int) -> list[str]:
    """What a source declares unlike every other one; what one of them does not say tells nothing."""
    found = []
    for key in ("model", "arithmetic"):
        values = [item[key] for item in declared]
        if None not in values and values[index] not in values[:index] + values[index + 1 :]:
            found.append(key)
    return found


def _local(names: Sequence[str], replays: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Sources whose local error, over its prediction, is out of what the others have at the same op.

    Only ops that three sources were tested at; an error of zero counts as six decades below its prediction.
    """
    scores: dict[tuple[int, str, str], dict[str, float]] = {}
    for name in names:
        for row in replays.get(name, ()):
            if row["component"] == "engine":
                score = -6.0 if row["score"] is None else max(float(row["score"]), -6.0)
                at = scores.setdefault((row["layer"], row["tap"], row["part"]), {})
                at[name] = max(at.get(name, -np.inf), score)
    places = topological((layer, tap) for layer, tap, _ in scores)
    keys = sorted(scores, key=lambda key: (places.index(key[:2]), key[2]))
    found: dict[str, dict[str, Any]] = {}
    for key in keys:
        at = scores[key]
        for name, score in at.items():
            usual = float(np.median([value for other, value in at.items() if other != name]))
            if len(at) >= 3 and score >= max(usual, 0.0) + LOCAL_DECADES:
                entry = found.setdefault(
                    name,
                    {
                        "source": name,
                        "layer": key[0],
                        "tap": key[1],
                        "part": key[2],
                        "score": score,
                        "usual": usual,
                        "ops": 0,
                    },
                )
                entry["ops"] += 1
    return list(found.values())


def _conclusion(
    names: Sequence[str],
    ops: Sequence[Mapping[str, Any]],
    odd: Sequence[Mapping[str, Any]],
    local: Sequence[Mapping[str, Any]] | None,
) -> str:
    if not ops:
        return "no tap is in all traces: nothing was voted on"
    parts = []
    for item in odd:
        how = (
            f"{item['non_finite']} values are not finite"
            if item["non_finite"]
            else f"{item['ratio']:.3g} times as far from the nearest as is usual among the others"
        )
        after = round(item["ops"] / item["share_from_there"])
        where = f"from {tap_name(*_place(item))} on ({how}; at {item['ops']} of the {after} ops from there)"
        if item["declares_alone"]:
            alone = " and ".join(item["declares_alone"])
            parts.append(f"{item['source']} is apart {where}; it alone declares its {alone}")
        else:
            parts.append(f"{item['source']} is the odd one out {where}")
    if not odd:
        split = next((op for op in ops if op["status"] == "split"), None)
        if split:
            groups = " and ".join("{" + ", ".join(group) + "}" for group in split["groups"])
            parts.append(
                f"undecided: from {tap_name(*_place(split))} on the sources fall into {groups}, none alone"
            )
        elif alike := sum(op["status"] == "alike" for op in ops):
            rest = "" if alike == len(ops) else f"; at the other {len(ops) - alike} fewer than three differ"
            parts.append(f"no odd one out: the sources differ alike at {alike} of {len(ops)} ops{rest}")
        else:
            parts.append("no vote: fewer than three of the sources differ from each other at all")
    for item in local or ():
        where = tap_name(item["layer"], item["tap"]) + (f".{item['part']}" if item["part"] else "")
        parts.append(
            f"{item['source']} alone does not compute {where} as it declares "
            f"({item['score'] - item['usual']:.1f} decades above the others' local error)"
        )
    return "; ".join(parts)
