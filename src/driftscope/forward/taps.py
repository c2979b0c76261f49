"""Who listens to a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from driftscope.forward.architecture import tap_name


class TapConsumer(Protocol):
    """Receives op outputs as the pass makes them.

    An array is only valid during the call: copy what is kept.
    """

    def wants(self, layer: int, name: str) -> bool:
        """Whether to compute and deliver a tap; attention scores cost extra work and memory."""
        ...

    def __call__(
        self, layer: int, name: str, array: NDArray[np.float32], *, sequence: int | None = None
    ) -> None:
        """Take a tap.

        Args:
            layer: layer number, -1 for a tap of the whole model.
            name: tap name without the layer.
            array: ``float32[n_tokens, channels]`` of the whole batch; for ``attn_scores`` and
                ``attn_softmax`` that of one sequence, ``float32[t, heads * t]``, head by head.
            sequence: index of the sequence for those two, else None.
        """
        ...


class Collector:
    """Keeps copies of the taps that it is asked for.

    Attributes:
        arrays: full tap name to array; ragged taps to their sequences' arrays under ``name[i]``.
    """

    def __init__(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self._wanted = wanted
        self.arrays: dict[str, NDArray[np.float32]] = {}

    def wants(self, layer: int, name: str) -> bool:
        """Whether the predicate holds for the full name."""
        return self._wanted(tap_name(layer, name))

    def __call__(
        self, layer: int, name: str, array: NDArray[np.float32], *, sequence: int | None = None
    ) -> None:
        """Keep a copy."""
        suffix = "" if sequence is None else f"[{sequence}]"
        self.arrays[tap_name(layer, name) + suffix] = array.copy()
