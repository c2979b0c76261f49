"""The command line. Every workflow rule calls it, and so can a person.

Exit codes: 0 holds, 1 does not hold, 2 bad input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from driftscope import __version__
from driftscope.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Is it a bug or the price of quantization, where does it start, and which fix is closer to the truth?",
)
stage = typer.Typer(no_args_is_help=True, help="The workflow's steps, one file of evidence each.")
contracts = typer.Typer(no_args_is_help=True, help="Registered hypotheses, gates and published figures.")
app.add_typer(stage, name="stage")
app.add_typer(contracts, name="contracts")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="configuration file")]
Out = Annotated[Path, typer.Option("--out", "-o", help="the evidence file to write")]
Threads = Annotated[int, typer.Option(help="threads; the result does not depend on it", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
DEFAULT_CONFIG = Path("config/config.yaml")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    config: ConfigFile = DEFAULT_CONFIG,
    cores: Annotated[int, typer.Option(help="cores to use", min=1)] = os.cpu_count() or 1,
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
        _fail(line, code)
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
    with _bar("resolving") as advance:
        path = lock_config(
            loaded.sources(),
            Path(loaded.origin),
            only=model,
            progress=lambda _, done, total: advance(done, total),
        )
    typer.echo(str(path))


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="a GGUF file, a safetensors folder, or a manifest")],
    as_json: AsJson = False,
) -> None:
    """Show what a model on disk is: architecture, hyperparameters, dtypes by size."""
    from dataclasses import asdict

    artifact = _open(model)
    sizes: dict[str, list[int]] = {}
    for tensor in artifact.tensors.values():
        entry = sizes.setdefault(tensor.dtype, [0, 0, 0])
        for index, value in enumerate((1, tensor.n_elements, tensor.nbytes)):
            entry[index] += value
    document = {
        "path": str(artifact.path),
        "container": artifact.container,
        "config": asdict(artifact.config),
        "dtypes": {
            name: dict(zip(("tensors", "elements", "bytes"), values, strict=True))
            for name, values in sorted(sizes.items(), key=lambda item: -item[1][2])
        },
        "unmapped": list(artifact.unmapped),
    }
    if as_json:
        _print_json(document)
        return
    typer.echo(f"{artifact.path}: {artifact.container}, {artifact.config.architecture}")
    for key, value in asdict(artifact.config).items():
        typer.echo(f"  {key:<22} {value}")
    for name, entry in sizes.items():
        typer.echo(f"  {name:<6} {entry[0]:>5} tensors {entry[1]:>14,} values {entry[2]:>15,} bytes")
    for name in artifact.unmapped:
        typer.echo(f"  unmapped: {name}")


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="the reference model")],
    b: Annotated[Path, typer.Argument(help="the model under test")],
    limit: Annotated[int, typer.Option(help="rows to show, worst first", min=1)] = 15,
    threads: Threads = os.cpu_count() or 1,
    as_json: AsJson = False,
) -> None:
    """Compare two models tensor by tensor; exit 1 where one differs by more than its format explains."""
    import polars as pl

    from driftscope.analysis.sweep import Band, compare_tensor, inventory, pairs, summarise
    from driftscope.config import SweepSpec
    from driftscope.evidence.schemas import frame_of

    first, second = _open(a), _open(b)
    found = pairs(first, second)
    rows = []
    with _bar("comparing", visible=not as_json) as advance:
        for index, pair in enumerate(found):
            rows.append(compare_tensor(pair.a, pair.b, tensor=pair.tensor, threads=threads))
            advance(index + 1, len(found))
    listed = inventory(first, second)
    frame = frame_of(rows, "sweep")
    summary = summarise(frame, listed, Band(*SweepSpec().band))
    if as_json:
        _print_json({"summary": summary, "inventory": listed, "tensors": rows})
    else:
        _print_sweep(frame.sort(pl.col("nmse"), descending=True, nulls_last=False), summary, listed, limit)
    if not summary["holds"]:
        raise typer.Exit(1)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="a report, results/<name>_report.json")],
    as_json: AsJson = False,
) -> None:
    """Print the verdict of a report."""
    from driftscope.report.write import read_report

    document = read_report(path)
    if as_json:
        _print_json(document["verdict"])
        return
    verdict = document["verdict"]
    typer.echo(f"{document['name']}: {verdict['class']}")
    typer.echo(verdict["summary"])
    for reason in verdict.get("reasons", []):
        typer.echo(f"  - {reason}")


@app.command()
def gate(
    path: Annotated[Path, typer.Argument(help="a report, results/<name>_report.json")],
    as_json: AsJson = False,
) -> None:
    """Judge a report's ship gates; exit 1 unless every gate holds. Not run is not a pass."""
    from driftscope.report.write import read_report

    gates = read_report(path)["gates"]
    if as_json:
        _print_json(gates)
    else:
        for item in gates:
            typer.echo(f"{item['status']:<13} {item['id']}: {item['found']}")
    if not gates or any(item["status"] != "holds" for item in gates):
        raise typer.Exit(1)


