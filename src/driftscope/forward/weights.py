"""Weights as the forward pass reads them: streamed from the file, a few rows decoded at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError
from driftscope.forward.policy import Choice
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.device import Kernels, kernels_on
from driftscope.kernels.formats import format_of

F32 = NDArray[np.float32]


class Weights:
    """The weights of one artifact.

    Nothing is kept on the host: each call maps the tensor, reads it and lets it go. What is given is an array
    of the device that the kernels run on, and so is what is taken.
    """

    def __init__(self, artifact: Artifact, kernels: Kernels | None = None) -> None:
        self.artifact = artifact
        self._kernels = kernels or kernels_on("cpu")

    def tensor(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        """Look a tensor up.

        Raises:
            InputError: it is missing or has another shape.
        """
        ref = self.artifact.tensors.get(name)
        if ref is None:
            raise InputError(f"{self.artifact.path}: tensor {name} is missing; expected shape {_text(shape)}")
        if ref.shape != shape:
            raise InputError(
                f"{self.artifact.path}: tensor {name} has shape {_text(ref.shape)}; expected {_text(shape)}"
            )
        return ref

    def vector(self, name: str, length: int) -> F32:
        """A norm weight or a bias as ``float32[length]``."""
        ref = self.tensor(name, (length,))
        return self._on_device(dequantize(np.ascontiguousarray(ref.raw()), ref.dtype).reshape(length))

    def norm(self, name: str, length: int) -> F32:
        """What a norm multiplies by, as ``float32[length]``: its canonical weight plus the model's offset.

        A container may store the weight with the offset in it already; only what is missing is added.
        """
        weight = self.vector(name, length)
        missing = self.artifact.config.norm_offset - self.artifact.tensors[name].value_offset
        return weight + np.float32(missing) if missing else weight

    def rows(self, name: str, shape: tuple[int, int], rows: NDArray[np.int32]) -> F32:
        """Some rows of a matrix as ``float32[len(rows), columns]``; only they are read and decoded."""
        ref = self.tensor(name, shape)
        order = ref.row_order()
        stored = rows if order is None else order[rows]
        return dequantize(np.ascontiguousarray(ref.raw()[stored]), ref.dtype)

    def matmul(self, x: F32, name: str, shape: tuple[int, int], choice: Choice) -> F32:
        """Multiply activations with a weight, in the arithmetic of a choice.

        Args:
            x: ``float32[n, columns]``.
            name: canonical name of the weight.
            shape: its rows and columns.
            choice: path and activation format.

        Returns:
            ``float32[n, rows]``, rows in canonical order; the same bits whatever the number of threads.
        """
        ref = self.tensor(name, shape)
        raw = self._kernels.resident((str(self.artifact.path), name), lambda: _canonical_rows(ref))
        found: F32
        if choice.path == "int8-dot":
            found = self._kernels.matmul_quantized(x, raw, ref.dtype, activation=choice.activation)
            return found
        if choice.activation not in (None, "none"):
            x = self._kernels.quantize_activation(x, choice.activation).dequantize()
        found = self._kernels.matmul_f32_quantized(x, raw, ref.dtype)
        return found

    def activation_format(self, name: str, choice: Choice) -> str:
        """Format that a matmul with this weight rounds its activation to; ``none`` for not at all."""
        if choice.activation is not None:
            return choice.activation
        ref = self.artifact.tensors.get(name)
        if choice.path == "f32" or ref is None:
            return "none"
        return format_of(ref.dtype).activation

    def _on_device(self, values: F32) -> F32:
        found: F32 = self._kernels.to_device(values)
        return found


def _canonical_rows(ref: TensorRef) -> NDArray[np.uint8]:
    raw, order = ref.raw(), ref.row_order()
    return raw if order is None else raw[order]


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
