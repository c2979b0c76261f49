"""How the error of each path travels through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from driftscope.evidence.digest import sha256_file
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.manifest import open_model
from driftscope.evidence.store import read_table, write_table


def pair(teacher: Path, traces: Sequence[tuple[str, Path]], out: Path, *, threads: int) -> None:
    """Follow the error of one trace against the reference's.

    Args:
        teacher: its manifest.
        traces: path and ``trace.json`` of the reference, which ran on the teacher, and of the other.
        out: the ``propagation`` table of the pair.
        threads: the result does not depend on it.
    """
    from driftscope.analysis.propagation import propagation
    from driftscope.engines.trace import Trace
    from driftscope.evidence.schemas import frame_of

    artifact, digest = open_model(teacher)
    (reference, a), (other, b) = traces
    names = f"{reference}|{other}"
    rows = propagation(Trace(a.parent), Trace(b.parent), artifact, pair=names, threads=threads)
    inputs = {"teacher": digest, **{path: sha256_file(file) for path, file in traces}}
    header = EvidenceHeader.of("propagation", inputs, {"pair": names})
    write_table(frame_of(rows, "propagation"), out, "propagation", header)


def join(pairs: Sequence[Path], out: Path) -> None:
    """Join the pairs into one table."""
    import polars as pl

    frame = pl.concat([read_table(path, "propagation") for path in pairs])
    inputs = {path.name: sha256_file(path) for path in pairs}
    write_table(frame, out, "propagation", EvidenceHeader.of("propagation", inputs, {}))