@contracts.command()
def validate(
    paths: Annotated[list[Path] | None, typer.Argument(help="contract files or folders")] = None,
    as_json: AsJson = False,
) -> None:
    """Check contracts: keys, ids, templates, registered measurements."""
    from driftscope.contracts.commands import validate as check

    rows = check(paths or [Path("contracts")])
    if as_json:
        _print_json(rows)
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
        _print_json(rows)
        return
    for row in rows:
        typer.echo(
            f"{row['falsifier']:<28} {row['verdict']:<17} {row['state']:<8} {row['contract']} {row['version']}"
        )


@stage.command()
def fetch(model: str, config: ConfigFile, out: Out) -> None:
    """Bring a model's files, as pinned by the lock file."""
    from driftscope.config import load_config
    from driftscope.stages import models

    with _bar(f"fetching {model}") as advance:
        models.fetch(load_config(config), model, out, advance)


@stage.command()
def derive(
    model: str,
    config: ConfigFile,
    from_: Annotated[Path, typer.Option("--from", help="manifest of the model to derive from")],
    out: Out,
    threads: Threads = 1,
) -> None:
    """Write an exact safetensors teacher or a quantized GGUF candidate of a model."""
    from driftscope.config import load_config
    from driftscope.stages import models

    with _bar(f"deriving {model}") as advance:
        models.derive(load_config(config), model, from_, out, threads=threads, progress=advance)


@stage.command()
def prompts(config: ConfigFile, model: Annotated[Path, typer.Option(help="manifest")], out: Out) -> None:
    """Encode the configuration's prompts with a model's tokenizer and chat template."""
    from driftscope.config import load_config
    from driftscope.stages.prompts import encode

    encode(load_config(config), model, out)


Teacher = Annotated[Path, typer.Option(help="manifest of the teacher")]
Candidate = Annotated[Path, typer.Option(help="manifest of the candidate")]
Prompts = Annotated[Path, typer.Option("--prompts", help="encoded prompts")]
Part = Annotated[str, typer.Option(help="which part of how many, e.g. 0/4")]
Labelled = Annotated[list[str], typer.Option(help="path=file, repeated")]


@stage.command()
def sweep(teacher: Teacher, candidate: Candidate, part: Part, out: Out, threads: Threads = 1) -> None:
    """Compare one shard of the tensors."""
    from driftscope.stages.sweep import shard

    shard(teacher, candidate, *_part(part), out, threads=threads)


@stage.command()
def sweep_join(
    teacher: Teacher,
    candidate: Candidate,
    shards: list[Path],
    out: Out,
    inventory: Annotated[Path, typer.Option(help="where to list what has no counterpart")],
) -> None:
    """Join the shards of the sweep."""
    from driftscope.stages.sweep import join

    join(teacher, candidate, shards, out, inventory)


