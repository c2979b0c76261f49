"""The ``divergence.local`` section: every op recomputed from its own trace's inputs, path by path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from driftscope.errors import InputError
from driftscope.report.evidence import Document, not_run, plain
from driftscope.report.topology import tap_order

COMPONENTS = ("engine", "arithmetic", "model")
"""The parts of a local error, which add up to its total."""

AT_FAULT = ("engine", "model")
"""Parts that a flag makes a fault of; the price of a declared arithmetic is none."""

CAPTURE_POINT = "capture-point"
FLAGS_LISTED = 24

FAULTS = {
    "row-permutation": "rows of a weight in another order",
    "row-permutation-heads": "rows of a weight ordered for another number of heads",
    "rope-pairing": "rotary embedding turns other pairs of channels",
    "norm-offset": "norm weight off by a constant",
    "bias-dropped": "bias left out",
    "head-tie": "output head tied or untied wrongly",
    "missing-tensor": "tensor missing",
    "gate-up-swapped": "gate and up swapped",
    "transposed": "weight transposed",
    "layer-skipped": "layer not run",
    "norm-eps": "another epsilon in the norm",
    "scale-dropped": "scale left out",
    "zero-point": "zero point off",
    "rope-factors": "RoPE frequency factors not applied",
    "rope-precision": "RoPE angles of too little precision",
    "rope-theta": "another RoPE base",
    "head-mapping": "query heads read the wrong key and value heads",
    "soft-cap": "soft cap missing or other",
    "window": "sliding window of another width",
    "capture-point": "captured at another point",
    "score-precision": "attention scores of too little precision",
    "score-scale": "attention scores scaled otherwise",
    "activation-function": "another activation function",
    "output-scale": "output scaled otherwise",
    "f16-overflow": "overflow of f16",
    "row-count": "wrong at some numbers of rows only",
    "position-shift": "positions shifted",
    "causal-mask": "causal mask off",
    "swiglu-shift": "factors of the product shifted against each other",
    "residual": "residual added twice or not at all",
    "other-layer": "weights of another layer",
    "other-tensor": "weights of another tensor of the layer",
    "transform": "weight stored under a transform that is not undone",
    "non-finite": "values that are not finite",
    "corrupt-block": "corrupt block of a weight",
    "unexplained": "no known fault explains it",
}
"""What each class of fault is, in words."""

_OWN = (".f32", ".int8-dot")


def local_section(document: Document | None, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the ``divergence.local`` section, or ``not-run`` where no replay was run.

    Args:
        document: ``replay.json``; None where it is absent.
        pairs: the pairs of ``divergence``, to name the propagated error of each path.

    Returns:
        ``status`` (`done` where a path was replayed, else `inadmissible` or `not-run` with a ``reason``),
        ``floors``, ``paths`` (each with its own status), ``main`` (the path that is drawn), ``fault`` (the
        first divergence that is a fault of an engine or of the weights, or None), ``vote`` and ``guess``.

    Raises:
        InputError: the document has not the form of a replay's.
    """
    if not document:
        return not_run("the replay, which recomputes every op from its own trace's inputs, is not there")
    fields = plain(document)
    compared = [pair["pair"] for pair in pairs]
    paths = [_path(item, compared) for item in _objects(fields.get("paths"), "paths")]
    done = [path for path in paths if path["status"] == "done"]
    fault = _fault(done)
    section: dict[str, Any] = {"status": "done" if done else _status_of(paths)}
    if not done:
        section["reason"] = _why_none(paths)
    return {
        **section,
        "statistic": "median over prompts of NMSE = sum (y - y')^2 / sum y'^2, from the trace's own inputs",
        "floors": _section(fields.get("floors")),
        "tested": sum(path["tested"] for path in done),
        "flagged": sum(path["flagged_ops"] for path in done),
        "main": _main(done, fault, fields.get("main")),
        "fault": fault,
        "paths": paths,
        "vote": _vote(fields.get("vote")),
        "guess": _guess(fields.get("guess")),
    }


def is_clean(path: Mapping[str, Any]) -> bool:
    """Say whether a replayed path has every op at its floor, capture points apart."""
    return path["status"] == "done" and path["fault"] is None


