"""The commands that a person types: run, lock, report, gate, falsify, judge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from driftscope import __version__
from driftscope.cli.options import DEFAULT_CONFIG, AsJson, ConfigFile, Device, Results
from driftscope.cli.show import fail, print_json, progress_bar

ALL_CORES = os.cpu_count() or 1

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Is it a bug or the price of quantization, where does it start, and which fix is nearer the truth?",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    config: ConfigFile = DEFAULT_CONFIG,
    cores: Annotated[int, typer.Option(help="cores to use", min=1)] = ALL_CORES,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="show what would run")] = False,
    where: Annotated[bool, typer.Option("--where", help="only print where the report will be")] = False,
) -> None:
    """Run the workflow up to the report of a configuration."""
    from driftscope.stages.run import report_path, run_workflow

    if where:
        typer.echo(str(report_path(config)))
        return
    code, line = run_workflow(config, cores, dry_run=dry_run)
    if line:
        fail(line, code)
    raise typer.Exit(code)


@app.command()
def lock(
    config: Annotated[Path, typer.Argument(help="configuration file")] = DEFAULT_CONFIG,
    model: Annotated[list[str] | None, typer.Option(help="only these models; others keep their pins")] = None,
) -> None:
    """Pin every source of a configuration by revision and sha256, in a lock file beside it."""
    from driftscope.artifacts.lock import lock_config
    from driftscope.config import load_config

    loaded = load_config(config)
    with progress_bar("resolving") as advance:
        path = lock_config(
            loaded.sources(),
            Path(loaded.origin),
            only=model,
            progress=lambda _, done, total: advance(done, total),
        )
    typer.echo(str(path))


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="a report, results/<name>_report.json")],
    as_json: AsJson = False,
) -> None:
    """Print the verdict of a report, its first divergence, and where its page is."""
    from driftscope.report.names import divergence_line
    from driftscope.report.write import read_report

    document = read_report(path)
    if as_json:
        print_json(document["verdict"])
        return
    verdict = document["verdict"]
    typer.echo(f"{document['name']}: {verdict['class']}")
    typer.echo(verdict["summary"])
    for reason in verdict.get("reasons", []):
        typer.echo(f"  - {reason}")
    typer.echo(divergence_line(document["divergence"]["local"]))
    page = path.with_suffix(".html")
    if page.is_file():
        typer.echo(f"The page: {page}")


@app.command()
def gate(
    path: Annotated[Path, typer.Argument(help="a report, results/<name>_report.json")],
    as_json: AsJson = False,
) -> None:
    """Judge a report's ship gates; exit 1 unless every gate holds. Not run is not a pass."""
    from driftscope.report.write import read_report

    gates = read_report(path)["gates"]
    if as_json:
        print_json(gates)
    else:
        for item in gates:
            typer.echo(f"{item['status']:<13} {item['id']}: {item['found']}")
    if not gates or any(item["status"] != "holds" for item in gates):
        raise typer.Exit(1)


@app.command()
def falsify(
    contract: Path,
    falsifier: str,
    results: Results,
    out: Annotated[Path, typer.Option("--out", "-o")],
    device: Device = "cpu",
) -> None:
    """Measure one falsifier of a contract; nothing is judged."""
    from driftscope.stages.falsify import measure

    measure(contract, falsifier, results, out, device)


@app.command()
def judge(
    contract: Path,
    falsifier: str,
    measurement: Annotated[Path, typer.Option(help="what was measured")],
    out: Annotated[Path, typer.Option("--out", "-o")],
) -> None:
    """Judge one falsifier by its measurement; nothing is measured."""
    from driftscope.stages.falsify import judge as decide

    typer.echo(decide(contract, falsifier, measurement, out))
