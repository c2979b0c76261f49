"""What the commands take: shared options, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from driftscope.errors import InputError

DEFAULT_CONFIG = Path("config/config.yaml")
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="configuration file")]
Out = Annotated[Path, typer.Option("--out", "-o", help="the evidence file to write")]
Threads = Annotated[int, typer.Option(help="threads; the result does not depend on it", min=1)]
Device = Annotated[str, typer.Option(help="cpu; cuda; or auto: cuda where a device answers, else cpu")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
Teacher = Annotated[Path, typer.Option(help="manifest of the teacher")]
Candidate = Annotated[Path, typer.Option(help="manifest of the candidate")]
Prompts = Annotated[Path, typer.Option("--prompts", help="encoded prompts")]
Part = Annotated[str, typer.Option(help="which part of how many, e.g. 0/4")]
Labelled = Annotated[list[str], typer.Option(help="path=file, repeated")]
Results = Annotated[Path, typer.Option(help="results folder of the case")]


def open_any(path: Path) -> Any:
    """Open a model by its file, its folder or its manifest; verifying an .apr file shows its progress."""
    from driftscope.artifacts.open import open_artifact
    from driftscope.cli.show import progress_bar
    from driftscope.evidence.manifest import open_model

    if path.suffix == ".json":
        return open_model(path)[0]
    with progress_bar("verifying", visible=path.suffix == ".apr") as advance:
        return open_artifact(path, progress=advance)


def part_of(text: str) -> tuple[int, int]:
    """Read `INDEX/COUNT`."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--part {text}: expected INDEX/COUNT with INDEX below COUNT, e.g. 0/4")
    return int(index), int(count)


def labelled(items: list[str]) -> list[tuple[str, Path]]:
    """Read `path=file` items."""
    found = []
    for item in items:
        label, equals, file = item.partition("=")
        if not (label and equals and file):
            raise InputError(f"{item}: expected path=file, e.g. teacher.f32=trace/teacher.f32.parquet")
        found.append((label, Path(file)))
    return found


def pair_of(text: str) -> tuple[str, str]:
    """Read `reference|other`."""
    a, bar, b = text.partition("|")
    if not (a and bar and b):
        raise InputError(f"{text}: expected two paths as reference|other")
    return a, b
