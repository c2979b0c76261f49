"""Watching the modules of a PyTorch model without editing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

INPUT, OUTPUT = "input", "output"


@contextmanager
def hooks() -> Iterator[Callable[[Any, str, Callable[[Any], None]], None]]:
    """A function that watches a module; all that it watches is let go on exit, also after an exception.

    The function takes a module, `INPUT` or `OUTPUT`, and what to call each time the module runs: with its
    first argument (``input_ids`` where that is named) or its (first) result. It runs after the hooks that
    others put there before, so that it sees what the next module sees.
    """
    handles: list[Any] = []

    def watch(module: Any, side: str, call: Callable[[Any], None]) -> None:
        def before(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            first = next(iter(keywords.values()), None)
            call(arguments[0] if arguments else keywords.get("input_ids", first))

        def after(_: Any, arguments: tuple[Any, ...], result: Any) -> None:
            call(result[0] if isinstance(result, tuple) and result else result)

        if side == INPUT:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))

    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def host_copy(tensor: Any) -> F32:
    """A copy of a floating-point tensor as float32 on the host; bfloat16 and float16 fit exactly."""
    import torch

    array: F32 = tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).numpy()
    return array
