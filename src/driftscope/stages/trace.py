"""Trace: one chunk of layers of one path, its taps' statistics, and the state that the next chunk needs."""

from __future__ import annotations

from collections.abc import Sequence
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
    from driftscope.forward.architecture import Op
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
    write_arrays(recorder.arrays or {"none": np.zeros(0, np.float32)}, taps_out)
    columns = list(COLUMNS["trace"])
    rows = [{column: row[column] for column in columns} for row in recorder.rows]
    inputs = {path.partition(".")[0]: digest, "prompts": prompts_digest}
    parameters = {"path": path, "chunk": [index, count], **device_parameter(device)}
    header = EvidenceHeader.of("trace", inputs, parameters)
    write_table(frame_of(rows, "trace"), table_out, "trace", header)


def join(model: Path, prompts_file: Path, path: str, chunks: Sequence[Path], out: Path) -> None:
    """Join the chunks of one path into one table, in the order of the pass."""
    import polars as pl

    _, digest = open_model(model)
    _, prompts_digest = prompt_set(prompts_file, "trace")
    frame = pl.concat([read_table(chunk_path, "trace") for chunk_path in chunks])
    inputs = {path.partition(".")[0]: digest, "prompts": prompts_digest}
    write_table(frame, out, "trace", EvidenceHeader.of("trace", inputs, {"path": path}))


def compare(
    prompts_file: Path, taps: Sequence[tuple[str, Path]], pairs: Sequence[tuple[str, str]], out: Path
) -> None:
    """Compare the kept taps of one chunk between paths: the propagated error.

    Args:
        prompts_file: the encoded prompts.
        taps: path name and its file of kept taps.
        pairs: the reference path and the other.
        out: the ``divergence`` table of the chunk.
    """
    from driftscope.analysis.divergence import compare_tap
    from driftscope.evidence.schemas import COLUMNS, frame_of

    prompts, prompts_digest = prompt_set(prompts_file, "trace")
    places = slices_of(prompts)
    lengths = {prompt: tokens.stop - tokens.start for prompt, tokens in places}
    files = {path: Arrays(file) for path, file in taps}
    columns = list(COLUMNS["divergence"])
    rows = []
    for reference, other in pairs:
        a, b = files[reference], files[other]
        if a.names != b.names:
            odd = sorted(set(a.names) ^ set(b.names))
            raise InputError(f"{a.path} and {b.path}: tap {odd[0]} is kept on one side only")
        for name in a.names:
            if name == "none":
                continue
            full, _, prompt = name.rstrip("]").partition("[")
            layer, tap = _place_of(full)
            where = [(prompt, slice(0, lengths[prompt]))] if prompt else places
            for row in compare_tap(a[name], b[name], where):
                values = {
                    "pair": f"{reference}|{other}",
                    "layer": layer,
                    "tap": tap,
                    "kind": "propagated",
                    **row,
                }
                rows.append({column: values[column] for column in columns})
    if not rows:
        raise InputError("no tap is kept, so nothing can be compared; widen trace.keep in the configuration")
    inputs = {"prompts": prompts_digest, **{path: sha256_file(file) for path, file in taps}}
    header = EvidenceHeader.of("divergence", inputs, {"pairs": [list(pair) for pair in pairs]})
    write_table(frame_of(rows, "divergence"), out, "divergence", header)


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


def _place_of(full: str) -> tuple[int, str]:
    if full.startswith("layers."):
        _, layer, tap = full.split(".", 2)
        return int(layer), tap
    return -1, full