@stage.command()
def weights(
    table: Path,
    inventory: Annotated[Path, typer.Option()],
    low: Annotated[float, typer.Option(help="lower end of measured over expected NMSE")],
    high: Annotated[float, typer.Option(help="upper end of measured over expected NMSE")],
    out: Out,
) -> None:
    """Say what each tensor of the candidate is to the teacher's."""
    from driftscope.stages.sweep import judge

    judge(table, inventory, (low, high), out)


@stage.command()
def trace(
    path: Annotated[str, typer.Argument(help="<role>.<arithmetic>, e.g. candidate.int8-dot")],
    model: Annotated[Path, typer.Option(help="manifest of the artifact")],
    prompts_file: Prompts,
    part: Part,
    out: Out,
    taps: Annotated[Path, typer.Option(help="where to keep taps")],
    state: Annotated[Path, typer.Option(help="where to leave the residual stream")],
    state_in: Annotated[Path | None, typer.Option(help="what the chunk before left")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="globs of the taps to keep")] = None,
    threads: Threads = 1,
) -> None:
    """Run one chunk of layers of one path and record its taps."""
    from driftscope.stages.trace import chunk

    index, count = _part(part)
    chunk(model, path, prompts_file, index, count, keep or [], state_in, out, taps, state, threads=threads)


@stage.command()
def trace_join(
    path: str,
    chunks: list[Path],
    model: Annotated[Path, typer.Option(help="manifest of the artifact")],
    prompts_file: Prompts,
    out: Out,
) -> None:
    """Join the chunks of a path."""
    from driftscope.stages.trace import join

    join(model, prompts_file, path, chunks, out)


@stage.command()
def divergence(
    prompts_file: Prompts, taps: Labelled, pair: Annotated[list[str], typer.Option()], out: Out
) -> None:
    """Compare the kept taps of one chunk between paths."""
    from driftscope.stages.trace import compare

    compare(prompts_file, _labelled(taps), [_pair(text) for text in pair], out)


@stage.command()
def divergence_join(chunks: list[Path], out: Out) -> None:
    """Join the chunks of the propagated error."""
    from driftscope.stages.trace import join_divergence

    join_divergence(chunks, out)


@stage.command()
def admissibility(
    prompts_file: Prompts, teacher: Teacher, candidate: Candidate, trace: Labelled, out: Out
) -> None:
    """Check that the traces may be compared at all."""
    from driftscope.stages.trace import admissibility as check

    check(prompts_file, teacher, candidate, _labelled(trace), out)


@stage.command()
def base(
    path: str,
    teacher: Teacher,
    candidate: Candidate,
    prompts_file: Prompts,
    out: Out,
    minimum: Annotated[int, typer.Option(help="least token positions", min=1)] = 1,
    threads: Threads = 1,
) -> None:
    """Run one path over the texts of the decomposition."""
    from driftscope.stages import decompose

    decompose.base(teacher, candidate, prompts_file, path, minimum, out, threads=threads)


@stage.command()
def counterfactuals(
    teacher: Teacher,
    candidate: Candidate,
    prompts_file: Prompts,
    base: Labelled,
    part: Part,
    out: Out,
    threads: Threads = 1,
) -> None:
    """Run one job's share of the counterfactual passes."""
    from driftscope.stages import decompose

    index, jobs = _part(part)
    with _bar("counterfactual passes") as advance:
        decompose.counterfactuals(
            teacher,
            candidate,
            prompts_file,
            _labelled(base),
            index,
            jobs,
            out,
            threads=threads,
            progress=advance,
        )


@stage.command()
def shares(
    jobs: list[Path],
    config: ConfigFile,
    table: Annotated[Path, typer.Option(help="where to join the energies")],
    out: Out,
) -> None:
    """Turn the energies into shares with intervals."""
    from driftscope.config import load_config
    from driftscope.stages import decompose

    decompose.shares(jobs, load_config(config).decomposition, table, out)


@stage.command()
def impact(
    prompts_file: Prompts,
    base: Labelled,
    config: ConfigFile,
    table: Annotated[Path, typer.Option(help="where to write the table by position")],
    out: Out,
) -> None:
    """Compare the paths' next-token distributions."""
    from driftscope.config import load_config
    from driftscope.stages import decompose

    decompose.impact(prompts_file, _labelled(base), load_config(config).decomposition, table, out)


