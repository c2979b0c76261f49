"""What a person does with engines: trace, compare, replay."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from driftscope.cli.options import AsJson, Threads, open_any
from driftscope.cli.show import print_json, progress_bar
from driftscope.errors import InputError

if TYPE_CHECKING:
    from driftscope.engines.trace import Trace
    from driftscope.forward.arithmetic import Arithmetic

ALL_CORES = os.cpu_count() or 1

_OPTIONS = {
    "own": {"path", "activation", "kv_type"},
    "llama.cpp": {"kv_type", "flash_attention", "no_repack", "batch_size"},
    "transformers": {"dtype", "attention", "device"},
    "apr": {"stages"},
}
"""Options that an engine takes."""

Layers = Annotated[
    str, typer.Option("--layers", help="only these, e.g. 3, 0:4, or -1 for embedding and head")
]


def trace(
    model: Annotated[Path, typer.Argument(help="a GGUF file, a safetensors folder, or a manifest")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")],
    engine: Annotated[str, typer.Option(help="own, llama.cpp, transformers or apr")] = "own",
    prompt: Annotated[list[str] | None, typer.Option(help="text, encoded by the model's tokenizer")] = None,
    ids: Annotated[list[str] | None, typer.Option(help="token ids, e.g. 1,2,3")] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="prompts.json of a run, or trace.json of another trace")
    ] = None,
    taps: Annotated[list[str] | None, typer.Option(help="globs of the taps to keep; else all")] = None,
    path: Annotated[str, typer.Option(help="own: f32 or int8-dot; f32 by default")] = "",
    activation: Annotated[str, typer.Option(help="own: activation format instead of the path's")] = "",
    kv_type: Annotated[
        str, typer.Option(help="own: f32, f16; llama.cpp: f16 (default), f32, bf16, q8_0")
    ] = "",
    flash_attention: Annotated[bool, typer.Option("--flash-attention", help="llama.cpp: fused")] = False,
    no_repack: Annotated[bool, typer.Option("--no-repack", help="llama.cpp: weights as stored")] = False,
    batch_size: Annotated[int, typer.Option(help="llama.cpp: tokens at once, 0 for all", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="transformers: f32 (default), bf16 or f16")] = "",
    attention: Annotated[str, typer.Option(help="transformers: eager (default) or sdpa")] = "",
    device: Annotated[str, typer.Option(help="transformers: cpu (default) or cuda")] = "",
    stages: Annotated[
        Path | None, typer.Option(help="apr: the folder that `apr trace --save-tensor` wrote; nothing is run")
    ] = None,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Run a model on an engine and write every op's output."""
    from driftscope.cli.show_traces import print_trace

    given: dict[str, Any] = {
        "path": path,
        "activation": activation,
        "kv_type": kv_type,
        "flash_attention": flash_attention,
        "no_repack": no_repack,
        "batch_size": batch_size,
        "dtype": dtype,
        "attention": attention,
        "device": device,
        "stages": stages,
    }
    given = {name: value for name, value in given.items() if value}
    if engine not in _OPTIONS:
        raise InputError(f"--engine {engine}: is unknown; expected one of {', '.join(_OPTIONS)}")
    for name in given:
        if name not in _OPTIONS[engine]:
            takers = " and ".join(other for other, names in _OPTIONS.items() if name in names)
            raise InputError(f"--{name.replace('_', '-')}: is an option of {takers}, not of {engine}")
    artifact = open_any(model)
    encoded = _encoded(artifact, prompt or [], ids or [], prompts or [])
    with progress_bar("tracing", visible=not as_json) as advance:
        written = _run(engine, artifact, encoded, out, taps or ["*"], given, threads, advance)
    if as_json:
        document = written.manifest.to_dict()
        print_json({"folder": str(out), **{key: document[key] for key in document if key != "files"}})
        return
    print_trace(written)


