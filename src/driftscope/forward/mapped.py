"""An artifact whose tensors stay mapped, for passes that read every weight many times."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tensor import TensorRef, described


@dataclass(frozen=True)
class _MappedTensor(TensorRef):
    """A tensor that is mapped at its first use, its rows in canonical order.

    Mapping a file and touching its pages takes longer than multiplying one token with them. The pages stay
    the file's own, which the system may drop; only where rows are stored in another order are they copied.
    """

    _of: TensorRef = field(kw_only=True, repr=False)
    _kept: list[NDArray[np.uint8]] = field(default_factory=list, repr=False, compare=False)

    def raw(self) -> NDArray[np.uint8]:
        """The bytes as ``uint8[n_rows, bytes_per_row]``, read-only, in canonical row order."""
        if not self._kept:
            stored, order = self._of.raw(), self._of.row_order()
            # An array instead of a memmap, whose slices are slow.
            self._kept.append(np.asarray(stored) if order is None else np.asarray(stored)[order])
        return self._kept[0]

    def row_order(self) -> None:
        """Rows are in canonical order."""
        return


def mapped(artifact: Artifact) -> Artifact:
    """Return the same artifact with tensors that stay mapped as long as it is held."""
    tensors = {name: _MappedTensor(**described(ref), _of=ref) for name, ref in artifact.tensors.items()}
    return dataclasses.replace(artifact, tensors=tensors)