@stage.command()
def fix_scope(decomposition: Path, impact_file: Annotated[Path, typer.Option("--impact")], out: Out) -> None:
    """Put the options of a fix side by side."""
    from driftscope.stages import decompose

    decompose.fix_scope(decomposition, impact_file, out)


Results = Annotated[Path, typer.Option(help="results folder of the case")]


@app.command()
def falsify(
    contract: Path, falsifier: str, results: Results, out: Annotated[Path, typer.Option("--out", "-o")]
) -> None:
    """Measure one falsifier of a contract; nothing is judged."""
    from driftscope.stages.falsify import measure

    measure(contract, falsifier, results, out)


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


@stage.command()
def gates(contracts_folder: Path, results: Results, out: Out) -> None:
    """Judge the ship gates."""
    from driftscope.stages.falsify import gates as decide

    for name, state in decide(contracts_folder, results, out).items():
        typer.echo(f"{state:<13} {name}")


@stage.command()
def published(contracts_folder: Path, results: Results, out: Out) -> None:
    """Recompute and judge the published figures."""
    from driftscope.stages.falsify import published as decide

    for state, count in decide(contracts_folder, results, out).items():
        typer.echo(f"{count:>3} {state}")


@stage.command("report")
def report_stage(
    config: ConfigFile, results: Results, out: Out, html: Annotated[Path, typer.Option(help="the page")]
) -> None:
    """Write the report of a results folder."""
    from driftscope.config import PATHS, load_config
    from driftscope.stages.report import write

    typer.echo(write(load_config(config), results, PATHS, out, html))


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        _note_failure(str(error))
        sys.stderr.write(f"driftscope: {error}\n")
        sys.exit(2)


def _fail(line: str, code: int) -> None:
    sys.stderr.write(f"driftscope: {line}\n")
    raise typer.Exit(code)


def _note_failure(line: str) -> None:
    """Leave the line for `driftscope run`, which sees its rules' exit codes only through Snakemake."""
    file = os.environ.get("DRIFTSCOPE_FAILURES")
    if file:
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def _open(path: Path) -> Any:
    from driftscope.artifacts.open import open_artifact
    from driftscope.stages.manifest import open_model

    return open_model(path)[0] if path.suffix == ".json" else open_artifact(path)


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--part {text}: expected INDEX/COUNT with INDEX below COUNT, e.g. 0/4")
    return int(index), int(count)


def _labelled(items: list[str]) -> list[tuple[str, Path]]:
    found = []
    for item in items:
        label, equals, file = item.partition("=")
        if not (label and equals and file):
            raise InputError(f"{item}: expected path=file, e.g. teacher.f32=trace/teacher.f32.parquet")
        found.append((label, Path(file)))
    return found


def _pair(text: str) -> tuple[str, str]:
    a, bar, b = text.partition("|")
    if not (a and bar and b):
        raise InputError(f"{text}: expected two paths as reference|other")
    return a, b


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


def _print_sweep(frame: Any, summary: dict[str, Any], listed: dict[str, Any], limit: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("tensor", "a", "b", "relation"):
        table.add_column(name, overflow="fold")
    for name in ("nmse", "expected", "cosine", "max diff"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in frame.head(limit).iter_rows(named=True):
        figures = (row["nmse"], row["expected_nmse"], row["cosine_similarity"], row["max_diff"])
        table.add_row(
            row["tensor"],
            row["dtype_a"],
            row["dtype_b"],
            summary["relations"][row["tensor"]],
            *(
                "-" if value is None else f"{value:.3g}" if value < 0.9 else f"{value:.7f}"
                for value in figures
            ),
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
    console.print(
        f"{summary['conclusion']}: {coverage['compared']} of {coverage['expected']} tensors compared; {counts}"
    )


@contextmanager
def _bar(what: str, *, visible: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show progress on a terminal's stderr; nothing where stderr is a file."""
    if not (visible and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
