"""Writing an .apr file: a model as it is stored elsewhere, or its layers' matrices quantized."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import pack
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.apr.config import HF_CONFIG, KEYS, ROPE_NEOX, ROPE_NORM
from driftscope.artifacts.apr.container import (
    CHECKSUM_BYTES,
    CHECKSUM_OFFSET,
    HAS_VOCABULARY,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MAX_METADATA_BYTES,
    MAX_NAME_BYTES,
    QUANTIZED,
    ROW_MAJOR,
    VERSION,
    aligned,
    header_checksum,
)
from driftscope.artifacts.apr.dtypes import (
    APR_Q4,
    APR_Q8,
    CODES,
    AprTensor,
    apr_q4_of_q4_0,
    q8_scale,
    quantize_q4,
    quantize_q8,
    stored_bytes,
)
from driftscope.artifacts.apr.dtypes import QUANTIZED as QUANTIZED_DTYPES
from driftscope.artifacts.apr.tokenizer import TOKENS, apr_keys
from driftscope.artifacts.derive.atomic import atomic_file
from driftscope.artifacts.derive.hf_config import hf_config
from driftscope.artifacts.derive.hf_folder import main_float
from driftscope.artifacts.derive.rows import shifted
from driftscope.artifacts.derive.source import source_of_copy
from driftscope.artifacts.derive.tokenizer_keys import tokenizer_keys
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import layer_of
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError
from driftscope.kernels.dequantize import dequantize

Bytes = NDArray[np.uint8]
Progress = Callable[[int, int], None]

QUANTIZERS = (APR_Q4, APR_Q8)

# Values that are held at a time; rows are taken in multiples of 32, so that AprQ4's blocks end with a slab.
_SLAB_VALUES = 4 * 2**20
_MAX_F16 = 65504.0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to write: its dtype and shape, and its bytes, slab by slab."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    slabs: Callable[[], Iterable[Bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return stored_bytes(self.dtype, self.shape)


def write_apr(
    source: Artifact,
    file: Path,
    *,
    quantize: str | None = None,
    dequantize_rest: bool = False,
    tokenizer: bool = True,
    progress: Progress | None = None,
) -> None:
    """Write a model as an .apr file.

    Each tensor keeps its format and its bytes where the file can hold them, and the rows of q and k their
    order, of which ``rope_type`` tells. Memory stays at a few slabs of rows. The file appears whole or not at
    all; its bytes depend on the source and the options alone.

    Args:
        source: the model.
        file: where to put it; an existing file is replaced.
        quantize: ``AprQ4`` or ``AprQ8``, for the matrices of the layers; None keeps their formats.
        dequantize_rest: write tensors in formats that .apr lacks as F32, instead of refusing them.
        tokenizer: keep the tokenizer.
        progress: called with (bytes written, bytes in all) after each tensor.

    Raises:
        InputError: a tensor that is missing or would be lost, a format that .apr lacks, values that cannot be
            quantized, a tokenizer that cannot be kept, or no space on the disk.
    """
    if quantize is not None and quantize not in QUANTIZERS:
        raise InputError(f"format {quantize!r} is not one to quantize to; expected {' or '.join(QUANTIZERS)}")
    source = source_of_copy(source)
    is_interleaved = _rows_are_interleaved(source)
    tensors = [
        _stored(ref, quantize, keep_order=is_interleaved, dequantize_rest=dequantize_rest)
        for ref in source.tensors.values()
    ]
    keys = apr_keys(tokenizer_keys(source)) if tokenizer else {}
    metadata = _metadata(source, tensors, keys, is_interleaved=is_interleaved)
    flags = ROW_MAJOR | (HAS_VOCABULARY if TOKENS in keys else 0)
    flags |= QUANTIZED if any(tensor.dtype in QUANTIZED_DTYPES for tensor in tensors) else 0
    write_apr_file(file, metadata, tensors, flags=flags, progress=progress)


def write_apr_file(
    file: Path,
    metadata: Mapping[str, Any],
    tensors: list[StoredTensor],
    *,
    flags: int = ROW_MAJOR,
    progress: Progress | None = None,
) -> None:
    """Write a container; the data in the order of `tensors`, the index in that of their names.

    Raises:
        InputError: metadata or a name that is too long for the format, or no space on the disk.
    """
    text = json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MAX_METADATA_BYTES:
        raise InputError(
            f"{file}: {len(text)} bytes of metadata; .apr holds at most {MAX_METADATA_BYTES} "
            "(--no-tokenizer leaves the tokenizer out)"
        )
    index = _index(file, tensors)
    at_index = aligned(HEADER_BYTES + len(text))
    at_data = at_index + aligned(len(index))
    with atomic_file(file) as partial, partial.open("wb") as stream:
        out = _Stream(stream)
        out.write(_header(flags, len(tensors), len(text), at_index, at_data))
        out.write(text)
        out.pad()
        out.write(index)
        out.pad()
        total = sum(tensor.nbytes for tensor in tensors)
        done = 0
        for tensor in tensors:
            start = out.position
            for slab in tensor.slabs():
                out.write(slab.data)
            if out.position - start != tensor.nbytes:
                raise RuntimeError(f"{tensor.name}: {out.position - start} bytes, {tensor.nbytes} declared")
            out.pad()
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
        stream.write(out.checksum.to_bytes(CHECKSUM_BYTES, "little"))


class _Stream:
    """A file that is written front to back, with the checksum of what has been written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.position = 0
        self.checksum = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self.checksum = zlib.crc32(data, self.checksum)
        self.position += self._stream.write(data)

    def pad(self) -> None:
        """Append zeros up to the alignment."""
        self.write(bytes(aligned(self.position) - self.position))


