"""An exact safetensors copy of a model: the teacher that candidates are measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from driftscope.artifacts.derive.hf_folder import MAX_SHARD_BYTES, narrowed, plan_hf, write_hf_folder
from driftscope.artifacts.derive.rows import shifted, slabs
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError

_DTYPES = ("F32", "F16", "BF16")


def write_teacher(
    source: Artifact,
    folder: Path,
    *,
    dtype: str = "F32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model as a folder that transformers loads.

    Quantized tensors are dequantized in f32, q/k rows are put back into Hugging Face's order, and what GGUF
    adds to norms is taken off, so that with `dtype` ``F32`` every value is exactly what the source stands
    for; of a norm that GGUF stores plus one, that is the sum (`rows.shifted`). Of a model of text and
    images, the text model is copied. Memory stays at a few slabs of rows. The folder appears whole or not
    at all, and its bytes depend on the source alone.

    Args:
        source: the model to copy.
        folder: where to put it; an existing folder is replaced.
        dtype: ``F32``, or ``F16``/``BF16`` where the source holds nothing that these cannot hold.
        max_shard_bytes: a shard is closed before it would exceed this; a larger tensor gets its own.
        progress: called with (bytes written, bytes in all) after each tensor.

    Raises:
        InputError: an unknown dtype or architecture, a tensor that is missing or would be lost, a tokenizer
            that cannot be read, values that the dtype cannot hold, or no space on the disk.
    """
    if dtype not in _DTYPES:
        raise InputError(f"teacher: dtype {dtype!r} is not supported; expected one of {', '.join(_DTYPES)}")
    plan = plan_hf(source)
    dtypes = dict.fromkeys(plan.layout, dtype)
    write_hf_folder(
        plan, folder, dtypes, canonical_values, max_shard_bytes=max_shard_bytes, progress=progress
    )


def canonical_values(tensor: TensorRef, dtype: str) -> Iterator[NDArray[Any]]:
    """A tensor's canonical values in a dtype, slab by slab, rows in canonical order.

    Raises:
        InputError: the dtype cannot hold a value.
    """
    if tensor.dtype == "F64":
        raise InputError(f"{tensor.file}: {tensor.name} is F64; a teacher holds at most F32")
    for slab in shifted(slabs(tensor, tensor.row_order()), tensor, 0.0):
        yield narrowed(slab, dtype, tensor)
