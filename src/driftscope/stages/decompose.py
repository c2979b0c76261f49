"""Decompose: counterfactual passes over the texts' token positions, their energies, shares and impact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.decomposition import Resampling
from driftscope.artifacts.model import Artifact
from driftscope.config import PAIRS, PATHS, DecompositionSpec
from driftscope.errors import InputError
from driftscope.evidence.digest import sha256_file
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.manifest import open_model
from driftscope.evidence.store import read_json, read_table, write_json, write_table
from driftscope.forward.policy import LAYER_SITES, WHOLE_MODEL, Choice, Policy
from driftscope.stages.arrays import Arrays, write_arrays
from driftscope.stages.device import device_parameter, take_device
from driftscope.stages.prompts import prompt_set, slices_of

TEACHER = Choice("teacher", "f32")
CANDIDATE_F32 = Choice("candidate", "f32")
CANDIDATE_INT8 = Choice("candidate", "int8-dot")
ENGINES = {"llama.cpp": "candidate.llama.cpp"}
"""Another engine that runs the candidate, and the path that stands for it."""


@dataclass(frozen=True)
class Run:
    """One counterfactual pass: a policy, and the base that its output is held against.

    Attributes:
        by: ``layer``, ``site`` or ``control``.
        item: layer number, site, ``embed``, ``head``, or the control's name.
        mechanism: ``weight``, ``activation`` or ``both``.
        policy: the pass.
        base: path whose output is taken off.
        first_layer: first layer at which the policy departs from the base; the layers before are not run.
            0 with `embeds` False starts from the base's embedding.
        embeds: whether the policy departs at the embedding already.
    """

    by: str
    item: str
    mechanism: str
    policy: Policy
    base: str
    first_layer: int
    embeds: bool = False


def runs(n_layers: int) -> list[Run]:
    """List the counterfactual passes of a model: each layer and each site alone, and the controls."""
    teacher, candidate = Policy(TEACHER), Policy(CANDIDATE_F32)
    weight = (teacher, CANDIDATE_F32, "weight", "teacher.f32")
    activation = (candidate, CANDIDATE_INT8, "activation", "candidate.f32")

    def run(
        kind: tuple[Policy, Choice, str, str],
        by: str,
        item: str,
        first: int,
        layers: Sequence[int] | None,
        sites: Sequence[str] | None,
        embeds: bool = False,
    ) -> Run:
        base_policy, choice, mechanism, base = kind
        policy = base_policy.override(choice, layers=layers, sites=sites)
        return Run(by, item, mechanism, policy, base, first, embeds)

    found = [run(weight, "layer", "embed", 0, [WHOLE_MODEL], ["embed"], embeds=True)]
    for kind in (weight, activation):
        found += [run(kind, "layer", str(layer), layer, [layer], None) for layer in range(n_layers)]
        found.append(run(kind, "layer", "head", n_layers, [WHOLE_MODEL], ["norms", "lm_head"]))
    found.append(run(weight, "site", "embed", 0, None, ["embed"], embeds=True))
    found.append(run(weight, "site", "norms", 0, None, ["norms"]))
    for kind in (weight, activation):
        found += [run(kind, "site", site, 0, None, [site]) for site in LAYER_SITES]
        found.append(run(kind, "site", "lm_head", n_layers, None, ["lm_head"]))
    every = teacher
    for layer in (*range(n_layers), WHOLE_MODEL):
        every = every.override(CANDIDATE_INT8, layers=[layer])
    nothing = teacher.override(CANDIDATE_INT8, layers=[], sites=[])
    rounded_cache = replace(Policy(CANDIDATE_INT8), kv_type="f16")
    return [
        *found,
        Run("control", "no-op", "both", nothing, "teacher.f32", 0, True),
        Run("control", "all", "both", every, "teacher.f32", 0, True),
        Run("control", "f16-cache", "both", rounded_cache, "candidate.int8-dot", 0, True),
    ]


def deal(n_layers: int, jobs: int) -> list[list[int]]:
    """Deal the runs out to jobs of about the same work; a list of run numbers each."""
    from driftscope.analysis.weights.pairs import plan_shards

    head = max(n_layers // 5, 1)
    work = {f"{i:05d}": n_layers - run.first_layer + head for i, run in enumerate(runs(n_layers))}
    return [[int(name) for name in job] for job in plan_shards(work, jobs)]


def base(
    teacher: Path,
    candidate: Path,
    prompts_file: Path,
    path: str,
    minimum: int,
    out: Path,
    *,
    threads: int,
    device: str = "cpu",
) -> None:
    """Run one path over the texts; keep its logits and the input of every layer."""
    from driftscope.engines.own import forward_pass
    from driftscope.forward.batch import TokenBatch

    artifacts, _ = _open(teacher, candidate)
    texts, _ = prompt_set(prompts_file, "texts")
    positions = sum(text["tokens"] for text in texts)
    if positions < minimum:
        raise InputError(
            f"decomposition.texts have {positions} token positions; decomposition.minimum_positions asks "
            f"for {minimum}; give more or longer texts"
        )
    forward = forward_pass(artifacts, path, threads=threads, device=take_device(device))
    batch = TokenBatch.of([text["ids"] for text in texts])
    hidden = forward.embed(batch)
    arrays = {"hidden.0": hidden}
    for layer in range(forward.config.num_layers):
        hidden = forward.run_layers(hidden, batch, [layer])
        arrays[f"hidden.{layer + 1}"] = hidden
    arrays["logits"] = forward.head(hidden)
    write_arrays(arrays, out)


def engine_base(candidate: Path, prompts_file: Path, engine: str, out: Path) -> None:
    """Run the candidate over the texts on an engine that is not ours; keep its logits.

    One thread, llama.cpp's default f16 cache: its sums then repeat bit for bit on one machine.

    Raises:
        InputError: no such engine, it is not installed, or it cannot read the candidate.
    """
    from driftscope.engines import llama_cpp
    from driftscope.forward.batch import TokenBatch

    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} is unknown; expected one of {', '.join(ENGINES)}")
    artifact, _ = open_model(candidate)
    if artifact.container != "gguf":
        raise InputError(
            f"{artifact.path}: llama.cpp reads GGUF files; this candidate is {artifact.container}"
        )
    texts, _ = prompt_set(prompts_file, "texts")
    batch = TokenBatch.of([text["ids"] for text in texts])
    write_arrays({"logits": llama_cpp.logits(artifact.path, batch)}, out)


def counterfactuals(
    teacher: Path,
    candidate: Path,
    prompts_file: Path,
    bases: Sequence[tuple[str, Path]],
    index: int,
    jobs: int,
    out: Path,
    *,
    threads: int,
    device: str = "cpu",
    progress: Any = None,
) -> None:
    """Run one job's share of the counterfactual passes; keep the energy at each position."""
    from driftscope.analysis.decomposition import centred_energy
    from driftscope.evidence.schemas import frame_of
    from driftscope.forward.batch import TokenBatch
    from driftscope.forward.model import ForwardPass

    artifacts, inputs = _open(teacher, candidate)
    texts, digest = prompt_set(prompts_file, "texts")
    batch = TokenBatch.of([text["ids"] for text in texts])
    n_layers = artifacts["teacher"].config.num_layers
    files = {path: Arrays(file) for path, file in bases}
    listed, mine = runs(n_layers), deal(n_layers, jobs)[index]
    if not mine:
        raise InputError(
            f"decomposition.jobs is {jobs}, but there are only {len(listed)} runs; use fewer jobs"
        )
    device = take_device(device)
    places = _places(texts)
    rows: list[dict[str, Any]] = []
    if index == 0:
        rows += _totals(files, places)
    for done, number in enumerate(mine):
        run = listed[number]
        forward = ForwardPass(artifacts, run.policy, threads=threads, device=device)
        if run.embeds:
            hidden = forward.embed(batch)
        else:
            hidden = files[run.base][f"hidden.{run.first_layer}"]
        hidden = forward.run_layers(hidden, batch, range(run.first_layer, n_layers))
        energy = centred_energy(forward.head(hidden) - files[run.base]["logits"])
        rows += _energy_rows(run.by, run.item, run.mechanism, energy, places)
        if progress is not None:
            progress(done + 1, len(mine))
    parameters = {"job": [index, jobs], **device_parameter(device)}
    header = EvidenceHeader.of("decompose", {**inputs, "texts": digest}, parameters)
    write_table(frame_of(rows, "energies"), out, "energies", header)


