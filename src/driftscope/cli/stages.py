"""``driftscope stage``: the workflow's steps, one file of evidence each. The rules call them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftscope.cli.options import (
    Candidate,
    ConfigFile,
    Device,
    Labelled,
    Out,
    Part,
    Prompts,
    Results,
    Teacher,
    Threads,
    labelled,
    pair_of,
    part_of,
)
from driftscope.cli.show import progress_bar

stage = typer.Typer(no_args_is_help=True, help="The workflow's steps, one file of evidence each.")


@stage.command()
def fetch(model: str, config: ConfigFile, out: Out) -> None:
    """Bring a model's files, as pinned by the lock file."""
    from driftscope.config import load_config
    from driftscope.stages import models

    with progress_bar(f"fetching {model}") as advance:
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

    with progress_bar(f"deriving {model}") as advance:
        models.derive(load_config(config), model, from_, out, threads=threads, progress=advance)


@stage.command()
def prompts(config: ConfigFile, model: Annotated[Path, typer.Option(help="manifest")], out: Out) -> None:
    """Encode the configuration's prompts with a model's tokenizer and chat template."""
    from driftscope.config import load_config
    from driftscope.stages.prompts import encode

    encode(load_config(config), model, out)


@stage.command()
def sweep(
    teacher: Teacher,
    candidate: Candidate,
    part: Part,
    out: Out,
    blocks: Annotated[Path, typer.Option(help="where to write what is found in single blocks")],
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Compare one shard of the tensors, and look into their blocks."""
    from driftscope.stages.sweep import shard

    shard(teacher, candidate, *part_of(part), out, blocks, threads=threads, device=device)


@stage.command()
def sweep_join(
    teacher: Teacher,
    candidate: Candidate,
    shards: list[Path],
    found: Annotated[list[Path], typer.Option(help="what a shard found in single blocks; once for each")],
    out: Out,
    inventory: Annotated[Path, typer.Option(help="where to list what has no counterpart")],
    blocks: Annotated[Path, typer.Option(help="where to write what all shards found in single blocks")],
) -> None:
    """Join the shards of the sweep."""
    from driftscope.stages.sweep import join

    join(teacher, candidate, shards, found, out, inventory, blocks)


@stage.command()
def weights(
    table: Path,
    teacher: Teacher,
    candidate: Candidate,
    inventory: Annotated[Path, typer.Option()],
    blocks: Annotated[Path, typer.Option(help="what the sweep found in single blocks")],
    low: Annotated[float, typer.Option(help="lower end of measured over expected NMSE")],
    high: Annotated[float, typer.Option(help="upper end of measured over expected NMSE")],
    out: Out,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Say what each tensor of the candidate is to the teacher's; search what nothing explains."""
    from driftscope.stages.sweep import judge

    band = (low, high)
    judge(teacher, candidate, table, inventory, blocks, band, out, threads=threads, device=device)


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
    device: Device = "cpu",
) -> None:
    """Run one chunk of layers of one path and record its taps."""
    from driftscope.stages.trace import chunk

    index, count = part_of(part)
    inputs, outputs = (model, path, prompts_file, index, count, keep or [], state_in), (out, taps, state)
    chunk(*inputs, *outputs, threads=threads, device=device)


@stage.command()
def trace_join(
    path: str,
    chunks: list[Path],
    model: Annotated[Path, typer.Option(help="manifest of the artifact")],
    prompts_file: Prompts,
    out: Out,
    manifest: Annotated[Path, typer.Option(help="where to describe the kept taps")],
) -> None:
    """Join the chunks of a path."""
    from driftscope.stages.trace import join

    join(model, prompts_file, path, chunks, out, manifest)


@stage.command()
def engine_trace(
    engine: Annotated[str, typer.Argument(help="llama.cpp or transformers")],
    model: Annotated[Path, typer.Option(help="manifest of the artifact that it runs")],
    prompts_file: Prompts,
    out: Out,
) -> None:
    """Trace another engine; `--out` is the trace's manifest, and the arrays lie beside it."""
    from driftscope.stages.engines import run

    run(engine, model, prompts_file, out)


@stage.command()
def divergence(
    teacher: Teacher,
    trace: Labelled,
    pair: Annotated[list[str], typer.Option()],
    part: Part,
    out: Out,
) -> None:
    """Compare the kept taps of one chunk of layers between paths."""
    from driftscope.stages.trace import compare

    compare(teacher, labelled(trace), [pair_of(text) for text in pair], *part_of(part), out)


@stage.command()
def divergence_join(chunks: list[Path], out: Out) -> None:
    """Join the chunks of the propagated error."""
    from driftscope.stages.trace import join_divergence

    join_divergence(chunks, out)


