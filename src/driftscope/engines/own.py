"""Our own forward pass as an engine: the three paths of a case, by name, and traces of any policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from driftscope.errors import InputError
from driftscope.forward.policy import Policy

if TYPE_CHECKING:
    from driftscope.artifacts.model import Artifact
    from driftscope.engines.trace import Trace
    from driftscope.forward.arithmetic import Arithmetic
    from driftscope.forward.model import ForwardPass

Prompts = Sequence[tuple[str, Sequence[int]]]
"""Prompt id and token ids."""

PATHS: Mapping[str, Policy] = {
    "teacher.f32": Policy.uniform("teacher", "f32"),
    "candidate.f32": Policy.uniform("candidate", "f32"),
    "candidate.int8-dot": Policy.uniform("candidate", "int8-dot"),
}
"""``<role>.<arithmetic>`` to the policy that it means."""


def policy_of(path: str) -> Policy:
    """The policy of a path.

    Raises:
        InputError: no such path.
    """
    if path not in PATHS:
        raise InputError(f"path {path!r} is unknown; expected one of {', '.join(PATHS)}")
    return PATHS[path]


def forward_pass(
    artifacts: Mapping[str, Artifact], path: str, *, threads: int = 1, device: str = "cpu"
) -> ForwardPass:
    """A pass along a path.

    Args:
        artifacts: by role, ``teacher`` and ``candidate``; the one that the path does not use may be left out.
        path: one of `PATHS`.
        threads: number of threads; the result does not depend on it.
        device: ``cpu`` or ``cuda``.
    """
    # Here, so that the names of the paths can be had without compiling kernels.
    from driftscope.forward.model import ForwardPass

    return ForwardPass(artifacts, policy_of(path), threads=threads, device=device)


def trace(
    artifact: Artifact,
    prompts: Prompts,
    folder: Path,
    arithmetic: Arithmetic,
    *,
    threads: int = 1,
    wanted: Callable[[int, str], bool] = lambda layer, tap: True,
    model: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Trace an artifact in an arithmetic of ours.

    Args:
        artifact: the model.
        prompts: what is run; each sequence on its own.
        folder: where the trace is written, one file a layer.
        arithmetic: its dtype must be ``f32``: that is what our kernels compute in.
        threads: the result does not depend on it.
        wanted: whether a tap (layer, name) is kept.
        model: what the manifest says of the model.
        progress: called with the layers done and their number.

    Raises:
        InputError: another dtype, or a prompt that the model cannot run.
    """
    from driftscope.forward.model import ForwardPass

    if arithmetic.dtype != "f32":
        raise InputError(f"own engine: dtype {arithmetic.dtype!r} is not implemented; expected f32")
    role = arithmetic.policy.base.artifact
    forward = ForwardPass({role: artifact}, arithmetic.policy, threads=threads)
    about = {"architecture": artifact.config.architecture, "file": artifact.path.name, **(model or {})}
    return record(
        forward, prompts, folder, wanted=wanted, model=about, declared=arithmetic, progress=progress
    )


def record(
    forward: ForwardPass,
    prompts: Prompts,
    folder: Path,
    *,
    declared: Arithmetic | None = None,
    wanted: Callable[[int, str], bool] = lambda layer, tap: True,
    engine: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Write the taps of a pass, also of one with ops of its own; no more than one layer's are held.

    Args:
        forward: the pass.
        prompts: what is run.
        folder: where the trace is written, one file a layer.
        declared: the arithmetic that the manifest names.
        wanted: whether a tap (layer, name) is kept.
        engine: what the manifest says of the engine; by default the name ``driftscope``.
        model: what the manifest says of the model.
        progress: called with the layers done and their number.
    """
    from driftscope.engines.trace import TraceManifest, TraceWriter
    from driftscope.forward.batch import TokenBatch
    from driftscope.forward.policy import WHOLE_MODEL

    taken = tuple((prompt, tuple(int(token) for token in ids)) for prompt, ids in prompts)
    batch = TokenBatch.of([ids for _, ids in taken])
    taps = _Taps([prompt for prompt, _ in taken], wanted)
    writer = TraceWriter(folder)
    hidden = forward.embed(batch, taps)
    writer.write("embedding", taps.take())
    for layer in range(forward.config.num_layers):
        hidden = forward.run_layers(hidden, batch, [layer], taps)
        writer.write(f"layer-{layer:03d}", taps.take())
        progress(layer + 1, forward.config.num_layers)
    if wanted(WHOLE_MODEL, "final_norm") or wanted(WHOLE_MODEL, "lm_head"):
        forward.head(hidden, tap=taps)
        writer.write("head", taps.take())
    return writer.finish(TraceManifest(taken, engine or {"name": "driftscope"}, model or {}, declared))


class _Taps:
    """Keeps copies of the taps until they are taken, by their names in a trace."""

    def __init__(self, prompts: Sequence[str], wanted: Callable[[int, str], bool]) -> None:
        self._prompts = prompts
        self._wanted = wanted
        self._arrays: dict[str, Any] = {}

    def wants(self, layer: int, name: str) -> bool:
        return self._wanted(layer, name)

    def __call__(self, layer: int, name: str, array: Any, *, sequence: int | None = None) -> None:
        from driftscope.forward.architecture import tap_name

        suffix = "" if sequence is None else f"[{self._prompts[sequence]}]"
        self._arrays[tap_name(layer, name) + suffix] = array.copy()

    def take(self) -> dict[str, Any]:
        taken, self._arrays = self._arrays, {}
        return taken
