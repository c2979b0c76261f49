"""``driftscope faultbench``: known faults, and whether they are found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftscope.cli.options import Out, Part, Threads, part_of
from driftscope.cli.show import progress_bar

faultbench = typer.Typer(
    no_args_is_help=True, help="Known faults put into models and engines, and whether they are found."
)


@faultbench.command()
def run(
    out: Out,
    part: Part = "0/1",
    models: Annotated[str, typer.Option(help="tiny, default (the case's) or all")] = "tiny",
    fault: Annotated[
        list[str] | None, typer.Option(help="only these, e.g. F03; else all and controls")
    ] = None,
    floors: Annotated[Path | None, typer.Option(help="calibrated floors; else theory's")] = None,
    teacher: Annotated[Path | None, typer.Option(help="manifest of the default model in float32")] = None,
    candidate: Annotated[Path | None, typer.Option(help="manifest of its Q4_K_M copy")] = None,
    threads: Threads = 1,
) -> None:
    """Run one part of the benchmark."""
    from driftscope.stages import faultbench as stages

    index, count = part_of(part)
    with progress_bar("faults") as advance:
        stages.part(
            floors,
            teacher,
            candidate,
            index,
            count,
            out,
            models=models,
            faults=tuple(fault or ()),
            threads=threads,
            progress=advance,
        )


@faultbench.command()
def join(
    parts: list[Path],
    out: Out,
    page: Annotated[Path, typer.Option(help="where to write the readable report (Markdown)")],
    gate: Annotated[bool, typer.Option(help="exit with 1 where a target is not met")] = False,
) -> None:
    """Join the parts into a report."""
    from driftscope.stages import faultbench as stages

    met = stages.join(parts, out, page)
    if gate and not met:
        raise typer.Exit(1)
