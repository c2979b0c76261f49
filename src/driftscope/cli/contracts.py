"""``driftscope contracts``: registered hypotheses, gates and published figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftscope.cli.options import AsJson
from driftscope.cli.show import fail, print_json

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


Contracts = Annotated[list[Path] | None, typer.Option("--contracts", help="contract files or folders")]
Evidence = Annotated[Path | None, typer.Option("--results", help="results folder of a case, results/<name>")]


@contracts.command()
def lint(
    paths: Annotated[list[Path] | None, typer.Argument(help="contract files or folders")] = None,
    results: Evidence = None,
    as_json: AsJson = False,
) -> None:
    """Find claims that nothing backs; exit 1 where there is one.

    Without --results what needs evidence (predicates, statuses, pinned figures) is not checked, and is
    named as such.
    """
    from driftscope.contracts.lint import lint as run

    done = run(paths or [Path("contracts")], results)
    if as_json:
        rows = [
            {"file": str(item.file), "line": item.line, "rule": item.rule, "message": item.message}
            for item in done.findings
        ]
        print_json({"findings": rows, "unchecked": done.unchecked})
    else:
        for item in done.findings:
            typer.echo(f"{item.file}:{item.line}: {item.rule}: {item.message}")
        for line in done.unchecked:
            typer.echo(f"not checked: {line}")
        typer.echo(f"{len(done.findings)} findings, {len(done.unchecked)} not checked")
    if done.findings:
        raise typer.Exit(1)


@contracts.command()
def explain(
    entry: Annotated[str, typer.Argument(metavar="ID", help="id of a contract, a falsifier or a gate")],
    paths: Contracts = None,
    results: Evidence = None,
    as_json: AsJson = False,
) -> None:
    """Say what is registered under an id, and its verdict where there is evidence."""
    from driftscope.contracts.explain import explain as gather

    found = gather(paths or [Path("contracts")], entry, results)
    if as_json:
        print_json(found)
        return
    for key, value in found.items():
        if isinstance(value, dict):
            typer.echo(f"{key}:")
            for name, item in value.items():
                typer.echo(f"  {name}: {item}")
        elif isinstance(value, list):
            typer.echo(f"{key}:" + ("" if value else " -"))
            for item in value:
                typer.echo(f"  - {item}")
        else:
            typer.echo(f"{key}: {value}")


@contracts.command()
def discharge(
    path: Annotated[Path, typer.Argument(help="contract file")],
    results: Annotated[Path, typer.Option("--results", help="results folder of a case, results/<name>")],
    as_json: AsJson = False,
) -> None:
    """Pin the evidence of a results folder into a contract; exit 1 where a verdict does not hold."""
    from driftscope.contracts.discharge import NotDischargedError
    from driftscope.contracts.discharge import discharge as write

    try:
        pinned = write(path, results)
    except NotDischargedError as error:
        fail(str(error), 1)
        return
    if as_json:
        print_json({name: item.model_dump(mode="json") for name, item in pinned.items()})
        return
    for name, item in pinned.items():
        typer.echo(f"{name}: {item.verdict}, {len(item.figures)} figures, {len(item.inputs)} inputs pinned")


@contracts.command()
def schema() -> None:
    """Print the JSON Schema of a contract file, for editors."""
    from driftscope.contracts.model import contract_json_schema

    print_json(contract_json_schema())
