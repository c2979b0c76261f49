"""Replay: the local error of every op of a path, the floors it is judged by, and where it starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from driftscope.evidence.digest import sha256_file
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.manifest import open_model
from driftscope.evidence.store import read_json, read_table, write_json, write_table
from driftscope.stages.trace import chunk_layers

Progress = Callable[[int, int], None]


def floors(out: Path, progress: Progress) -> None:
    """Calibrate the floors on clean runs."""
    from driftscope.analysis.calibration import calibrate

    document = calibrate(progress=progress).to_dict()
    write_json(document, out, EvidenceHeader.of("floors", {}, {}))


def chunk(
    path: str, trace: Path, own: Path, teacher: Path, index: int, count: int, out: Path, *, threads: int
) -> None:
    """Replay one chunk of layers; the last one has the embedding and the head too.

    Args:
        path: what the trace is of, ``<role>.<arithmetic or engine>``.
        trace: its ``trace.json``.
        own: manifest of the artifact that it ran on.
        teacher: manifest of the artifact that holds the truth.
        index: this chunk.
        count: chunks in all.
        out: the ``replay`` table of the chunk.
        threads: the result does not depend on it.
    """
    from driftscope.analysis.diagnosis import replayer_of
    from driftscope.engines.trace import Trace
    from driftscope.evidence.schemas import frame_of
    from driftscope.forward.policy import WHOLE_MODEL

    artifact, digest = open_model(own)
    reference, reference_digest = open_model(teacher)
    layers = list(chunk_layers(index, count, artifact.config.num_layers))
    if index == count - 1:
        layers.append(WHOLE_MODEL)
    replayer = replayer_of(Trace(trace.parent), artifact, reference, threads=threads)
    rows = replayer.rows(layers, path=path)
    inputs = {"own": digest, "teacher": reference_digest, "trace": sha256_file(trace)}
    header = EvidenceHeader.of("replay", inputs, {"path": path, "chunk": [index, count]})
    write_table(frame_of(rows, "replay"), out, "replay", header)


def diagnose(
    path: str,
    chunks: Sequence[Path],
    trace: Path,
    own: Path,
    teacher: Path,
    floors_file: Path,
    false_alarm: float,
    table: Path,
    out: Path,
    *,
    threads: int,
) -> None:
    """Judge the local errors of one path, and explain the first op that stands out.

    Args:
        path: as in `chunk`.
        chunks: tables of its chunks, joined into `table`.
        trace: its ``trace.json``.
        own: manifest of the artifact that it ran on.
        teacher: manifest of the artifact that holds the truth.
        floors_file: the calibrated floors.
        false_alarm: chance that a clean trace has any op flagged.
        table: the path's ``replay`` table.
        out: the path's entry of ``replay.json``.
        threads: the result does not depend on it.
    """
    import polars as pl

    from driftscope.analysis.diagnosis import diagnose as judge
    from driftscope.analysis.floors import Floors
    from driftscope.engines.trace import Trace

    frame = pl.concat([read_table(file, "replay") for file in chunks])
    inputs = {file.name: sha256_file(file) for file in chunks}
    write_table(frame, table, "replay", EvidenceHeader.of("replay", inputs, {"path": path}))
    artifact, digest = open_model(own)
    reference, reference_digest = open_model(teacher)
    document = judge(
        Trace(trace.parent),
        artifact,
        reference,
        floors=Floors.from_dict(_plain(floors_file), str(floors_file)),
        threads=threads,
        path=path,
        alpha=false_alarm,
        rows=frame.to_dicts(),
    )
    inputs = {
        "own": digest,
        "teacher": reference_digest,
        "table": sha256_file(table),
        "floors": sha256_file(floors_file),
    }
    write_json(document, out, EvidenceHeader.of("replay", inputs, {"path": path, "alpha": false_alarm}))


def join(
    documents: Sequence[Path],
    traces: Sequence[tuple[str, Path]],
    models: Mapping[str, Path],
    floors_file: Path,
    not_run: str,
    out: Path,
    *,
    threads: int,
) -> None:
    """Put the paths together; let those of the candidate vote, and guess what an engine computes in.

    Args:
        documents: the entry of each path.
        traces: path and ``trace.json``.
        models: manifest of ``teacher`` and ``candidate``.
        floors_file: the calibrated floors.
        not_run: JSON list of the engines that were asked for and not traced: path, engine, reason, install.
        out: ``replay.json``.
        threads: the result does not depend on it.
    """
    entries = [_plain(file) for file in documents]
    absent = [{**item, "status": "not-run"} for item in json.loads(not_run)]
    calibration = _plain(floors_file)["calibration"]
    document = {
        "floors": {"alpha": entries[0]["alpha"], **calibration},
        "paths": [*entries, *absent],
        "vote": _vote([(path, file) for path, file in traces if path.startswith("candidate.")], documents),
        "guess": _guess(traces, models, threads),
    }
    inputs = {file.name: sha256_file(file) for file in (*documents, floors_file)}
    inputs |= {f"trace/{path}": sha256_file(file) for path, file in traces}
    write_json(document, out, EvidenceHeader.of("replay", inputs, {"not_run": absent}))


def _vote(traces: Sequence[tuple[str, Path]], documents: Sequence[Path]) -> dict[str, Any]:
    """The vote of the sources that ran on one artifact."""
    from driftscope.analysis.vote import vote
    from driftscope.engines.trace import Trace

    if len(traces) < 3:
        names = ", ".join(path for path, _ in traces)
        reason = f"a vote needs three traces of one artifact; there are {names}"
        return {"status": "not-run", "reason": reason}
    tables = {file.with_suffix("").name: file.with_suffix(".parquet") for file in documents}
    replays = {path: read_table(tables[path], "replay").to_dicts() for path, _ in traces}
    found = vote({path: Trace(file.parent) for path, file in traces}, replays=replays)
    return {"status": "done", **found}


def _guess(
    traces: Sequence[tuple[str, Path]], models: Mapping[str, Path], threads: int
) -> list[dict[str, Any]]:
    """What explains the numbers of each engine that is not ours best, whatever it declares."""
    from driftscope.analysis.arithmetic_guess import guess_arithmetic
    from driftscope.config import ENGINE_PATHS
    from driftscope.engines.trace import Trace

    found = []
    for path, file in traces:
        if path in ENGINE_PATHS.values():
            own, _ = open_model(models[path.partition(".")[0]])
            guess = guess_arithmetic(Trace(file.parent), own, threads=threads)
            found.append({"path": path, **guess.to_dict()})
    return found


def _plain(file: Path) -> dict[str, Any]:
    from driftscope.report.evidence import plain

    return plain(read_json(file))
