"""``driftscope diff``: two models, tensor by tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from driftscope.cli.options import AsJson, Device, Threads, open_any
from driftscope.cli.show import closed_pipe_ends, interruptible, print_diff, print_json, progress_bar
from driftscope.errors import InputError

ALL_CORES = os.cpu_count() or 1


def diff(
    a: Annotated[Path, typer.Argument(help="the reference model: a file, a folder, or a manifest")],
    b: Annotated[Path, typer.Argument(help="the model under test")],
    only: Annotated[
        str, typer.Option(metavar="REGEX", help="compare only tensors in whose name it is found")
    ] = "",
    limit: Annotated[int, typer.Option(help="rows to show, worst first; 0 shows none", min=0)] = 15,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'REGEX METRIC<VALUE'",
            help="judge the tensors in whose name REGEX is found by this instead; <, <=, >, >=; repeatable",
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write a page that opens offline")] = None,
    threads: Threads = ALL_CORES,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compare two models tensor by tensor; exit 1 where one differs by more than its format explains.

    The first says what the values should be. A container's own changes (order of rows, offsets of norms,
    tied heads) are undone before values are compared. Exit 0: the same weights, up to their formats; 1: not
    so, or a threshold is broken; 2: bad input.
    """
    from driftscope.analysis.weights.default_band import DEFAULT_BAND
    from driftscope.analysis.weights.pair_diff import diff_models
    from driftscope.analysis.weights.relations import Band
    from driftscope.analysis.weights.thresholds import Threshold, compiled
    from driftscope.kernels.device import choose_device, kernels_on
    from driftscope.report.diff_words import sentence

    thresholds = [Threshold.parse(text) for text in threshold or []]
    wanted = compiled(only, "--only") if only else None
    _check_page(html)
    with interruptible():
        first, second = open_any(a), open_any(b)
        kernels = kernels_on(choose_device(device), threads)
        with progress_bar("comparing", visible=not as_json, in_bytes=True) as advance:
            document = diff_models(
                first,
                second,
                band=Band(*DEFAULT_BAND),
                only=wanted,
                thresholds=thresholds,
                kernels=kernels,
                progress=advance,
            )
        document["sentence"] = sentence(document)
        if html is not None:
            from driftscope.evidence.atomic import write_text
            from driftscope.report.diff_page import render_diff

            write_text(html, render_diff(document))
        with closed_pipe_ends():
            if as_json:
                print_json(document)
            else:
                print_diff(document, limit, html)
    if not document["holds"]:
        raise typer.Exit(1)


def _check_page(html: Path | None) -> None:
    """Refuse before the models are read what could not be written after."""
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        raise InputError(f"--html {html}: expected a file in a folder that exists")