def _path(item: Mapping[str, Any], compared: Sequence[str]) -> dict[str, Any]:
    name, status = str(_needed(item, "path")), str(_needed(item, "status"))
    fields: dict[str, Any] = {
        "path": name,
        "engine": _engine(item.get("engine")),
        "own": item.get("own"),
        "reference": item.get("reference"),
        "arithmetic": _arithmetic(item.get("arithmetic")),
        "status": status,
    }
    for key in ("reason", "install"):
        if item.get(key):
            fields[key] = str(item[key])
    if status == "done" and not item.get("tested"):
        fields |= {"status": "not-run", "reason": "no op was tested"}
    if fields["status"] != "done":
        fields.setdefault("reason", "no reason given")
        return fields
    flags = [_flag(flag) for flag in _objects(item.get("flagged"), f"{name}: flagged")]
    flags.sort(key=lambda flag: (tap_order(flag["layer"], flag["tap"]), flag["part"], flag["component"]))
    first = _first(item["first"]) if item.get("first") else None
    points = _objects(item.get("capture_points"), f"{name}: capture_points")
    return {
        **fields,
        "tested": int(item["tested"]),
        "prompts": int(item.get("prompts") or 0),
        "flagged_ops": len({(flag["layer"], flag["tap"], flag["part"], flag["component"]) for flag in flags}),
        "flagged": _each_once(flags)[:FLAGS_LISTED],
        "first": first,
        "fault": _fault_of(first, flags, bool(points)),
        "capture_points": [
            {
                **_place(point),
                "layers": [int(layer) for layer in point.get("layers") or [point["layer"]]],
                "declared": point.get("declared"),
                "found": point.get("found"),
                "statement": str(point.get("statement") or ""),
            }
            for point in points
        ],
        "fits_better": _better(_section(item.get("fits_better"))),
        "pair": next(
            (pair for pair in sorted(compared, key=_by_reference) if pair.endswith(f"|{name}")), None
        ),
        "map": _map(_objects(item.get("map"), f"{name}: map")),
    }