def compare(
    a: Annotated[Path, typer.Argument(metavar="TRACE_A", help="the reference trace")],
    others: Annotated[list[Path], typer.Argument(metavar="TRACE_B", help="one trace or more")],
    layers: Layers = "",
    max_nmse: Annotated[
        float | None, typer.Option(help="exit 1 where a tap's NMSE is above it; without it any NMSE holds")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="the model of TRACE_A: also split each layer's error by its origin")
    ] = None,
    threads: Threads = ALL_CORES,
    as_json: AsJson = False,
) -> None:
    """Compare traces of the same tokens op by op; of three or more, name the odd one out.

    Exit 1 where the traces may not be compared, an identity inside of one fails, a value is finite on one
    side only, one is odd without declaring what makes it so, or --max-nmse is exceeded.
    """
    from driftscope.analysis.comparison import compare_traces
    from driftscope.cli.show_traces import print_comparison
    from driftscope.engines.trace import Trace

    traces = {name: Trace(folder) for name, folder in _names([a, *others]).items()}
    with progress_bar("comparing", visible=not as_json) as advance:
        found = compare_traces(traces, layers=_layers(layers), progress=advance)
    if weights is not None and found["admissibility"]["admissible"]:
        found["propagation"] = _propagated(traces, open_any(weights), _layers(layers), threads, not as_json)
    found["holds"] = _holds(found, max_nmse)
    if as_json:
        print_json(found)
    else:
        print_comparison(found, max_nmse)
    if not found["holds"]:
        raise typer.Exit(1)


def replay(
    folder: Annotated[Path, typer.Argument(metavar="TRACE", help="a trace's folder")],
    weights: Annotated[Path, typer.Option(help="the model that the engine ran")],
    reference: Annotated[Path | None, typer.Option(help="the model that holds the truth")] = None,
    arithmetic: Annotated[
        str, typer.Option(help="declared, guess, or what the engine is taken to do: f32, int8-dot, bf16, f16")
    ] = "declared",
    kv_type: Annotated[str, typer.Option(help="f32 or f16, with --arithmetic f32 or int8-dot")] = "",
    layers: Layers = "",
    floors: Annotated[
        Path | None,
        typer.Option(help="calibrated floors of a run, floors.json; else this version's, kept in the cache"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="where to write the table, .parquet")
    ] = None,
    limit: Annotated[int, typer.Option(help="rows to show, most above its floor first", min=1)] = 15,
    threads: Threads = ALL_CORES,
    as_json: AsJson = False,
) -> None:
    """Recompute every op of a trace from its own recorded inputs; exit 1 where one is not at its floor."""
    from driftscope.analysis.diagnosis import diagnose, replay_rows, replayer_of
    from driftscope.cli.show_traces import print_diagnosis
    from driftscope.engines.trace import Trace

    if out is not None and out.suffix != ".parquet":
        raise InputError(f"--out {out}: expected a file that ends with .parquet")
    recorded, own = Trace(folder), open_any(weights)
    truth = None if reference is None else open_any(reference)
    guess = None
    if arithmetic == "guess":
        from driftscope.analysis.arithmetic_guess import guess_arithmetic

        with progress_bar("guessing the arithmetic", visible=not as_json) as advance:
            guess = guess_arithmetic(recorded, own, threads=threads, progress=advance)
        declared = guess.arithmetic
    else:
        declared = _arithmetic(arithmetic, kv_type)
    wanted = _layers(layers)
    replayer = replayer_of(recorded, own, truth, arithmetic=declared, threads=threads)
    with progress_bar("replaying", visible=not as_json) as advance:
        rows = replay_rows(replayer, wanted, progress=advance)
    with progress_bar("calibrating the floors", visible=not as_json) as advance:
        known = _floors(floors, advance)
    found = diagnose(recorded, own, truth, declared, known, wanted, threads, path=recorded.name, rows=rows)
    if guess is not None:
        found["guess"] = guess.to_dict()
    if out is not None:
        _write_rows(rows, out, recorded, found)
    if as_json:
        print_json(found)
    else:
        print_diagnosis(found, rows, limit)
    if found["status"] != "done" or found["flagged"] or found["capture_points"]:
        raise typer.Exit(1)


