"""The kernels on the CPU, with a number of threads: `driftscope.kernels.device.Kernels`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.kernels import activations, compare, forward, matmul, statistics


class CpuKernels:
    """The functions of `driftscope.kernels`; results do not depend on the number of threads."""

    device_name = ""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.quantize_activation = partial(activations.quantize_activation, threads=threads)
        self.matmul_f32_quantized = partial(matmul.matmul_f32_quantized, threads=threads)
        self.matmul_quantized = partial(matmul.matmul_quantized, threads=threads)
        self.compare = partial(compare.compare, threads=threads)
        self.tap_statistics = partial(statistics.tap_statistics, threads=threads)
        self.silu = partial(forward.silu, threads=threads)
        self.gelu = partial(forward.gelu, threads=threads)
        self.soft_cap = partial(forward.soft_cap, threads=threads)
        self.attention = partial(forward.attention, threads=threads)
        self.rms_norm = forward.rms_norm
        self.rope_tables = forward.rope_tables
        self.rope = forward.rope
        self.attention_scores = partial(forward.attention_scores, threads=threads)
        self.attention_softmax = partial(forward.attention_softmax, threads=threads)

    def to_device(self, array: Any) -> Any:
        """The array itself."""
        return array

    def to_host(self, array: Any) -> NDArray[Any]:
        """The array itself."""
        found: NDArray[Any] = array
        return found

    def resident(self, key: tuple[str, ...], load: Callable[[], NDArray[np.uint8]]) -> Any:
        """What `load` gives: a map of the file, which the system keeps in memory as it sees fit."""
        return load()
