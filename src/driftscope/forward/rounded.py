"""An artifact whose weights are rounded to a narrower float as they are read, as engines load them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import ROPE_FREQS
from driftscope.artifacts.tensor import TensorRef, described
from driftscope.forward.arithmetic import round_to
from driftscope.kernels.dequantize import dequantize


@dataclass(frozen=True)
class _RoundedTensor(TensorRef):
    """A tensor that is rounded when it is read, a tensor at a time; its rows stay where they are."""

    _of: TensorRef = field(kw_only=True, repr=False)

    def raw(self) -> NDArray[np.uint8]:
        """The rounded values' bytes as ``uint8[n_rows, bytes_per_row]``."""
        stored = dequantize(np.ascontiguousarray(self._of.raw()), self._of.dtype)
        values = round_to(stored, self.dtype.lower())
        if self.dtype == "F16":
            with np.errstate(over="ignore"):
                return values.astype("<f2").view(np.uint8)
        words = np.ascontiguousarray(values).view("<u4") >> np.uint32(16)
        return words.astype("<u2").view(np.uint8)


def rounded(artifact: Artifact, dtype: str) -> Artifact:
    """Return the artifact with every tensor rounded to ``f16`` or ``bf16``; the same one for ``f32``."""
    if dtype == "f32":
        return artifact
    tensors = {}
    for name, ref in artifact.tensors.items():
        values = described(ref)
        keep = ref.dtype == dtype.upper() or name == ROPE_FREQS
        tensors[name] = ref if keep else _RoundedTensor(**{**values, "dtype": dtype.upper()}, _of=ref)
    return dataclasses.replace(artifact, tensors=tensors)