def _encoded(
    artifact: Any, texts: list[str], ids: list[str], files: list[Path]
) -> list[tuple[str, tuple[int, ...]]]:
    """The prompts of the command line, encoded."""
    from driftscope.artifacts.prompts import encode_prompts

    specs: list[dict[str, Any]] = [{"id": f"text-{i}", "text": text} for i, text in enumerate(texts, 1)]
    for i, text in enumerate(ids, 1):
        words = text.replace(",", " ").split()
        if not words or not all(word.isdecimal() for word in words):
            raise InputError(f"--ids {text}: expected token ids, e.g. 1,2,3")
        specs.append({"id": f"ids-{i}", "ids": [int(word) for word in words]})
    for file in files:
        specs += _listed(file)
    if not specs:
        raise InputError("there is no prompt; give --prompt TEXT, --ids 1,2,3 or --prompts FILE")
    names = [spec["id"] for spec in specs]
    if len(set(names)) != len(names):
        raise InputError(f"two prompts have the id {next(n for n in names if names.count(n) > 1)}")
    return [(prompt.id, prompt.token_ids) for prompt in encode_prompts(specs, artifact)]


def _listed(file: Path) -> list[dict[str, Any]]:
    """Prompts of a file: a run's ``prompts.json``, or a trace's manifest."""
    from driftscope.evidence.store import read_json

    document = read_json(file)
    listed = document.get("trace", document.get("prompts"))
    if not isinstance(listed, list) or not listed or not all(map(_is_prompt, listed)):
        raise InputError(f"{file}: lists no prompts; expected `trace` or `prompts` with an id and ids each")
    return [{"id": item["id"], "ids": item["ids"]} for item in listed]


def _is_prompt(item: Any) -> bool:
    ids = item.get("ids") if isinstance(item, dict) else None
    return (
        isinstance(ids, list)
        and isinstance(item.get("id"), str)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
    )


def _run(
    engine: str,
    artifact: Any,
    encoded: list[tuple[str, tuple[int, ...]]],
    out: Path,
    globs: list[str],
    given: dict[str, Any],
    threads: int,
    advance: Any,
) -> Trace:
    from fnmatch import fnmatchcase

    from driftscope.forward.architecture import tap_name

    def wanted(layer: int, tap: str) -> bool:
        return any(fnmatchcase(tap_name(layer, tap), glob) for glob in globs)

    about = {"sha256": _digest(artifact)}
    if engine == "own":
        from driftscope.engines import own
        from driftscope.forward.arithmetic import Arithmetic

        arithmetic = Arithmetic.of(
            given.get("path", "f32"),
            activation=given.get("activation"),
            kv_type=given.get("kv_type", "f32"),
        )
        return own.trace(
            artifact, encoded, out, arithmetic, threads=threads, wanted=wanted, model=about, progress=advance
        )
    if engine == "llama.cpp":
        from driftscope.engines import llama_cpp

        if artifact.container != "gguf":
            raise InputError(f"{artifact.path}: is {artifact.container}; llama.cpp reads GGUF")
        repack = not given.pop("no_repack", False)
        options = llama_cpp.LlamaCppOptions(**given, repack=repack, threads=threads)
        return llama_cpp.trace(
            artifact.path, encoded, out, options, taps=wanted, model=about, progress=advance
        )
    if engine == "apr":
        return _converted(artifact, encoded, out, globs, given.get("stages"))
    from driftscope.engines import transformers

    if artifact.container != "safetensors":
        raise InputError(f"{artifact.path}: is {artifact.container}; transformers reads a safetensors folder")
    chosen = transformers.TransformersOptions(**given, threads=threads)
    return transformers.trace(
        artifact.path, encoded, out, chosen, wanted=wanted, about=about, progress=advance
    )


def _converted(
    artifact: Any,
    encoded: list[tuple[str, tuple[int, ...]]],
    out: Path,
    globs: list[str],
    stages: Path | None,
) -> Trace:
    """The trace of a run of apr that lies on disk."""
    from driftscope.engines.aprt import convert_aprt

    if stages is None:
        raise InputError("--engine apr: needs --stages, the folder that `apr trace --save-tensor` wrote")
    if len(encoded) != 1:
        raise InputError(f"--engine apr: a folder of stages is of one prompt; got {len(encoded)}")
    if globs != ["*"]:
        raise InputError("--taps: is not for apr; every stage of the folder is taken")
    ((prompt, ids),) = encoded
    return convert_aprt(stages, ids, out, config=artifact.config, prompt=prompt)