@stage.command()
def floors(out: Out) -> None:
    """Calibrate what a clean op may be off by, on small random models."""
    from driftscope.stages.replay import floors as calibrate

    with progress_bar("calibrating") as advance:
        calibrate(out, advance)


@stage.command()
def replay(
    path: Annotated[str, typer.Argument(help="the traced path, e.g. candidate.int8-dot")],
    trace: Annotated[Path, typer.Option(help="its trace.json")],
    own: Annotated[Path, typer.Option(help="manifest of the artifact that the path runs on")],
    teacher: Teacher,
    part: Part,
    out: Out,
    threads: Threads = 1,
) -> None:
    """Recompute every op of one chunk of layers from the inputs that the trace recorded."""
    from driftscope.stages.replay import chunk

    chunk(path, trace, own, teacher, *part_of(part), out, threads=threads)


@stage.command()
def diagnose(
    path: str,
    chunks: list[Path],
    trace: Annotated[Path, typer.Option(help="the path's trace.json")],
    own: Annotated[Path, typer.Option(help="manifest of the artifact that the path runs on")],
    teacher: Teacher,
    floors: Annotated[Path, typer.Option(help="the calibrated floors")],
    false_alarm: Annotated[float, typer.Option(help="chance that a clean trace has any op flagged")],
    table: Annotated[Path, typer.Option(help="where to join the replay's chunks")],
    out: Out,
    threads: Threads = 1,
) -> None:
    """Say where the error of one path starts, and what it looks like."""
    from driftscope.stages import replay as stages

    stages.diagnose(path, chunks, trace, own, teacher, floors, false_alarm, table, out, threads=threads)


@stage.command()
def replay_join(
    documents: list[Path],
    trace: Labelled,
    teacher: Teacher,
    candidate: Candidate,
    floors: Annotated[Path, typer.Option(help="the calibrated floors")],
    not_run: Annotated[str, typer.Option(help="JSON list of the engines that were not traced")],
    out: Out,
    threads: Threads = 1,
) -> None:
    """Join what was found on each path; let the traces vote, and guess the arithmetic of the engines'."""
    from driftscope.stages import replay as stages

    models = {"teacher": teacher, "candidate": candidate}
    stages.join(documents, labelled(trace), models, floors, not_run, out, threads=threads)


@stage.command()
def propagation(teacher: Teacher, trace: Labelled, out: Out, threads: Threads = 1) -> None:
    """Follow the error of one trace through the layers; the reference's trace comes first."""
    from driftscope.stages.propagation import pair

    pair(teacher, labelled(trace), out, threads=threads)


@stage.command()
def propagation_join(pairs: list[Path], out: Out) -> None:
    """Join the pairs."""
    from driftscope.stages.propagation import join

    join(pairs, out)


@stage.command()
def admissibility(
    prompts_file: Prompts, teacher: Teacher, candidate: Candidate, trace: Labelled, out: Out
) -> None:
    """Check that the traces may be compared at all."""
    from driftscope.stages.trace import admissibility as check

    check(prompts_file, teacher, candidate, labelled(trace), out)


@stage.command()
def base(
    path: str,
    teacher: Teacher,
    candidate: Candidate,
    prompts_file: Prompts,
    out: Out,
    minimum: Annotated[int, typer.Option(help="least token positions", min=1)] = 1,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Run one path over the texts of the decomposition."""
    from driftscope.stages import decompose

    decompose.base(teacher, candidate, prompts_file, path, minimum, out, threads=threads, device=device)


@stage.command()
def engine(engine: str, candidate: Candidate, prompts_file: Prompts, out: Out) -> None:
    """Run the candidate over the texts on another engine, e.g. llama.cpp."""
    from driftscope.stages import decompose

    decompose.engine_base(candidate, prompts_file, engine, out)


@stage.command()
def counterfactuals(
    teacher: Teacher,
    candidate: Candidate,
    prompts_file: Prompts,
    base: Labelled,
    part: Part,
    out: Out,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Run one job's share of the counterfactual passes."""
    from driftscope.stages import decompose

    index, jobs = part_of(part)
    with progress_bar("counterfactual passes") as advance:
        decompose.counterfactuals(
            teacher,
            candidate,
            prompts_file,
            labelled(base),
            index,
            jobs,
            out,
            threads=threads,
            device=device,
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

    decompose.impact(prompts_file, labelled(base), load_config(config).decomposition, table, out)


@stage.command()
def fix_scope(
    table: Annotated[Path, typer.Option(help="impact by position")],
    impact: Annotated[Path, typer.Option(help="its summary")],
    config: ConfigFile,
    out: Out,
) -> None:
    """Put the options of a fix side by side."""
    from driftscope.config import load_config
    from driftscope.stages import decompose

    decompose.fix_scope(table, impact, load_config(config).decomposition, out)


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