def _better(guess: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what explains a path better that is flagged at most of its matmuls, else None."""
    if guess is None:
        return None
    arithmetic, statement = _arithmetic(guess.get("arithmetic")), str(guess.get("statement") or "")
    return {"arithmetic": arithmetic, "statement": statement}


def _engine(engine: Any) -> str | None:
    """Return an engine as its name and version, or the versions of its packages."""
    if not isinstance(engine, Mapping):
        return None if engine is None else str(engine)
    name, version = str(engine.get("name") or "unknown"), engine.get("version")
    if not isinstance(version, Mapping):
        return f"{name} {version}" if version else name
    # Build flags stand in the trace's manifest; they would fill the page.
    packages = [f"{key} {value}" for key, value in version.items() if len(str(value)) <= 24]
    return f"{name} ({', '.join(packages)})" if packages else name


def _arithmetic(arithmetic: Any) -> str | None:
    """Return a declared arithmetic in words: its path, and what is rounded besides."""
    if not isinstance(arithmetic, Mapping):
        return None if arithmetic is None else str(arithmetic)
    said = [str(arithmetic.get("path") or "f32")]
    if arithmetic.get("activation"):
        said.append(f"activations {arithmetic['activation']}")
    if arithmetic.get("kv_type", "f32") != "f32":
        said.append(f"keys and values {arithmetic['kv_type']}")
    if arithmetic.get("dtype", "f32") != "f32":
        said.append(f"every output {arithmetic['dtype']}")
    return ", ".join(said)


def _fault_of(
    first: dict[str, Any] | None, flags: Sequence[dict[str, Any]], points: bool
) -> dict[str, Any] | None:
    """Return the first divergence where it is a fault: no capture point, and not what an arithmetic costs."""
    if first and first["component"] in AT_FAULT and first["class"] != CAPTURE_POINT:
        return first
    if first or points:
        return None
    flag = next((flag for flag in flags if flag["component"] in AT_FAULT), None)
    return flag and _first(flag)


def _by_reference(pair: str) -> tuple[bool, str]:
    return (not pair.startswith("teacher."), pair)


def _map(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one cell a layer and tap, in topological order; of the parts of a tap the worst."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for cell in cells:
        layer, tap = int(_needed(cell, "layer")), str(_needed(cell, "tap"))
        kept = found.setdefault((layer, tap), {"layer": layer, "tap": tap})
        for name in (*COMPONENTS, "total", "predicted"):
            values = [value for value in (kept.get(name), cell.get(name)) if value is not None]
            kept[name] = max(values) if values else None
    return [found[place] for place in sorted(found, key=lambda place: tap_order(*place))]


def _flag(flag: Mapping[str, Any]) -> dict[str, Any]:
    measured = {key: flag.get(key) for key in ("p_value", "nmse", "predicted_nmse", "prompt")}
    return {**_place(flag), "component": str(_needed(flag, "component")), **measured}


def _each_once(flags: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep of the prompts of an op and component the one of the smallest tail probability."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for flag in flags:
        key = (flag["layer"], flag["tap"], flag["part"], flag["component"])
        if key not in kept or (flag["p_value"] or 0.0) < (kept[key]["p_value"] or 0.0):
            kept[key] = flag
    return list(kept.values())


def _first(first: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_flag(first),
        "class": str(first.get("class") or "unexplained"),
        "statement": str(first.get("statement") or ""),
        "evidence": dict(first.get("evidence") or {}),
    }


def _place(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "layer": int(_needed(item, "layer")),
        "tap": str(_needed(item, "tap")),
        "part": str(item.get("part") or ""),
    }


def _fault(done: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the first fault of all paths: the candidate's before the teacher's, in topological order."""
    found = [(path, fault) for path in done if (fault := path["fault"])]
    if not found:
        return None
    path, fault = min(found, key=lambda pair: (_of_teacher(pair[0]["path"]), *_order(pair[1])))
    same = [
        other["path"]
        for other, there in found
        if all(there[key] == fault[key] for key in ("layer", "tap", "part", "component"))
    ]
    elsewhere = [
        {
            "path": other["path"],
            **{key: there[key] for key in ("layer", "tap", "part", "component", "class")},
        }
        for other, there in found
        if other["path"] not in same
    ]
    whose = {key: path[key] for key in ("path", "engine", "own", "fits_better")}
    return {**whose, **fault, "paths": same, "elsewhere": elsewhere}


def _order(place: Mapping[str, Any]) -> tuple[Any, ...]:
    return (tap_order(place["layer"], place["tap"]), place["part"], place["component"])


def _main(done: Sequence[Mapping[str, Any]], fault: Mapping[str, Any] | None, asked: Any) -> str | None:
    """Name the path to draw: the one at fault, else what is asked for, else an engine on the candidate."""
    drawable = [path for path in done if path["map"]]
    if fault and any(path["path"] == fault["path"] for path in drawable):
        return str(fault["path"])
    if any(path["path"] == asked for path in drawable):
        return str(asked)

    def rank(path: Mapping[str, Any]) -> tuple[Any, ...]:
        name = path["path"]
        return (_of_teacher(name), path["pair"] is None, name.endswith(_OWN), not name.endswith(_OWN[1]))

    return min(drawable, key=rank)["path"] if drawable else None


def _of_teacher(path: str) -> bool:
    return path.startswith("teacher.")


def _vote(vote: Any) -> dict[str, Any]:
    """Return who of three or more sources stands alone, and from where on; without the distances."""
    section = _section(vote)
    if section is None:
        return not_run("three or more sources of one artifact were not compared")
    if section.get("status", "done") != "done":
        return {"status": section["status"], "reason": section.get("reason") or "no reason given"}
    ops = _objects(section.get("ops"), "vote: ops")
    counts = Counter(str(op.get("status")) for op in ops)
    found: dict[str, Any] = {"status": "done", "counts": {name: counts[name] for name in sorted(counts)}}
    found |= {key: section.get(key) for key in ("statistic", "threshold", "compared", "conclusion")}
    found["sources"] = [
        str(source.get("name")) if isinstance(source, Mapping) else str(source)
        for source in section.get("sources") or []
    ]
    for key in ("odd", "local"):
        items = [{**item, **_place(item)} for item in _objects(section.get(key), f"vote: {key}")]
        found[key] = sorted(items, key=lambda item: (tap_order(item["layer"], item["tap"]), item["part"]))
    return found


def _guess(guess: Any) -> dict[str, Any]:
    """Return which arithmetic explains the trace of each engine that is not ours best."""
    items = _objects(guess, "guess")
    if not items:
        return not_run("there is no trace of an engine that is not ours")
    paths = []
    for item in items:
        entry: dict[str, Any] = {
            "path": str(_needed(item, "path")),
            "statement": str(item.get("statement") or ""),
        }
        for key in ("products", "accumulation", "kv_type"):
            entry[key] = _answer(_section(item.get(key)) or {})
        entry["arithmetic"] = _arithmetic(item.get("arithmetic"))
        paths.append(entry)
    return {"status": "done", "paths": paths}


def _answer(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what explains a trace best, what it leaves, and its lead over the next in decades."""
    winner = str(answer.get("winner") or "")
    return {
        "status": str(answer.get("status") or "not-tested"),
        "winner": winner,
        "residual": (answer.get("residuals") or {}).get(winner),
        "margin": answer.get("margin"),
    }


def _status_of(paths: Sequence[Mapping[str, Any]]) -> str:
    return "inadmissible" if any(path["status"] == "inadmissible" for path in paths) else "not-run"


def _why_none(paths: Sequence[Mapping[str, Any]]) -> str:
    said = "; ".join(f"{path['path']}: {path['reason']}" for path in paths)
    return f"no path was replayed ({said})" if said else "no path was replayed"


def _section(value: Any) -> dict[str, Any] | None:
    if not value:
        return None
    if not isinstance(value, Mapping):
        raise InputError(f"replay.json: a part is a {type(value).__name__}, expected an object")
    return dict(value)


def _objects(value: Any, where: str) -> list[Mapping[str, Any]]:
    items = [] if value is None else value
    if not isinstance(items, Sequence) or not all(isinstance(item, Mapping) for item in items):
        raise InputError(f"replay.json: {where}: expected a list of objects")
    return list(items)


def _needed(item: Mapping[str, Any], key: str) -> Any:
    if item.get(key) is None:
        raise InputError(f"replay.json: an entry without `{key}`: {str(dict(item))[:120]}")
    return item[key]
