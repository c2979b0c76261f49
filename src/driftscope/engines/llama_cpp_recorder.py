"""Taking taps out of llama.cpp's graph and into a trace's files, with one layer in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.engines.llama_cpp_graph import GraphTensor
from driftscope.engines.llama_cpp_taps import TapMap
from driftscope.engines.trace import PARTS, TraceWriter
from driftscope.errors import InputError
from driftscope.forward.architecture import tap_name
from driftscope.forward.policy import WHOLE_MODEL

F32 = NDArray[np.float32]
Key = tuple[int, str, str]
"""Layer, tap, part."""

_PIECES = ".batches"


class Recorder:
    """Keeps the taps of one layer at a time and writes them when the next layer begins.

    Sequences that are computed in several batches come batch by batch, each through all layers; their layers
    are put together when the sequence is done.
    """

    def __init__(self, writer: TraceWriter, taps: TapMap, wanted: Callable[[int, str], bool] | None) -> None:
        self._writer, self._taps = writer, taps
        self._wanted = wanted or (lambda layer, tap: True)
        self._asked: dict[tuple[int, str], bool] = {}
        self._pieces = writer.folder / _PIECES
        self._arrays: dict[Key, F32] = {}
        self._group = ""
        self._groups: list[str] = []

    def begin(self, index: int, prompt: str, length: int, *, whole: bool) -> None:
        """Begin a sequence.

        Args:
            index: its number.
            prompt: its id.
            length: its tokens.
            whole: it is computed in one batch.
        """
        self._index, self._prompt, self._length, self._whole = index, prompt, length, whole
        self._groups = []

    def batch(self, begin: int, end: int) -> None:
        """Begin a batch: tokens ``begin`` to ``end`` of the sequence."""
        self._begin, self._end = begin, end

    def wants(self, tensor: GraphTensor) -> bool:
        """Whether a tensor holds a tap that is wanted."""
        return any(self._is_wanted(place.layer, place.source.tap) for place in self._taps.find(tensor))

    def take(self, tensor: GraphTensor) -> None:
        """Copy the taps of a tensor."""
        for place in self._taps.find(tensor):
            layer, source = place.layer, place.source
            if not self._is_wanted(layer, source.tap):
                continue
            group = f"layer-{layer:03d}" if layer != WHOLE_MODEL else source.tap
            if group != self._group:
                self._flush()
                self._group = group
            array = self._taps.read(place, tensor, self._end, self._length)
            if array.shape[0] != self._end - self._begin:
                raise InputError(
                    f"llama.cpp: {tensor.name} ({tensor.op}) has {array.shape[0]} rows; "
                    f"expected {self._end - self._begin}, one a token"
                )
            self._arrays[layer, source.tap, source.part] = array

    def end_batch(self) -> None:
        """Write what is left of a batch."""
        self._flush()

    def finish(self) -> None:
        """End the sequence: put the batches of each layer together."""
        if self._whole:
            return
        for group in self._groups:
            self._writer.write(self._stem(group), self._joined(group))
        shutil.rmtree(self._pieces, ignore_errors=True)

    def clear(self) -> None:
        """Remove what batches have left behind, also an earlier run's."""
        shutil.rmtree(self._pieces, ignore_errors=True)

    def _is_wanted(self, layer: int, tap: str) -> bool:
        key = layer, tap
        if key not in self._asked:
            # A model without biases has no qkv_bias of its own.
            self._asked[key] = self._wanted(layer, tap) or (
                tap == "qkv_matmul" and self._wanted(layer, "qkv_bias")
            )
        return self._asked[key]

    def _flush(self) -> None:
        arrays, self._arrays = self._arrays, {}
        if not arrays:
            return
        named = {self._name(key): array for key, array in self._complete(arrays).items()}
        if self._whole:
            self._writer.write(self._stem(self._group), named)
            return
        from safetensors.numpy import save_file

        if self._group not in self._groups:
            self._groups.append(self._group)
        piece = self._piece(self._group, self._begin)
        try:
            self._pieces.mkdir(exist_ok=True)
            save_file(named, piece)
        except Exception as error:
            # safetensors reports a full disk as its own error type, without an errno.
            raise InputError(f"{piece}: cannot be written: {error}") from error

    def _complete(self, arrays: dict[Key, F32]) -> dict[Key, F32]:
        """With ``qkv_bias`` where no bias was added, without a ``qkv_matmul`` taken only for that."""
        found = dict(arrays)
        for (layer, tap, part), array in arrays.items():
            if tap != "qkv_matmul":
                continue
            if self._wanted(layer, "qkv_bias"):
                found.setdefault((layer, "qkv_bias", part), array)
            if not self._wanted(layer, "qkv_matmul"):
                del found[layer, tap, part]
        return found

    def _joined(self, group: str) -> dict[str, Any]:
        from safetensors.numpy import load_file

        files = sorted(self._pieces.glob(f"{group}.*.safetensors"))
        pieces = [load_file(file) for file in files]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _piece(self, group: str, begin: int) -> Path:
        return self._pieces / f"{group}.{begin:09d}.safetensors"

    def _stem(self, group: str) -> str:
        return f"prompt-{self._index:03d}.{group}"

    def _name(self, key: Key) -> str:
        layer, tap, part = key
        dotted = f".{part}" if part and tap in PARTS else ""
        return f"{tap_name(layer, tap)}{dotted}[{self._prompt}]"
