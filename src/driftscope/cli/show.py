"""What the commands show: JSON, tables that fit a terminal, progress."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer


def fail(line: str, code: int) -> None:
    """Say one line and exit."""
    sys.stderr.write(f"driftscope: {line}\n")
    raise typer.Exit(code)


def print_json(document: Any) -> None:
    """Print a document for programs."""
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


def print_diff(document: dict[str, Any], limit: int, page: Path | None = None) -> None:
    """Print a diff: the worst tensors that are not identical, what is not in the table, the conclusion."""
    from rich.console import Console

    from driftscope.report.diff_words import metadata_words, share_words, short_name
    from driftscope.report.text import counted

    console = Console(highlight=False)
    tensors, listed, summary = document["tensors"], document["inventory"], document["summary"]
    unlike = [row for row in tensors if row["relation"] != "identical" or not row["holds"]]
    shown = unlike[:limit]
    if shown:
        console.print(_diff_table(shown, console.width))
    if len(unlike) > len(shown):
        console.print(
            f"{len(unlike) - len(shown)} more that are not identical; --limit shows more", style="dim"
        )

    def line(name: str, text: str, style: str = "") -> None:
        console.print(f"{name:<10} {plain(text)}", markup=False, style=style, soft_wrap=True)

    counts = summary["kind_counts"]
    coverage = summary["coverage"]
    if counts:
        line("relations", ", ".join(f"{count} {name}" for name, count in counts.items()))
    line("compared", f"{coverage['compared']} of {counted(coverage['expected'], 'tensor')}")
    if document["only"] is not None:
        line("--only", f"{share_words(document)}; the others were not looked at")
    for bound in document["thresholds"]:
        broken = len(bound["broken"])
        said = f"broken by {broken}" if broken else "held by all"
        line("threshold", f"{bound['text']}: {said} of {counted(len(bound['matched']), 'tensor')}")
    for key, title in _LISTED:
        names = listed[key]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            line(title, ", ".join(names[:5]) + more, "red" if key == "missing" else "")
    for item in listed["metadata_differences"]:
        line("metadata", metadata_words(item), "yellow")
    findings = summary["block_findings"]
    for finding in findings[:limit]:
        line("blocks", f"{short_name(finding['tensor'])}, {finding['statement']}", "yellow")
    if len(findings) > limit:
        line("blocks", f"{len(findings) - limit} more")
    if page is not None:
        line("page", str(page))
    mark, style = ("✓", "bold green") if document["holds"] else ("✗", "bold red")
    console.print(f"{mark} {plain(document['sentence'])}", markup=False, style=style, soft_wrap=True)


_LISTED = (
    ("missing", "missing"),
    ("extra", "extra"),
    ("unmapped_a", "unmapped A"),
    ("unmapped_b", "unmapped B"),
)


def _diff_table(rows: list[dict[str, Any]], width: int) -> Any:
    """The rows of a diff, with more columns where there is room."""
    from rich.table import Table
    from rich.text import Text

    from driftscope.report.diff_words import short_name, short_relation

    wide, wider = width >= 110, width >= 140
    columns: list[tuple[str, bool]] = [
        ("", False),
        ("tensor", False),
        ("formats", False),
        ("relation", False),
    ]
    columns += [("NMSE", True), ("×expected", True), ("max diff", True)]
    columns += [("1 - cosine", True), ("std ratio", True)] if wide else []
    columns += [("shape", False), ("at", False)] if wider else []
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name, right in columns:
        table.add_column(
            name,
            justify="right" if right else "left",
            min_width=1,
            no_wrap=name != "relation",
            overflow="fold" if name == "relation" else "ellipsis",
        )
    for row in rows:
        cosine = row["cosine_similarity"]
        cells = [
            "" if row["holds"] else "✗",
            row["tensor"] if wider else short_name(row["tensor"]),
            row["dtype_a"] if row["dtype_a"] == row["dtype_b"] else f"{row['dtype_a']}→{row['dtype_b']}",
            row["relation"] if wide else short_relation(row),
            figure(row["nmse"]),
            figure(row["nmse_over_expected"]),
            figure(row["max_diff"]),
        ]
        cells += [figure(None if cosine is None else 1.0 - cosine), figure(row["std_ratio"])] if wide else []
        cells += [row["shape_b"], row["max_index"] or "-"] if wider else []
        table.add_row(*(Text(plain(cell)) for cell in cells), style="" if row["holds"] else "red")
    return table


def figure(value: float | None) -> str:
    """A figure of a table, at most eight characters wide."""
    return "-" if value is None else f"{value:.3g}"


def plain(text: str) -> str:
    """A text of a model file without what a terminal would obey."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


@contextmanager
def interruptible() -> Iterator[None]:
    """End with a line and exit code 130 where the user interrupts; 1 would say that something differs."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("driftscope: interrupted\n")
        raise typer.Exit(130) from None


@contextmanager
def closed_pipe_ends() -> Iterator[None]:
    """End as other programs do where the reader of the output has gone, ``driftscope diff … | head``.

    Only while the result is printed: elsewhere a write to a process that has ended must not end this one.
    """
    name = getattr(signal, "SIGPIPE", None)
    if name is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(name, signal.SIG_DFL)
    try:
        yield
        sys.stdout.flush()
    finally:
        signal.signal(name, before)


@contextmanager
def progress_bar(
    what: str, *, visible: bool = True, in_bytes: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """Show progress on a terminal's stderr; nothing where stderr is a file.

    Args:
        what: is done.
        visible: show it at all.
        in_bytes: what is counted is bytes: show how many, how fast, and how long it will still take.
    """
    if not (visible and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    tail = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (TaskProgressColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *tail, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