def _digest(artifact: Any) -> str:
    from driftscope.evidence.digest import sha256_file, sha256_json

    files = [file for file in artifact.files if file.is_file()] or [artifact.path]
    if len(files) == 1:
        return sha256_file(files[0])
    return sha256_json([[file.name, sha256_file(file)] for file in files])


def _names(folders: list[Path]) -> dict[str, Path]:
    """Short names of traces: the last part of the path that tells them apart."""
    resolved = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return dict(zip(names, folders, strict=True))
    twice = next(folder for folder, path in zip(folders, resolved, strict=True) if resolved.count(path) > 1)
    raise InputError(f"{twice}: is given twice; expected different traces")


def _layers(text: str) -> list[int] | None:
    """Read ``3``, ``0:4`` or ``-1``; several are joined by commas."""
    if not text:
        return None
    found: list[int] = []
    for word in text.split(","):
        first, colon, end = word.partition(":")
        try:
            found += range(int(first or 0), int(end)) if colon else [int(first)]
        except ValueError:
            raise InputError(f"--layers {text}: expected e.g. 3, 0:4 or -1") from None
    if not found or min(found) < -1:
        raise InputError(f"--layers {text}: expected e.g. 3, 0:4 or -1")
    return sorted(set(found))


def _arithmetic(text: str, kv_type: str) -> Arithmetic | None:
    from driftscope.forward.arithmetic import Arithmetic

    if text == "declared":
        if kv_type:
            raise InputError("--kv-type: goes with --arithmetic f32 or int8-dot")
        return None
    if text in ("bf16", "f16"):
        return Arithmetic.of("f32", dtype=text)
    if text not in ("f32", "int8-dot"):
        raise InputError(f"--arithmetic {text}: expected declared, guess, f32, int8-dot, bf16 or f16")
    return Arithmetic.of(text, kv_type=kv_type or "f32")


def _propagated(
    traces: dict[str, Trace], artifact: Any, layers: list[int] | None, threads: int, visible: bool
) -> list[dict[str, Any]]:
    """How the error of each trace against the first travels, without first tokens where there are others."""
    from driftscope.analysis.propagation import by_layer, propagation

    (a, reference), *others = traces.items()
    longer = any(len(ids) > 1 for _, ids in reference.manifest.prompts)
    found = []
    for b, trace in others:
        with progress_bar("splitting the error", visible=visible) as advance:
            rows = propagation(
                reference, trace, artifact, pair=f"{a}|{b}", layers=layers, threads=threads, progress=advance
            )
        scope = "all-but-first" if longer else "all"
        found.append({"a": a, "b": b, "scope": scope, "steps": list(by_layer(rows, scope))})
    return found


def _floors(file: Path | None, progress: Callable[[int, int], None]) -> Any:
    from driftscope.analysis.floors import Floors
    from driftscope.evidence.store import read_json
    from driftscope.stages.floors import kept_floors

    return kept_floors(progress) if file is None else Floors.from_dict(read_json(file), str(file))


def _holds(found: dict[str, Any], max_nmse: float | None) -> bool:
    taps = [tap for pair in found["pairs"] for tap in pair["taps"]]
    odd = [item for item in (found["vote"] or {}).get("odd", ()) if not item["declares_alone"]]
    return (
        found["admissibility"]["admissible"]
        and not found["identities"]
        and not odd
        and not any(tap["not_finite"] for tap in taps)
        and (max_nmse is None or all((tap["nmse"] or 0.0) <= max_nmse for tap in taps))
    )


def _write_rows(rows: Any, out: Path, recorded: Any, found: dict[str, Any]) -> None:
    from driftscope.engines.trace import MANIFEST
    from driftscope.evidence.digest import sha256_file
    from driftscope.evidence.header import EvidenceHeader
    from driftscope.evidence.schemas import frame_of
    from driftscope.evidence.store import write_table

    inputs = {"trace": sha256_file(recorded.folder / MANIFEST)}
    parameters = {key: found[key] for key in ("own", "reference", "arithmetic")}
    write_table(frame_of(rows, "replay"), out, "replay", EvidenceHeader.of("replay", inputs, parameters))
