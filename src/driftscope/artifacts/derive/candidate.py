"""A quantized GGUF copy of a model: the candidate under test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.derive.gguf_file import gguf_order, plan_gguf, write_gguf_file
from driftscope.artifacts.derive.quantize import quantize
from driftscope.artifacts.derive.recipe import scheme as look_up
from driftscope.artifacts.derive.recipe import tensor_formats
from driftscope.artifacts.derive.rows import shifted, slabs
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.transforms import value_offset
from driftscope.errors import InputError

_MAX_F16 = 65504.0


def write_candidate(
    teacher: Artifact,
    file: Path,
    *,
    scheme: str = "Q4_K_M",
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model as a quantized GGUF file that llama.cpp loads.

    Each tensor gets the format that llama.cpp's own quantizer gives it (`recipe.tensor_formats`), and what
    GGUF stores in the place of its rows and values (`driftscope.artifacts.transforms.GGUF`). Memory stays
    at a few slabs of rows. The file appears whole or not at all; its bytes depend on the teacher and the
    scheme alone, not on `threads`.

    Args:
        teacher: the model to quantize.
        file: where to put it; an existing file is replaced.
        scheme: a key of `recipe.SCHEMES`.
        threads: threads that quantize.
        progress: called with (values written, values in all) after each tensor.

    Raises:
        InputError: an unknown scheme or architecture, a tensor that is missing or would be lost, a
            hyperparameter or a tokenizer that GGUF cannot hold, a value that is not finite or that the format
            cannot hold, or no space on the disk.
    """
    chosen = look_up(scheme)
    plan = plan_gguf(teacher)
    config = plan.source.config
    formats = tensor_formats(
        plan.shapes,
        scheme,
        architecture=plan.architecture,
        n_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads,
    )

    def encode(tensor: TensorRef, fmt: str) -> Iterator[NDArray[np.uint8]]:
        order = gguf_order(tensor, config, plan.architecture)
        for slab in shifted(slabs(tensor, order), tensor, value_offset(tensor.name, plan.architecture)):
            _check(slab, fmt, tensor)
            yield quantize(slab, fmt, threads=threads)

    write_gguf_file(plan, file, formats, chosen.file_type, encode, progress=progress)


def _check(slab: NDArray[np.float32], fmt: str, tensor: TensorRef) -> None:
    if not np.isfinite(slab).all():
        raise InputError(f"{tensor.file}: {tensor.name} holds NaN or infinity, which cannot be quantized")
    if fmt == "F16" and np.abs(slab).max(initial=0.0) > _MAX_F16:
        raise InputError(
            f"{tensor.file}: {tensor.name} holds values beyond {_MAX_F16}, which F16 cannot hold"
        )
