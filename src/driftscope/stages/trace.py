"""Trace: one chunk of layers of one path, its taps' statistics, and the state that the next chunk needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.evidence.digest import sha256_file
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.manifest import open_model
from driftscope.evidence.store import read_table, write_json, write_table
from driftscope.stages.arrays import Arrays, write_arrays
from driftscope.stages.device import device_parameter, take_device
from driftscope.stages.prompts import prompt_set, slices_of

if TYPE_CHECKING:
    from driftscope.artifacts.model import ModelConfig
    from driftscope.engines.trace import Trace
    from driftscope.forward.architecture import Op, Tap
    from driftscope.forward.model import ForwardPass


def chunk_layers(index: int, count: int, n_layers: int) -> range:
    """Return the layers of one chunk; chunks differ by one layer at most.

    Raises:
        InputError: there are more chunks than layers.
    """
    if count > n_layers:
        raise InputError(f"trace.chunks is {count}, but the model has {n_layers} layers; use fewer chunks")
    return range(index * n_layers // count, (index + 1) * n_layers // count)


class Recorder:
    """Takes the taps of a pass: statistics of all, full arrays of those that are kept."""

    def __init__(
        self, forward: ForwardPass, path: str, prompts: Sequence[dict[str, Any]], keep: Sequence[str]
    ) -> None:
        from driftscope.forward.architecture import taps

        self._forward = forward
        self._path = path
        self._prompts = slices_of(list(prompts))
        self._keep = keep
        self._ops: dict[tuple[int, str], Op] = {
            (tap.layer, tap.op.tap): tap.op for tap in taps(forward.config)
        }
        self.rows: list[dict[str, Any]] = []
        self.arrays: dict[str, NDArray[np.float32]] = {}

    def wants(self, layer: int, name: str) -> bool:
        """Every tap is wanted: each has statistics."""
        return True

    def __call__(
        self, layer: int, name: str, array: NDArray[np.float32], *, sequence: int | None = None
    ) -> None:
        """Record one tap, of one prompt where the tap's width depends on its length."""
        from driftscope.forward.architecture import tap_name

        prompts = self._prompts
        if sequence is not None:
            prompt, tokens = self._prompts[sequence]
            prompts = [(prompt, slice(0, tokens.stop - tokens.start))]
        self._add_statistics(layer, name, array, prompts)
        full = tap_name(layer, name)
        if any(fnmatchcase(full, pattern) for pattern in self._keep):
            self.arrays[full if sequence is None else f"{full}[{prompts[0][0]}]"] = array.copy()

    def _add_statistics(
        self, layer: int, name: str, array: NDArray[np.float32], prompts: Sequence[tuple[str, slice]]
    ) -> None:
        from driftscope.analysis.divergence import scopes_of
        from driftscope.kernels.statistics import tap_statistics

        op = self._ops[layer, name]
        moments = tap_statistics(array)
        about = {
            "capture_point": op.capture_point,
            "path": self._path,
            "artifact": self._path.partition(".")[0],
            "activation_format": self._forward.activation_format(layer, op),
        }
        for prompt, tokens in prompts:
            for scope, position, part in scopes_of(tokens.stop - tokens.start):
                first, end = tokens.start + part.start, tokens.start + part.stop
                pooled = moments.pooled(first, end, origin=tokens.start)
                place = {"prompt": prompt, "layer": layer, "tap": name, "scope": scope, "position": position}
                self.rows.append({**place, **about, **vars(pooled)})


