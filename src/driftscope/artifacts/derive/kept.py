"""Copies of a model in another container whose tensors keep their formats, and so their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.derive.gguf_file import gguf_order, plan_gguf, write_gguf_file
from driftscope.artifacts.derive.hf_folder import (
    MAX_SHARD_BYTES,
    VALUE_BYTES,
    plan_hf,
    write_hf_folder,
)
from driftscope.artifacts.derive.quantize import quantize
from driftscope.artifacts.derive.recipe import SCHEMES
from driftscope.artifacts.derive.rows import SLAB_VALUES, shifted, slabs
from driftscope.artifacts.derive.teacher import canonical_values
from driftscope.artifacts.ggml_types import GGML_TYPES
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.transforms import value_offset
from driftscope.errors import InputError

Progress = Callable[[int, int], None]

# What F32 can hold without changing a value, and the formats that llama.cpp does not take weights of.
_HELD_BY_F32 = ("F32", "F16", "BF16")
_NO_WEIGHTS = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64")
_GGUF_FORMATS = frozenset(kind.name for kind in GGML_TYPES.values()) - frozenset(_NO_WEIGHTS)

# Formats that are read as another one in which each value lies at another place of the same block.
_SAME_BLOCKS = {("AprQ4", "Q4_0")}


def write_gguf_copy(
    source: Artifact, file: Path, *, dequantize: bool = False, progress: Progress | None = None
) -> None:
    """Write a model as a GGUF file that llama.cpp loads, each matrix in the format that it has.

    Norms and biases are written as F32, which llama.cpp wants and which holds their values.

    Args:
        source: the model.
        file: where to put it; an existing file is replaced.
        dequantize: write matrices in formats that GGUF lacks as F32, instead of refusing them.
        progress: called with (values written, values in all) after each tensor.

    Raises:
        InputError: a format that GGUF lacks, or what `plan_gguf` and `write_gguf_file` refuse.
    """
    plan = plan_gguf(source)
    config = plan.source.config
    formats = {stored: _gguf_format(parts, dequantize) for stored, parts in plan.layout.items()}

    def encode(tensor: TensorRef, fmt: str) -> Iterator[NDArray[Any]]:
        order = gguf_order(tensor, config, plan.architecture)
        offset = value_offset(tensor.name, plan.architecture)
        if fmt == tensor.dtype and offset == tensor.value_offset:
            return _rows(tensor, order)
        _check_f32(tensor)
        return (quantize(slab, "F32") for slab in shifted(slabs(tensor, order), tensor, offset))

    write_gguf_file(plan, file, formats, _file_type(plan.source, formats), encode, progress=progress)


def write_hf_copy(
    source: Artifact,
    folder: Path,
    *,
    dequantize: bool = False,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a model as a folder that transformers loads, each tensor in the dtype that it has.

    Args:
        source: the model.
        folder: where to put it; an existing folder is replaced.
        dequantize: write quantized tensors as F32, instead of refusing them.
        dtype: ``F32``, ``F16`` or ``BF16`` for all tensors, where it holds their values; None keeps theirs.
        max_shard_bytes: a shard is closed before it would exceed this; a larger tensor gets its own.
        progress: called with (bytes written, bytes in all) after each tensor.

    Raises:
        InputError: a format that safetensors lacks, values that `dtype` cannot hold, or what `plan_hf` and
            `write_hf_folder` refuse.
    """
    if dtype is not None and dtype not in _HELD_BY_F32:
        raise InputError(f"dtype {dtype!r} is not supported; expected one of {', '.join(_HELD_BY_F32)}")
    plan = plan_hf(source)
    dtypes = {stored: _hf_dtype(parts, dtype, dequantize) for stored, parts in plan.layout.items()}

    def encode(tensor: TensorRef, wanted: str) -> Iterator[NDArray[Any]]:
        if wanted == tensor.dtype and not tensor.value_offset:
            return _rows(tensor, tensor.row_order())
        return canonical_values(tensor, wanted)

    write_hf_folder(plan, folder, dtypes, encode, max_shard_bytes=max_shard_bytes, progress=progress)


def kept_format(tensor: TensorRef) -> str | None:
    """The format of a tensor's stored rows; None where `TensorRef.raw` decodes them to another."""
    same = tensor.stored_dtype == tensor.dtype or (tensor.stored_dtype, tensor.dtype) in _SAME_BLOCKS
    return tensor.dtype if same else None


def _gguf_format(parts: Sequence[TensorRef], dequantize: bool) -> str:
    """Format of a tensor of a GGUF file.

    Raises:
        InputError: its parts have none that GGUF can hold.
    """
    found = {kept_format(part) for part in parts}
    kept = found.pop() if len(found) == 1 else None
    if kept in _HELD_BY_F32 and (len(parts[0].shape) == 1 or parts[0].value_offset):
        return "F32"
    if kept in _GGUF_FORMATS:
        return str(kept)
    if dequantize or all(part.stored_dtype in _HELD_BY_F32 for part in parts):
        return "F32"
    raise _refused(parts, "a GGUF file")


def _hf_dtype(parts: Sequence[TensorRef], dtype: str | None, dequantize: bool) -> str:
    """Dtype of a tensor of a safetensors file.

    Raises:
        InputError: its parts have none that safetensors can hold.
    """
    found = {kept_format(part) for part in parts}
    kept = found.pop() if len(found) == 1 else None
    is_float = all(part.stored_dtype in _HELD_BY_F32 for part in parts)
    if dtype is not None and (is_float or dequantize):
        return dtype
    if kept in VALUE_BYTES and dtype is None:
        return str(kept)
    if dequantize or is_float:
        return "F32"
    raise _refused(parts, "a safetensors file")


def _refused(parts: Sequence[TensorRef], what: str) -> InputError:
    formats = " and ".join(sorted({part.stored_dtype for part in parts}))
    return InputError(
        f"{parts[0].file}: {parts[0].stored_name} is {formats}, which {what} cannot hold; --dequantize "
        "writes such tensors as F32"
    )


def _check_f32(tensor: TensorRef) -> None:
    if tensor.dtype == "F64":
        raise InputError(f"{tensor.file}: {tensor.stored_name} is F64, whose values F32 cannot hold")


def _rows(tensor: TensorRef, order: NDArray[np.int64] | None) -> Iterator[NDArray[Any]]:
    """Rows as they are stored, a bounded number at a time."""
    raw = tensor.raw()
    count = max(1, SLAB_VALUES // tensor.shape[-1])
    for start in range(0, tensor.n_rows, count):
        stop = min(start + count, tensor.n_rows)
        yield np.ascontiguousarray(raw[start:stop] if order is None else raw[order[start:stop]])


def _file_type(source: Artifact, formats: dict[str, str]) -> int:
    """GGUF's ``general.file_type``: the source's own, or that of the format that most tensors have."""
    stated = source.metadata.get("general.file_type")
    if isinstance(stated, int) and source.container == "gguf":
        return stated
    names = list(formats.values())
    main = max(sorted(set(names) - {"F32"}) or ["F32"], key=names.count)
    return next((scheme.file_type for scheme in SCHEMES.values() if scheme.base == main), 0)
