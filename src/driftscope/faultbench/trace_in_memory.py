"""A trace that is held in memory, so that hundreds of short-lived ones need no disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from driftscope.engines.trace import Trace, TraceManifest
from driftscope.errors import InputError
from driftscope.forward.architecture import tap_name
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.evaluate import Value
from driftscope.forward.model import ForwardPass

F32 = NDArray[np.float32]
Place = tuple[int, str]
Prompts = Sequence[tuple[str, Sequence[int]]]


class MemoryTrace(Trace):
    """A trace whose arrays are in memory; see `driftscope.engines.trace.Trace`.

    Attributes:
        values: layer and tap to what it holds.
    """

    def __init__(self, manifest: TraceManifest, values: Mapping[Place, Value]) -> None:
        """Take arrays as they are."""
        self.folder = Path("memory")
        self.manifest = manifest
        self.batch = manifest.batch
        self.values = values

    @property
    def places(self) -> frozenset[Place]:
        return frozenset(self.values)

    def has(self, layer: int, tap: str) -> bool:
        return (layer, tap) in self.values

    def tap(self, layer: int, tap: str) -> F32:
        found = self._found(layer, tap)
        if isinstance(found, list):
            raise InputError(f"memory: {tap_name(layer, tap)} is one array a sequence")
        return found

    def ragged(self, layer: int, tap: str) -> list[F32]:
        found = self._found(layer, tap)
        assert isinstance(found, list)
        return found

    def _found(self, layer: int, tap: str) -> Value:
        if (layer, tap) not in self.values:
            raise InputError(f"memory: the trace has no {tap_name(layer, tap)}")
        return self.values[layer, tap]

    def replaced(self, changed: Mapping[Place, Value]) -> MemoryTrace:
        """The same trace with other values at some places."""
        return MemoryTrace(self.manifest, {**self.values, **changed})


class _Keeper:
    def __init__(self, layers: frozenset[int] | None) -> None:
        self.values: dict[Place, Value] = {}
        self._layers = layers

    def wants(self, layer: int, name: str) -> bool:
        return self._layers is None or layer < 0 or layer in self._layers

    def __call__(
        self, layer: int, name: str, array: NDArray[np.float32], *, sequence: int | None = None
    ) -> None:
        if sequence is None:
            self.values[layer, name] = array.copy()
            return
        rows = self.values.setdefault((layer, name), [])
        assert isinstance(rows, list)
        rows.append(array.copy())


def record(
    forward: ForwardPass,
    prompts: Prompts,
    declared: Arithmetic,
    *,
    layers: Iterable[int] | None = None,
    engine: str = "driftscope",
) -> MemoryTrace:
    """Run a pass and keep its taps.

    Args:
        forward: the pass, which may be faulty.
        prompts: prompt id and token ids.
        declared: the arithmetic that the trace says it was made in.
        layers: layers whose taps are kept, or None for all; those of the whole model always are.
        engine: name for the manifest.
    """
    taken = tuple((name, tuple(int(token) for token in ids)) for name, ids in prompts)
    manifest = TraceManifest(taken, engine={"name": engine}, arithmetic=declared)
    keeper = _Keeper(None if layers is None else frozenset(layers))
    forward.run(manifest.batch, keeper)
    return MemoryTrace(manifest, keeper.values)