def chunk(
    model: Path,
    path: str,
    prompts_file: Path,
    index: int,
    count: int,
    keep: Sequence[str],
    state_in: Path | None,
    table_out: Path,
    taps_out: Path,
    state_out: Path,
    *,
    threads: int,
    device: str = "cpu",
) -> None:
    """Run one chunk of layers; the first one embeds the tokens, the last one adds the head.

    Args:
        model: manifest of the artifact that the path runs on.
        path: ``<role>.<arithmetic>``.
        prompts_file: the encoded prompts.
        index: this chunk.
        count: chunks in all.
        keep: globs of the taps whose arrays are kept.
        state_in: the state that the chunk before wrote; None for the first.
        table_out: statistics of the taps.
        taps_out: arrays of the kept taps.
        state_out: the residual stream after the chunk.
        threads: for the matmuls; the result does not depend on it.
        device: as it is asked for (`driftscope.kernels.device.REQUESTS`).
    """
    from driftscope.engines.own import forward_pass
    from driftscope.evidence.schemas import COLUMNS, frame_of
    from driftscope.forward.batch import TokenBatch

    artifact, digest = open_model(model)
    prompts, prompts_digest = prompt_set(prompts_file, "trace")
    layers = chunk_layers(index, count, artifact.config.num_layers)
    device = take_device(device)
    forward = forward_pass({path.partition(".")[0]: artifact}, path, threads=threads, device=device)
    batch = TokenBatch.of([prompt["ids"] for prompt in prompts])
    recorder = Recorder(forward, path, prompts, keep)
    if state_in is None:
        hidden = forward.embed(batch, recorder)
    else:
        hidden = Arrays(state_in)["hidden"]
    hidden = forward.run_layers(hidden, batch, layers, recorder)
    if index == count - 1:
        forward.head(hidden, tap=recorder)
    write_arrays({"hidden": hidden}, state_out)
    write_arrays(recorder.arrays, taps_out)
    columns = list(COLUMNS["trace"])
    rows = [{column: row[column] for column in columns} for row in recorder.rows]
    inputs = {path.partition(".")[0]: digest, "prompts": prompts_digest}
    parameters = {"path": path, "chunk": [index, count], **device_parameter(device)}
    header = EvidenceHeader.of("trace", inputs, parameters)
    write_table(frame_of(rows, "trace"), table_out, "trace", header)


def join(
    model: Path, prompts_file: Path, path: str, chunks: Sequence[Path], out: Path, manifest: Path
) -> None:
    """Join the chunks of one path into one table, in the order of the pass.

    Args:
        model: manifest of the artifact that the path runs on.
        prompts_file: the encoded prompts.
        path: ``<role>.<arithmetic>``.
        chunks: the statistics of each chunk.
        out: the ``trace`` table of the path.
        manifest: where to say what the kept taps are, so that their folder is a trace.
    """
    import polars as pl

    from driftscope import __version__
    from driftscope.engines.own import policy_of
    from driftscope.engines.trace import TraceManifest, write_manifest
    from driftscope.forward.arithmetic import Arithmetic

    artifact, digest = open_model(model)
    prompts, prompts_digest = prompt_set(prompts_file, "trace")
    frame = pl.concat([read_table(chunk_path, "trace") for chunk_path in chunks])
    inputs = {path.partition(".")[0]: digest, "prompts": prompts_digest}
    write_table(frame, out, "trace", EvidenceHeader.of("trace", inputs, {"path": path}))
    about = TraceManifest(
        prompts=tuple((prompt["id"], tuple(prompt["ids"])) for prompt in prompts),
        engine={"name": "driftscope", "version": __version__, "options": {"path": path}},
        model={"sha256": digest, "architecture": artifact.config.architecture},
        arithmetic=Arithmetic(policy_of(path)),
        capture_points={
            row["tap"]: row["capture_point"]
            for row in frame.select("tap", "capture_point").unique(maintain_order=True).iter_rows(named=True)
        },
    )
    files = [chunk_path.name.replace("chunk_", "taps_") for chunk_path in chunks]
    write_manifest(manifest.parent, about, [str(Path(name).with_suffix(".safetensors")) for name in files])


