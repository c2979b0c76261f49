"""``driftscope contracts``: registered hypotheses, gates and published figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftscope.cli.options import AsJson
from driftscope.cli.show import print_json

contracts = typer.Typer(no_args_is_help=True, help="Registered hypotheses, gates and published figures.")


@contracts.command()
def validate(
    paths: Annotated[list[Path] | None, typer.Argument(help="contract files or folders")] = None,
    as_json: AsJson = False,
) -> None:
    """Check contracts: keys, ids, templates, registered measurements."""
    from driftscope.contracts.commands import validate as check

    rows = check(paths or [Path("contracts")])
    if as_json:
        print_json(rows)
        return
    for row in rows:
        counts = f"{len(row['falsifiers'])} falsifiers, {len(row['gates'])} gates"
        typer.echo(f"{row['file']}: {row['id']} {row['version']}, {counts}")


@contracts.command()
def status(
    results: Annotated[Path, typer.Argument(help="results folder of a case, results/<name>")],
    paths: Annotated[list[Path] | None, typer.Option("--contracts", help="contract files or folders")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what the verdict of each falsifier is and whether it is up to date."""
    from driftscope.contracts.commands import status as state_of

    rows = state_of(paths or [Path("contracts")], results)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        contract = f"{row['contract']} {row['version']}"
        typer.echo(f"{row['falsifier']:<28} {row['verdict']:<17} {row['state']:<8} {contract}")
