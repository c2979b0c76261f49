"""Weights as the forward pass reads them: streamed from the file, a few rows decoded at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError
from driftscope.forward.policy import Choice
from driftscope.kernels.activations import quantize_activation
from driftscope.kernels.dequantize import dequantize
from driftscope.kernels.formats import format_of
from driftscope.kernels.matmul import matmul_f32_quantized, matmul_quantized

F32 = NDArray[np.float32]


class Weights:
    """The weights of one artifact.

    Nothing is kept: each call maps the tensor, reads it and lets it go.
    """

    def __init__(self, artifact: Artifact, *, threads: int = 1) -> None:
        self.artifact = artifact
        self._threads = threads

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
        return dequantize(np.ascontiguousarray(ref.raw()), ref.dtype).reshape(length)

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
        raw, order = ref.raw(), ref.row_order()
        if order is not None:
            raw = raw[order]
        if choice.path == "int8-dot":
            return matmul_quantized(x, raw, ref.dtype, activation=choice.activation, threads=self._threads)
        if choice.activation not in (None, "none"):
            x = quantize_activation(x, choice.activation).dequantize()
        return matmul_f32_quantized(x, raw, ref.dtype, threads=self._threads)

    def activation_format(self, name: str, choice: Choice) -> str:
        """Format that a matmul with this weight rounds its activation to; ``none`` for not at all."""
        if choice.activation is not None:
            return choice.activation
        ref = self.artifact.tensors.get(name)
        if choice.path == "f32" or ref is None:
            return "none"
        return format_of(ref.dtype).activation


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