def compare(
    teacher: Path,
    traces: Sequence[tuple[str, Path]],
    pairs: Sequence[tuple[str, str]],
    index: int,
    count: int,
    out: Path,
) -> None:
    """Compare the kept taps of one chunk of layers between paths: the propagated error.

    Args:
        teacher: its manifest, for the number of layers.
        traces: path name and its trace's manifest.
        pairs: the reference path and the other.
        index: this chunk.
        count: chunks in all.
        out: the ``divergence`` table of the chunk.

    Raises:
        InputError: traces of other tokens; a tap that one side keeps and the other neither has nor declares
            absent; or nothing to compare.
    """
    from driftscope.analysis.divergence import compare_tap
    from driftscope.engines.trace import RAGGED, Trace
    from driftscope.evidence.schemas import COLUMNS, frame_of

    config = open_model(teacher)[0].config
    layers = chunk_layers(index, count, config.num_layers)
    places = [
        (tap.layer, tap.op.tap) for tap in _taps_of_chunk(config, layers, index == 0, index == count - 1)
    ]
    opened = {path: Trace(file.parent) for path, file in traces}
    columns = list(COLUMNS["divergence"])
    rows = []
    for reference, other in pairs:
        a, b = opened[reference], opened[other]
        if a.manifest.prompts != b.manifest.prompts:
            raise InputError(f"{a.folder} and {b.folder}: the token ids differ; nothing can be compared")
        ids = [prompt for prompt, _ in a.manifest.prompts]
        for layer, tap in places:
            if not _both_have(a, b, layer, tap):
                continue
            if tap in RAGGED:
                compared = [
                    (one, two, [(prompt, slice(0, one.shape[0]))])
                    for prompt, one, two in zip(ids, a.ragged(layer, tap), b.ragged(layer, tap), strict=True)
                ]
            else:
                where = list(zip(ids, a.batch.slices, strict=True))
                compared = [(a.tap(layer, tap), b.tap(layer, tap), where)]
            for one, two, where in compared:
                for row in compare_tap(one, two, where):
                    about = {"pair": f"{reference}|{other}", "layer": layer, "tap": tap, "kind": "propagated"}
                    values = {**about, **row}
                    rows.append({column: values[column] for column in columns})
    if not rows:
        raise InputError("no tap is kept, so nothing can be compared; widen trace.keep in the configuration")
    inputs = {path: sha256_file(file) for path, file in traces}
    header = EvidenceHeader.of("divergence", inputs, {"pairs": [list(pair) for pair in pairs]})
    write_table(frame_of(rows, "divergence"), out, "divergence", header)


def _taps_of_chunk(config: ModelConfig, layers: range, first: bool, last: bool) -> Iterator[Tap]:
    """The taps of some layers; the first chunk has the embedding, the last one the head."""
    from driftscope.forward.architecture import Tap, embedding_op, head_ops, layer_ops
    from driftscope.forward.policy import WHOLE_MODEL

    if first:
        yield Tap(WHOLE_MODEL, embedding_op(config))
    for layer in layers:
        yield from (Tap(layer, op) for op in layer_ops(config))
    if last:
        yield from (Tap(WHOLE_MODEL, op) for op in head_ops(config))


def _both_have(a: Trace, b: Trace, layer: int, tap: str) -> bool:
    """Whether both traces have a tap. One that is on one side only must be declared absent on the other."""
    from driftscope.forward.architecture import tap_name

    have = a.has(layer, tap), b.has(layer, tap)
    if have[0] == have[1]:
        return have[0]
    without = b if have[0] else a
    if tap not in without.manifest.absent:
        raise InputError(
            f"{a.folder} and {b.folder}: tap {tap_name(layer, tap)} is kept on one side only; "
            f"{without.folder} does not say why it is absent"
        )
    return False


def join_divergence(chunks: Sequence[Path], out: Path) -> None:
    """Join the chunks of the propagated error."""
    import polars as pl

    frame = pl.concat([read_table(path, "divergence") for path in chunks])
    inputs = {path.name: sha256_file(path) for path in chunks}
    write_table(frame, out, "divergence", EvidenceHeader.of("divergence", inputs, {}))


def admissibility(
    prompts_file: Path, teacher: Path, candidate: Path, traces: Sequence[tuple[str, Path]], out: Path
) -> None:
    """Check that the traces may be compared: same tokens, scopes, counts, capture points, all there."""
    from driftscope.analysis.admissibility import TraceMetadata
    from driftscope.analysis.admissibility import admissibility as judge
    from driftscope.analysis.divergence import scopes_of
    from driftscope.forward.architecture import taps

    prompts, digest = prompt_set(prompts_file, "trace")
    digests = {prompt["id"]: prompt["sha256"] for prompt in prompts}
    models = {"teacher": open_model(teacher)[0], "candidate": open_model(candidate)[0]}
    metadata = []
    for path, file in traces:
        expected = [
            (prompt["id"], tap.layer, tap.op.tap, scope, position)
            for tap in taps(models[path.partition(".")[0]].config)
            for prompt in prompts
            for scope, position, _ in scopes_of(prompt["tokens"])
        ]
        rows = read_table(file, "trace").iter_rows(named=True)
        metadata.append(TraceMetadata.of_rows(path, digests, rows, expected))
    inputs = {"prompts": digest, **{path: sha256_file(file) for path, file in traces}}
    write_json(judge(metadata), out, EvidenceHeader.of("divergence", inputs, {}))
