"""The fault benchmark: one job's part of it, and the report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from driftscope.errors import InputError
from driftscope.evidence.atomic import write_text
from driftscope.evidence.digest import sha256_file
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.manifest import open_model
from driftscope.evidence.store import read_json, write_json

MODELS = ("tiny", "default", "all")
KINDS = ("faults", "clean", "controls")


def part(
    floors: Path | None,
    teacher: Path | None,
    candidate: Path | None,
    index: int,
    count: int,
    out: Path,
    *,
    models: str = "all",
    faults: tuple[str, ...] = (),
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run one job's tasks.

    Args:
        floors: calibrated floors, or None for those of theory alone.
        teacher: manifest of the default model in float32; needed unless only tiny models are run.
        candidate: manifest of its quantized copy, or None to make one.
        index: number of the job.
        count: jobs.
        out: where to write the rows.
        models: ``tiny``, ``default`` or ``all``.
        faults: ids; empty for all, with controls and clean pairs.
        threads: the result does not depend on it.
        progress: called with the tasks done and their number.

    Raises:
        InputError: an unknown choice, or a model that cannot be used.
    """
    from driftscope.analysis.floors import Floors
    from driftscope.faultbench.faults import FAULTS
    from driftscope.faultbench.subjects import Workbench
    from driftscope.faultbench.tasks import deal, run, tasks

    if models not in MODELS:
        raise InputError(f"faultbench: models {models!r} is unknown; expected one of {', '.join(MODELS)}")
    for fault in faults:
        if fault not in FAULTS:
            raise InputError(f"faultbench: fault {fault!r} is unknown; expected F01 to F{len(FAULTS):02d}")
    if models != "tiny" and teacher is None:
        raise InputError("faultbench: the default model takes part, but no --teacher is given")
    found = Floors({}) if floors is None else Floors.from_dict(read_json(floors), str(floors))
    given = {"teacher": teacher, "candidate": candidate} if models != "tiny" else {}
    opened = {role: open_model(path)[0] for role, path in given.items() if path is not None}
    listed = tasks(default=models != "tiny", tiny=models != "default", faults=faults)
    with tempfile.TemporaryDirectory(prefix="driftscope-faultbench-") as folder:
        bench = Workbench(Path(folder), opened.get("teacher"), opened.get("candidate"))
        rows = run(deal(listed, index, count), bench, found, threads=threads, progress=progress)
    files = {"floors": floors, **given}
    inputs = {name: sha256_file(path) for name, path in files.items() if path is not None}
    parameters = {"models": models, "faults": list(faults), "part": [index, count]}
    write_json(rows, out, EvidenceHeader.of("faultbench", inputs, parameters))


def join(parts: list[Path], out: Path, page: Path) -> bool:
    """Join the jobs' rows into the report; return whether every target is met."""
    from driftscope.analysis.first_divergence import ALPHA
    from driftscope.faultbench.page import page as readable
    from driftscope.faultbench.report import build, check

    if not parts:
        raise InputError("faultbench: no part was given to join")
    documents = [read_json(path) for path in parts]
    for path, document in zip(parts, documents, strict=True):
        for kind in KINDS:
            if not isinstance(document.get(kind), list):
                raise InputError(f"{path}: {kind} is missing; expected a part of the fault benchmark")
    report = build(documents, alpha=ALPHA)
    check(report)
    inputs = {f"part_{number}": sha256_file(path) for number, path in enumerate(parts)}
    write_json(report, out, EvidenceHeader.of("faultbench", inputs, {}))
    write_text(page, readable(report))
    return all(target["met"] for target in report["targets"])