def shares(jobs: Sequence[Path], spec: DecompositionSpec, table_out: Path, out: Path) -> None:
    """Join the jobs' energies in the order of the runs, and turn them into shares."""
    import polars as pl

    from driftscope.analysis.decomposition import decompose

    frame = pl.concat([read_table(path, "energies") for path in jobs])
    layers = frame.filter(by="layer", mechanism="activation")["item"].n_unique() - 1
    order = [("total", "weight", "weight"), ("total", "activation", "activation"), ("total", "all", "both")]
    order += [(run.by, run.item, run.mechanism) for run in runs(layers)]
    rank = {"|".join(key): index for index, key in enumerate(order)}
    key = pl.concat_str(["by", "item", "mechanism"], separator="|")
    # A stable sort keeps the positions of a run in their order.
    frame = frame.sort(key.replace_strict(rank, return_dtype=pl.Int64), maintain_order=True)
    inputs = {path.name: sha256_file(path) for path in jobs}
    write_table(frame, table_out, "energies", EvidenceHeader.of("decompose", inputs, {}))
    document = decompose(frame, _resampling(spec), spec.minimum_positions)
    header = EvidenceHeader.of("decompose", {"energies": sha256_file(table_out)}, _parameters(spec))
    write_json(document, out, header)


def impact(
    prompts_file: Path, bases: Sequence[tuple[str, Path]], spec: DecompositionSpec, table_out: Path, out: Path
) -> None:
    """Compare the paths' next-token distributions at every position of the texts."""
    from driftscope.analysis.impact import impact_rows, summarise
    from driftscope.evidence.schemas import frame_of

    texts, digest = prompt_set(prompts_file, "texts")
    places = _places(texts)
    following: list[int] = []
    for text in texts:
        following += [*text["ids"][1:], -1]
    files = {path: Arrays(file) for path, file in bases}
    rows: list[dict[str, Any]] = []
    engines = [path for path in ENGINES.values() if path in files]
    parities = [(path, ours) for path in engines for ours in ("candidate.int8-dot", "candidate.f32")]
    for reference, other in (*PAIRS, *parities):
        a, b = files[reference]["logits"], files[other]["logits"]
        rows += impact_rows(a, b, np.array(following), places, f"{reference}|{other}")
    frame = frame_of(rows, "impact")
    header = EvidenceHeader.of("decompose", {"texts": digest, **_digests(bases)}, {})
    write_table(frame, table_out, "impact", header)
    write_json(
        summarise(frame, _resampling(spec)),
        out,
        EvidenceHeader.of("decompose", {"impact": sha256_file(table_out)}, _parameters(spec)),
    )