def _header(flags: int, count: int, metadata_size: int, at_index: int, at_data: int) -> bytes:
    fields = (MAGIC, *VERSION, flags, count, HEADER_BYTES, metadata_size, at_index, at_data)
    header = HEADER.pack(*fields, 0).ljust(HEADER_BYTES, b"\0")
    checksum = header_checksum(header).to_bytes(CHECKSUM_BYTES, "little")
    return header[:CHECKSUM_OFFSET] + checksum + header[CHECKSUM_OFFSET + CHECKSUM_BYTES :]


def _index(file: Path, tensors: list[StoredTensor]) -> bytes:
    """The packed entries, sorted by the bytes of the names."""
    entries = {}
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode()
        if len(name) > MAX_NAME_BYTES:
            raise InputError(f"{file}: the name {tensor.name} has more than {MAX_NAME_BYTES} bytes")
        entry = pack("<H", len(name)) + name + pack("<BB", CODES[tensor.dtype], len(tensor.shape))
        entries[name] = (
            entry + pack(f"<{len(tensor.shape)}Q", *tensor.shape) + pack("<QQ", offset, tensor.nbytes)
        )
        offset += aligned(tensor.nbytes)
    return b"".join(entries[name] for name in sorted(entries))


def _metadata(
    source: Artifact, tensors: list[StoredTensor], keys: Mapping[str, Any], *, is_interleaved: bool
) -> dict[str, Any]:
    """The keys of the format, the model's config.json, and the tokenizer's keys."""
    config = source.config
    found: dict[str, Any] = {"model_type": config.architecture}
    name = source.metadata.get("general.name", source.metadata.get("name"))
    if isinstance(name, str):
        found["name"] = name
    found |= {"architecture": config.architecture, "hf_model_type": config.architecture}
    for key in KEYS:
        found[key] = getattr(config, "context_length" if key == "max_position_embeddings" else key)
    found["rope_type"] = ROPE_NORM if is_interleaved else ROPE_NEOX
    found["param_count"] = sum(ref.n_elements for ref in source.tensors.values())
    quantized = sorted({tensor.dtype for tensor in tensors if tensor.dtype in QUANTIZED_DTYPES})
    if quantized:
        found["quantization"] = {"quant_type": "+".join(quantized)}
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    main = main_float(dtypes, {tensor.name: tensor.nbytes for tensor in tensors})
    found[HF_CONFIG] = hf_config(source, main, None)
    return found | dict(keys)


