"""An artifact whose tensors are replaced by arrays."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.derive.quantize import quantize
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tensor import TensorRef, described
from driftscope.kernels.dequantize import dequantize

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_NO_BYTES = np.zeros((0, 0), dtype=np.uint8)


@dataclass(frozen=True)
class EditedTensor(TensorRef):
    """A tensor in memory, its rows in canonical order."""

    _bytes: U8 = field(default_factory=lambda: _NO_BYTES, repr=False, compare=False)

    def raw(self) -> U8:
        """The bytes as ``uint8[n_rows, bytes_per_row]``."""
        return self._bytes

    def row_order(self) -> None:
        """Rows are in canonical order."""
        return


def rows_of(artifact: Artifact, name: str) -> U8:
    """A copy of a tensor's bytes, ``uint8[n_rows, bytes_per_row]``, rows in canonical order."""
    ref = artifact.tensors[name]
    order = ref.row_order()
    return np.array(ref.raw() if order is None else ref.raw()[order])


def values_of(artifact: Artifact, name: str) -> F32:
    """A tensor's values as float32 in its logical shape, rows in canonical order."""
    ref = artifact.tensors[name]
    return dequantize(rows_of(artifact, name), ref.dtype).reshape(ref.shape)


def with_rows(artifact: Artifact, changed: Mapping[str, U8]) -> Artifact:
    """The artifact with other bytes for some tensors, in the formats that these have."""
    return _with(artifact, {name: _edited(artifact.tensors[name], rows) for name, rows in changed.items()})


def with_values(artifact: Artifact, changed: Mapping[str, F32]) -> Artifact:
    """The artifact with other values for some tensors, stored in the formats that these have."""
    found = {}
    for name, values in changed.items():
        ref = artifact.tensors[name]
        rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, values.shape[-1])
        found[name] = _edited(ref, quantize(rows, ref.dtype), values.shape)
    return _with(artifact, found)


def with_tensor(artifact: Artifact, name: str, values: F32) -> Artifact:
    """The artifact with a float32 tensor more, or with one in another's place."""
    rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, values.shape[-1]).view(np.uint8)
    ref = TensorRef(name, name, values.shape, "F32", artifact.path, 0, rows.nbytes)
    return _with(artifact, {name: _edited(ref, rows)})


def without_tensors(artifact: Artifact, names: set[str]) -> Artifact:
    """The artifact without some tensors."""
    kept = {name: ref for name, ref in artifact.tensors.items() if name not in names}
    return dataclasses.replace(artifact, tensors=kept)


def with_config(artifact: Artifact, **changes: object) -> Artifact:
    """The artifact with other hyperparameters."""
    config = dataclasses.replace(artifact.config, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(artifact, config=config)


def _edited(ref: TensorRef, rows: U8, shape: tuple[int, ...] | None = None) -> EditedTensor:
    rows = np.ascontiguousarray(rows)
    fields = described(ref)
    fields |= {"rope_heads": 0, "nbytes": rows.nbytes, "shape": shape or ref.shape}
    # Who asks whether two tensors are the same bytes looks at file and offset first.
    fields |= {"file": Path(f"memory-{hashlib.sha256(rows.tobytes()).hexdigest()}"), "offset": 0}
    return EditedTensor(**fields, _bytes=rows)


def _with(artifact: Artifact, edited: Mapping[str, TensorRef]) -> Artifact:
    return dataclasses.replace(artifact, tensors={**artifact.tensors, **edited})
