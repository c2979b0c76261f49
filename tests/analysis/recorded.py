"""Traces of small random models, sound or with one op or one tap that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.clean_engines import CleanEngine, Habits
from driftscope.analysis.random_models import Shape, random_weights, write_random_model
from driftscope.artifacts.model import Artifact
from driftscope.engines.own import record
from driftscope.engines.trace import RAGGED, Trace, TraceWriter
from driftscope.forward.architecture import tap_name, taps
from driftscope.forward.arithmetic import Arithmetic

LENGTHS = (2, 5, 12, 23)

Engine = Callable[[Artifact, Arithmetic, Habits], CleanEngine]


def shape(architecture: str) -> Shape:
    """Two layers; mistral with a window that some prompts are longer than."""
    window = 6 if architecture == "mistral" else None
    return Shape(architecture, 256, 256, heads=4, kv_heads=2, head_dim=32, layers=2, window=window)


def model(folder: Path, architecture: str = "llama", fmt: str = "F32", *, seed: int = 1) -> Artifact:
    """A random model."""
    folder.mkdir(parents=True, exist_ok=True)
    of = shape(architecture)
    return write_random_model(folder / f"{fmt}.bin", of.config, random_weights(of, seed), fmt)


def sound(artifact: Artifact, arithmetic: Arithmetic, habits: Habits) -> CleanEngine:
    """An engine without a fault."""
    return CleanEngine(artifact, arithmetic, habits)


def recorded(
    artifact: Artifact,
    folder: Path,
    *,
    engine: Engine = sound,
    arithmetic: Arithmetic | None = None,
    habits: Habits | None = None,
    lengths: tuple[int, ...] = LENGTHS,
    wanted: Callable[[int, str], bool] = lambda layer, tap: True,
) -> Trace:
    """A trace of prompts of random tokens."""
    random = np.random.Generator(np.random.Philox(len(lengths)))
    prompts = [
        (f"p{n}", [int(i) for i in random.integers(0, artifact.config.vocab_size, size=n)]) for n in lengths
    ]
    arithmetic = arithmetic or Arithmetic.of("f32")
    running = engine(artifact, arithmetic, habits or Habits("lanes-8", own_exponential=True))
    return record(running, prompts, folder, declared=arithmetic, wanted=wanted)


def rewritten(trace: Trace, artifact: Artifact, folder: Path, values: Mapping[tuple[int, str], Any]) -> Trace:
    """The same trace with other values of some taps."""
    arrays: dict[str, NDArray[Any]] = {}
    for tap in taps(artifact.config):
        layer, name = tap.layer, tap.op.tap
        if not trace.has(layer, name):
            continue
        full = tap_name(layer, name)
        if name in RAGGED:
            parts = values.get((layer, name), None) or trace.ragged(layer, name)
            for (prompt, _), part in zip(trace.manifest.prompts, parts, strict=True):
                arrays[f"{full}[{prompt}]"] = np.asarray(part, np.float32)
        else:
            found = values.get((layer, name))
            arrays[full] = np.asarray(trace.tap(layer, name) if found is None else found, np.float32)
    writer = TraceWriter(folder)
    writer.write("all", arrays)
    return writer.finish(trace.manifest)
