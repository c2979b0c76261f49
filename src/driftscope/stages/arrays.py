"""Arrays between jobs: safetensors files, written atomically and read one array at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.evidence.atomic import replacing


def write_arrays(arrays: Mapping[str, NDArray[np.float32]], path: Path) -> None:
    """Write named float32 arrays."""
    from safetensors.numpy import save_file

    with replacing(path) as partial:
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)
        except Exception as error:
            # safetensors reports a full disk as its own error type, without an errno.
            raise InputError(f"{path}: cannot be written: {error}") from error


class Arrays:
    """The arrays of a file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: is not a readable file of arrays: {error}") from error
        self.path = path
        self.names: tuple[str, ...] = tuple(sorted(self._file.keys()))

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self.names:
            raise InputError(f"{self.path}: holds no array {name}")
        array: NDArray[np.float32] = self._file.get_tensor(name)
        return array
