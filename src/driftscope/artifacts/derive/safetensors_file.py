"""Writing one safetensors file as a stream, without holding its tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_HEADER_ALIGNMENT = 8


class SafetensorsWriter:
    """A safetensors file: the sizes are declared first, the tensors follow in that order.

    The format is an 8-byte little-endian header length, a JSON header padded with spaces, and the
    tensors without gaps (safetensors' ``README.md``, section Format).
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> None:
        """Open the file and write its header.

        Args:
            path: the file to make.
            tensors: name to (dtype, shape, bytes), in the order in which they will be written.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape, nbytes) in tensors.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        self._expected = offset
        self._written = 0
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, slabs: Iterable[NDArray[np.generic]]) -> None:
        """Append the slabs of the next tensor."""
        for slab in slabs:
            self._written += self._file.write(np.ascontiguousarray(slab).view(np.uint8).data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._written != self._expected:
            raise RuntimeError(f"{self._file.name}: {self._written} bytes written, {self._expected} declared")
