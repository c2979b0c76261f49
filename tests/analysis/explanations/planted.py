"""Traces with a planted fault: our pass with an op in plain NumPy, or an artifact with other weights."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tests.forward.models import write_model

from driftscope.analysis.explanations import Context, Explanation, explain
from driftscope.analysis.replay import Replayer
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.engines.own import record
from driftscope.engines.trace import Trace
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.model import ForwardPass

F32 = NDArray[np.float32]

LAYER = 1


def prompts(*lengths: int, seed: int = 7, vocabulary: int = 320) -> list[tuple[str, tuple[int, ...]]]:
    """Prompts of some lengths."""
    generator = np.random.Generator(np.random.Philox(seed))
    return [
        (f"p{i}", tuple(int(t) for t in generator.integers(0, vocabulary, length)))
        for i, length in enumerate(lengths)
    ]


PROMPTS = prompts(24, 3, 11)


@functools.cache
def folder() -> Path:
    """Where the models of a test session lie."""
    made = tempfile.mkdtemp(prefix="driftscope-explanations-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def artifact(name: str, scheme: str | None = None, **changes: Any) -> Artifact:
    """A random model, written once: safetensors, or a GGUF of a scheme."""
    return _artifact(name, scheme, json.dumps(changes, sort_keys=True))


@functools.cache
def _artifact(name: str, scheme: str | None, changes: str) -> Artifact:
    if scheme is None:
        place = Path(tempfile.mkdtemp(dir=folder()))
        return open_artifact(write_model(place, name, **json.loads(changes)))
    return quantized(_artifact(name, None, changes), scheme)


def quantized(source: Artifact, scheme: str) -> Artifact:
    """A GGUF copy of a model."""
    file = Path(tempfile.mkdtemp(dir=folder())) / "model.gguf"
    write_candidate(source, file, scheme=scheme)
    return open_artifact(file)


def edited(
    folder: Path, model: Artifact, edit: Callable[[dict[str, NDArray[Any]]], None], **config: Any
) -> Artifact:
    """A copy of a safetensors model with other weights or another configuration."""
    source = model.files[0].parent
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((source / "config.json").read_text())
    document.update(config)
    (folder / "config.json").write_text(json.dumps(document))
    return open_artifact(folder)


def trace_of(
    folder: Path,
    own: Artifact,
    fault: type[ForwardPass] = ForwardPass,
    *,
    path: str = "f32",
    given: Sequence[tuple[str, tuple[int, ...]]] = PROMPTS,
    without: Sequence[str] = (),
) -> Trace:
    """The trace of a pass with a fault."""
    arithmetic = Arithmetic.of(path)
    forward = fault({"model": own}, arithmetic.policy)
    return record(
        forward, given, folder / "trace", declared=arithmetic, wanted=lambda layer, tap: tap not in without
    )


def explained(
    folder: Path,
    own: Artifact,
    place: tuple[int, str, str],
    fault: type[ForwardPass] = ForwardPass,
    *,
    reference: Artifact | None = None,
    **options: Any,
) -> list[Explanation]:
    """What is said of one op of a trace with a fault; of the model's component where there is a reference."""
    trace = trace_of(folder, own, fault, **options)
    replayer = Replayer(trace, own, reference=reference)
    component = "engine" if reference is None else "model"
    context = Context(own=own, reference=reference, trace=trace, component=component, replayer=replayer)
    return explain(replayer.op(*place), context)


def at(layer: int, wanted: int = LAYER) -> bool:
    """Whether a fault is planted here."""
    return layer == wanted


def with_config(own: Artifact, **changes: Any) -> Artifact:
    """The artifact with other hyperparameters."""
    return dataclasses.replace(own, config=dataclasses.replace(own.config, **changes))
