"""llama.cpp as an engine, through the low-level API of llama-cpp-python (extra ``llama-cpp``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from driftscope.engines.llama_cpp_session import NAME, LlamaCppOptions, Session, load_api
from driftscope.forward.batch import TokenBatch

if TYPE_CHECKING:
    from driftscope.engines.llama_cpp_graph import GraphTensor
    from driftscope.engines.trace import Trace
    from driftscope.forward.arithmetic import Arithmetic

__all__ = ["NAME", "LlamaCppOptions", "Observer", "declared_arithmetic", "logits", "trace", "version"]

_DEFAULTS = LlamaCppOptions()

Observer = Callable[[str, NDArray[np.float32]], None]
"""Called with the name of a tensor of llama.cpp's graph (``ffn_out-3``) and a view of it, valid during the
call. One name comes several times where llama.cpp names a tensor and then its views alike."""


def logits(
    path: Path,
    batch: TokenBatch,
    options: LlamaCppOptions = _DEFAULTS,
    *,
    observer: Observer | None = None,
) -> NDArray[np.float32]:
    """Logits of every token.

    Each sequence is decoded on its own, from an empty cache.

    Args:
        path: a GGUF file.
        batch: token ids.
        options: how llama.cpp runs.
        observer: receives every contiguous float32 tensor of the graph as ``float32[rows, columns]``.

    Returns:
        ``float32[n_tokens, vocabulary]``.

    Raises:
        InputError: llama-cpp-python is not installed, or llama.cpp refuses the file or the batch.
    """
    api = load_api()
    watch = None
    if observer is not None:
        from driftscope.engines.llama_cpp_graph import Watch

        def take(tensor: GraphTensor) -> None:
            values = tensor.values()
            observer(tensor.name, values.reshape(-1, values.shape[-1]))

        watch = Watch(api, lambda tensor: tensor.readable, take)
    with Session(api, path, batch.longest, options, watch and watch.callback) as session:
        out = np.empty((batch.n_tokens, session.vocab_size), dtype=np.float32)
        for tokens in batch.slices:
            ids, rows = batch.ids[tokens], out[tokens]
            for begin, end in session.batches(len(ids)):
                session.decode(ids, begin, end)
                if watch is not None:
                    watch.check()
                rows[begin:end] = session.logits(end - begin)
    return out


def trace(
    path: Path,
    manifest_prompts: Sequence[tuple[str, Sequence[int]]],
    folder: Path,
    options: LlamaCppOptions = _DEFAULTS,
    *,
    taps: Callable[[int, str], bool] | None = None,
    model: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Trace llama.cpp: every tensor of its graph that is one of our taps.

    Each prompt is decoded on its own, from an empty cache. The taps of one layer are in memory at a time.

    Args:
        path: a GGUF file.
        manifest_prompts: prompt id and token ids.
        folder: where the trace is written, one file for each prompt and layer.
        options: how llama.cpp runs.
        taps: whether a tap (layer, name) is kept; None for all.
        model: what the manifest says of the model beyond its file's name and architecture.
        progress: called with the prompts done and their number.

    Raises:
        InputError: llama-cpp-python is not installed; the file is not a GGUF model with the tensors of its
            architecture, or llama.cpp refuses it, the options or the tokens; or nobody has said which
            tensors of its graph are the taps of this architecture.
    """
    from driftscope.artifacts.open import open_artifact
    from driftscope.engines.llama_cpp_graph import Watch
    from driftscope.engines.llama_cpp_recorder import Recorder
    from driftscope.engines.llama_cpp_taps import TapMap, absent_taps, capture_points
    from driftscope.engines.trace import TraceManifest, TraceWriter

    api = load_api()
    artifact = open_artifact(path)
    tap_map = TapMap(artifact)
    prompts = tuple((prompt, tuple(int(token) for token in ids)) for prompt, ids in manifest_prompts)
    batch = TokenBatch.of([ids for _, ids in prompts])
    writer = TraceWriter(folder)
    recorder = Recorder(writer, tap_map, taps)
    watch = Watch(api, recorder.wants, recorder.take)
    recorder.clear()
    try:
        with Session(api, path, batch.longest, options, watch.callback) as session:
            for index, (prompt, tokens) in enumerate(zip(prompts, batch.slices, strict=True)):
                ids = batch.ids[tokens]
                batches = list(session.batches(len(ids)))
                recorder.begin(index, prompt[0], len(ids), whole=len(batches) == 1)
                for begin, end in batches:
                    recorder.batch(begin, end)
                    session.decode(ids, begin, end)
                    watch.check()
                    recorder.end_batch()
                recorder.finish()
                progress(index + 1, len(prompts))
    finally:
        recorder.clear()
    arithmetic, reason = declared_arithmetic(options)
    engine = {"name": NAME, "version": version(), "options": dataclasses.asdict(options)}
    if reason:
        engine["arithmetic"] = reason
    return writer.finish(
        TraceManifest(
            prompts=prompts,
            engine=engine,
            model={
                "file": path.name,
                "architecture": artifact.config.architecture,
                **(model or {}),
            },
            arithmetic=arithmetic,
            capture_points=capture_points(batch.longest, options),
            absent=absent_taps(options, artifact.config.architecture),
        )
    )


def declared_arithmetic(options: LlamaCppOptions) -> tuple[Arithmetic | None, str]:
    """What llama.cpp computes in under some options, or None and the reason why it cannot be said.

    Flash attention reads keys and values as float16 whatever the cache holds; that it also adds them up in
    float16 is beyond what an `Arithmetic` says.
    """
    from driftscope.forward.arithmetic import Arithmetic
    from driftscope.forward.policy import KV_TYPES

    if options.kv_type not in KV_TYPES:
        return None, f"keys and values of type {options.kv_type} have no counterpart in driftscope's kernels"
    kv_type = "f16" if options.flash_attention else options.kv_type
    return Arithmetic.of("int8-dot", kv_type=kv_type), ""


def version() -> dict[str, str]:
    """Version of llama-cpp-python and llama.cpp's own description of how it was built.

    Raises:
        InputError: llama-cpp-python is not installed.
    """
    api = load_api()
    return {"llama-cpp-python": api.__version__, "system": api.llama_print_system_info().decode().strip()}