def fix_scope(impact_table: Path, impact_file: Path, spec: DecompositionSpec, out: Path) -> None:
    """Put what each option of a fix costs against the teacher side by side, position by position."""
    from driftscope.analysis.impact import mean_kl_difference

    inputs = {"impact": sha256_file(impact_file), "table": sha256_file(impact_table)}
    header = EvidenceHeader.of("decompose", inputs, _parameters(spec))
    document = read_json(impact_file)
    if document["status"] != "done":
        write_json({"status": "not-run", "reason": document["reason"], "options": []}, out, header)
        return
    pairs = {pair["pair"]: pair for pair in document["pairs"]}
    integer, f32 = "teacher.f32|candidate.int8-dot", "teacher.f32|candidate.f32"
    fields = ("positions", "mean_kl", "mean_kl_low", "mean_kl_high", "same_top1")
    options = [
        {"option": name, "what": what, "pair": pair, **{field: pairs[pair][field] for field in fields}}
        for name, what, pair in (
            ("A", "integer arithmetic at every site", integer),
            ("B", "f32 arithmetic at every site", f32),
        )
    ]
    frame, resampling = read_table(impact_table, "impact"), _resampling(spec)

    def nearer(a: str, b: str) -> dict[str, Any]:
        difference, low, high = mean_kl_difference(frame, a, b, resampling)
        closer = "B" if low > 0 else "A" if high < 0 else "undecided"
        return {"a_minus_b": {"mean_kl": difference, "low": low, "high": high}, "closer": closer}

    fidelity = nearer(integer, f32)
    parity: dict[str, Any] = {
        "status": "not-run",
        "reason": "no other engine was run; decomposition.engines in the configuration names them",
    }
    for engine, path in ENGINES.items():
        if f"{path}|candidate.f32" in pairs:
            sides = (f"{path}|candidate.int8-dot", f"{path}|candidate.f32")
            parity = {
                "status": "done",
                "engine": engine,
                "mean_kl": {option: pairs[pair]["mean_kl"] for option, pair in zip("AB", sides, strict=True)},
                **nearer(*sides),
            }
    result = {
        "options": options,
        "a_minus_b": fidelity["a_minus_b"],
        "confidence": spec.confidence,
        "closer_to_teacher": fidelity["closer"],
        "parity": parity,
    }
    write_json(result, out, header)


def _open(teacher: Path, candidate: Path) -> tuple[dict[str, Artifact], dict[str, str]]:
    a, digest_a = open_model(teacher)
    b, digest_b = open_model(candidate)
    return {"teacher": a, "candidate": b}, {"teacher": digest_a, "candidate": digest_b}


def _places(texts: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(text, i) for text, rows in slices_of(texts) for i in range(rows.stop - rows.start)]


def _totals(files: dict[str, Arrays], places: list[tuple[str, int]]) -> list[dict[str, Any]]:
    from driftscope.analysis.decomposition import centred_energy

    teacher, candidate, integer = (files[path]["logits"] for path in PATHS)
    return [
        *_energy_rows("total", "weight", "weight", centred_energy(candidate - teacher), places),
        *_energy_rows("total", "activation", "activation", centred_energy(integer - candidate), places),
        *_energy_rows("total", "all", "both", centred_energy(integer - teacher), places),
    ]


def _energy_rows(
    by: str, item: str, mechanism: str, energy: NDArray[np.float64], places: list[tuple[str, int]]
) -> list[dict[str, Any]]:
    # Where a logit is not finite there is no energy; the position stays in the table, as null.
    return [
        {
            "by": by,
            "item": item,
            "mechanism": mechanism,
            "sequence": sequence,
            "position": position,
            "energy": float(value) if np.isfinite(value) else None,
        }
        for (sequence, position), value in zip(places, energy, strict=True)
    ]


def _resampling(spec: DecompositionSpec) -> Resampling:
    return Resampling(spec.block_positions, spec.resamples, spec.confidence, spec.seed)


def _parameters(spec: DecompositionSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude={"texts", "jobs"})


def _digests(bases: Sequence[tuple[str, Path]]) -> dict[str, str]:
    return {path: sha256_file(file) for path, file in bases}
