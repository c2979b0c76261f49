"""Compile and launch kernels through CuPy. The only module that imports CuPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError
from driftscope.kernels.cuda.sources import OPTIONS, Kernel, source


class CupyCard:
    """The current CUDA device: its arrays and its launches.

    Attributes:
        name: of the card, e.g. ``NVIDIA H100 80GB HBM3``.
        memory: its bytes in all.
    """

    def __init__(self) -> None:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self.name: str = properties["name"].decode()
        self.memory = int(properties["totalGlobalMem"])

    def owns(self, array: Any) -> bool:
        """Whether an array lies on the device."""
        return isinstance(array, cupy.ndarray)

    def upload(self, array: NDArray[Any]) -> Any:
        """A copy of an array on the device.

        Raises:
            InputError: the device has no room, here and below.
        """
        return _room(lambda: cupy.array(np.ascontiguousarray(array)), array.nbytes)

    def download(self, array: Any) -> NDArray[Any]:
        """A copy of an array on the host."""
        return cupy.asnumpy(array)

    def contiguous(self, array: Any, dtype: Any) -> Any:
        """An array of the device without gaps, of a type."""
        return cupy.ascontiguousarray(array, dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Room on the device."""
        return _room(lambda: cupy.empty(shape, dtype), int(np.prod(shape)) * np.dtype(dtype).itemsize)

    def full(self, shape: tuple[int, ...], value: Any, dtype: Any) -> Any:
        """Room on the device, filled."""
        return _room(lambda: cupy.full(shape, value, dtype), int(np.prod(shape)) * np.dtype(dtype).itemsize)

    def launch(self, kernel: Kernel, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        """Run a kernel; arguments are arrays of the device and NumPy scalars of the parameters' types."""
        _compiled(kernel)((*grid, 1), (threads, 1, 1), arguments)


@cache
def _compiled(kernel: Kernel) -> Callable[..., None]:
    """Compile one instance, at its first use. CuPy keeps the code on disk, by text, options and card."""
    module = cupy.RawModule(
        code=source(kernel.file), options=OPTIONS, name_expressions=[kernel.name], backend="nvrtc"
    )
    function: Callable[..., None] = module.get_function(kernel.name)
    return function


def _room(make: Callable[[], Any], n_bytes: int) -> Any:
    try:
        return make()
    except cupy.cuda.memory.OutOfMemoryError:
        # CuPy keeps what was freed, in pieces.
        cupy.get_default_memory_pool().free_all_blocks()
    try:
        return make()
    except cupy.cuda.memory.OutOfMemoryError:
        raise InputError(
            f"device cuda: no room for {n_bytes} bytes more; close what else runs on the card, or use the CPU"
        ) from None


def device_count() -> int:
    """How many devices answer.

    Raises:
        RuntimeError: there is no driver, or it does not answer.
    """
    return int(cupy.cuda.runtime.getDeviceCount())


def compute_capability() -> tuple[int, int]:
    """That of the current device, e.g. ``(9, 0)``."""
    text = str(cupy.cuda.Device().compute_capability)
    return int(text[:-1]), int(text[-1])


def compiler_version() -> tuple[int, int]:
    """Version of NVRTC.

    Raises:
        RuntimeError: it cannot be loaded.
    """
    major, minor = cupy.cuda.nvrtc.getVersion()
    return int(major), int(minor)
