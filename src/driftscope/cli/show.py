"""What the commands show: JSON, tables that fit a terminal, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


def fail(line: str, code: int) -> None:
    """Say one line and exit."""
    sys.stderr.write(f"driftscope: {line}\n")
    raise typer.Exit(code)


def print_json(document: Any) -> None:
    """Print a document for programs."""
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


def print_sweep(frame: Any, summary: dict[str, Any], listed: dict[str, Any], limit: int) -> None:
    """Print the worst rows of a sweep, what has no counterpart, and the conclusion."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("tensor", "formats", "relation"):
        table.add_column(name, overflow="fold")
    for name in ("nmse", "expected", "max diff"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in frame.head(limit).iter_rows(named=True):
        # What every name has in common is left out, so that a row fits a terminal of 80 columns.
        name = row["tensor"].removeprefix("model.").removesuffix(".weight")
        figures = (row["nmse"], row["expected_nmse"], row["max_diff"])
        table.add_row(
            name,
            f"{row['dtype_a']}→{row['dtype_b']}",
            summary["relations"][row["tensor"]],
            *("-" if value is None else f"{value:.3g}" for value in figures),
        )
    console = Console()
    console.print(table)
    for key in ("missing", "extra", "unmapped_a", "unmapped_b"):
        if listed[key]:
            console.print(f"{key}: {', '.join(listed[key][:5])}{' …' if len(listed[key]) > 5 else ''}")
    for item in listed["metadata_differences"]:
        console.print(f"metadata {item['key']}: {item['a']} against {item['b']}", markup=False)
    coverage = summary["coverage"]
    counts = ", ".join(f"{count} {name}" for name, count in summary["relation_counts"].items())
    compared = f"{coverage['compared']} of {coverage['expected']} tensors compared"
    console.print(f"{summary['conclusion']}: {compared}; {counts}")


@contextmanager
def progress_bar(what: str, *, visible: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show progress on a terminal's stderr; nothing where stderr is a file."""
    if not (visible and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