def _rows_are_interleaved(source: Artifact) -> bool:
    """Whether the rows of all q and k projections lie in neighbouring pairs."""
    turned = [
        ref for name, ref in source.tensors.items() if name.endswith((".q_proj.weight", ".k_proj.weight"))
    ]
    return bool(turned) and all(ref.rope_heads for ref in turned)


def _stored(ref: TensorRef, quantize: str | None, *, keep_order: bool, dequantize_rest: bool) -> StoredTensor:
    """How a tensor is written.

    Raises:
        InputError: .apr has no room for its format.
    """
    order = None if keep_order else ref.row_order()
    is_matrix = layer_of(ref.name) is not None and len(ref.shape) == 2
    if quantize is not None and is_matrix:
        write = _as_q4 if quantize == APR_Q4 else _as_q8
        return StoredTensor(ref.name, quantize, ref.shape, lambda: write(ref, order))
    if ref.value_offset:
        return StoredTensor(ref.name, "F32", ref.shape, lambda: _as_f32(ref, order))
    if order is None and isinstance(ref, AprTensor):
        return StoredTensor(ref.name, ref.stored_dtype, ref.shape, lambda: [ref.stored_bytes()])
    if ref.dtype in CODES and ref.stored_dtype == ref.dtype:
        return StoredTensor(ref.name, ref.dtype, ref.shape, lambda: _rows(ref, order))
    if ref.dtype == "Q4_0":
        return StoredTensor(
            ref.name,
            APR_Q4,
            ref.shape,
            lambda: (apr_q4_of_q4_0(slab.reshape(-1)) for slab in _rows(ref, order)),
        )
    if not dequantize_rest:
        raise InputError(
            f"{ref.file}: {ref.stored_name} is {ref.stored_dtype}, which an .apr file cannot hold; "
            "--dequantize writes such tensors as F32"
        )
    return StoredTensor(ref.name, "F32", ref.shape, lambda: _as_f32(ref, order))


def _rows(ref: TensorRef, order: NDArray[np.int64] | None) -> Iterator[Bytes]:
    """Rows of a tensor, a bounded number at a time, all but the last time a multiple of 32."""
    raw = ref.raw()
    count = max(1, _SLAB_VALUES // ref.shape[-1] // 32) * 32
    for start in range(0, ref.n_rows, count):
        stop = min(start + count, ref.n_rows)
        yield np.ascontiguousarray(raw[start:stop] if order is None else raw[order[start:stop]])


def _values(ref: TensorRef, order: NDArray[np.int64] | None) -> Iterator[NDArray[np.float32]]:
    """The canonical values, slab by slab.

    Raises:
        InputError: what the container adds to the values cannot be taken off without rounding.
    """
    if ref.dtype == "F64":
        raise InputError(f"{ref.file}: {ref.stored_name} is F64, whose values F32 cannot hold")
    return shifted((dequantize(rows, ref.dtype) for rows in _rows(ref, order)), ref, 0.0)


def _as_f32(ref: TensorRef, order: NDArray[np.int64] | None) -> Iterator[Bytes]:
    return (slab.reshape(-1).view(np.uint8) for slab in _values(ref, order))


def _finite(ref: TensorRef, order: NDArray[np.int64] | None) -> Iterator[NDArray[np.float32]]:
    for slab in _values(ref, order):
        if not np.isfinite(slab).all():
            raise InputError(f"{ref.file}: {ref.name} holds NaN or infinity, which cannot be quantized")
        yield slab.reshape(-1)


def _as_q4(ref: TensorRef, order: NDArray[np.int64] | None) -> Iterator[Bytes]:
    for slab in _finite(ref, order):
        if np.abs(slab).max(initial=0.0) > 7 * _MAX_F16:
            raise InputError(
                f"{ref.file}: {ref.name} holds values beyond {7 * _MAX_F16:g}, too large for AprQ4"
            )
        yield quantize_q4(slab)


def _as_q8(ref: TensorRef, order: NDArray[np.int64] | None) -> Iterator[Bytes]:
    scale = q8_scale(max(float(np.abs(slab).max()) for slab in _finite(ref, order)))
    yield np.array([scale], dtype="<f4").view(np.uint8)
    for slab in _finite(ref, order):
        yield quantize_q8(slab, scale)
