"""The bytes of an .apr file, packed field by field from the description of the format."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32, F16, F64, I32, I64, I8, U8, Q4_K, Q6_K, BF16, APR_Q4, APR_Q8 = 0, 1, 3, 4, 5, 6, 7, 12, 14, 30, 128, 129
ROW_MAJOR, COLUMN_MAJOR = 1024, 2048

Tensors = Mapping[str, tuple[int, tuple[int, ...], bytes]]
"""Name to dtype code, dims and bytes."""


def padded(data: bytes) -> bytes:
    """Data and zeros up to a multiple of 64 bytes."""
    return data + b"\0" * (-len(data) % 64)


def header(
    count: int,
    metadata_size: int,
    at_index: int,
    at_data: int,
    *,
    magic: bytes = b"APR\0",
    version: tuple[int, int] = (2, 0),
    flags: int = ROW_MAJOR,
    at_metadata: int = 64,
    header_checksum: int | None = None,
) -> bytes:
    """The 64 bytes in front, with the checksum of bytes 0-39 and 44-63."""
    start = magic + struct.pack("<BBH", *version, flags)
    start += struct.pack("<IQIQQ", count, at_metadata, metadata_size, at_index, at_data)
    end = b"\0" * 20
    if header_checksum is None:
        header_checksum = zlib.crc32(start + end)
    return start + struct.pack("<I", header_checksum) + end


def entry(name: bytes, code: int, dims: Iterable[int], offset: int, size: int) -> bytes:
    """One entry of the index."""
    dims = tuple(dims)
    packed = struct.pack("<H", len(name)) + name + struct.pack("<BB", code, len(dims))
    packed += b"".join(struct.pack("<Q", dim) for dim in dims)
    return packed + struct.pack("<QQ", offset, size)


def apr_bytes(
    metadata: Mapping[str, Any] | bytes,
    tensors: Tensors,
    *,
    order: Iterable[str] | None = None,
    index: bytes | None = None,
    checksum: int | None = None,
    **fields: Any,
) -> bytes:
    """A whole file.

    Args:
        metadata: an object, or the bytes to put in its place.
        tensors: in any order.
        order: of the data; by default that of the names.
        index: to put in the place of the right one.
        checksum: to put in the place of the right one at the end.
        fields: of the header, where they are to be others.
    """
    text = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    places = {}
    data = b""
    for name in order or sorted(tensors):
        places[name] = len(data)
        data += padded(tensors[name][2])
    if index is None:
        index = b"".join(
            entry(name.encode(), tensors[name][0], tensors[name][1], places[name], len(tensors[name][2]))
            for name in sorted(tensors, key=str.encode)
        )
    at_index = 64 + len(padded(text))
    values = {
        "count": len(tensors),
        "metadata_size": len(text),
        "at_index": at_index,
        "at_data": at_index + len(padded(index)),
    }
    body = header(**(values | fields)) + padded(text) + padded(index) + data
    return body + struct.pack("<I", zlib.crc32(body) if checksum is None else checksum)


def f32(values: NDArray[Any]) -> tuple[int, tuple[int, ...], bytes]:
    """A tensor of `Tensors`, stored as F32."""
    return F32, values.shape, values.astype("<f4").tobytes()


def apr_q4(values: NDArray[Any]) -> tuple[int, tuple[int, ...], bytes]:
    """A tensor stored as AprQ4, value by value: the scale is the largest magnitude of 32 values over 7."""
    flat = values.astype(np.float32).reshape(-1)
    out = b""
    for start in range(0, flat.size, 32):
        block = flat[start : start + 32]
        largest = np.abs(block).max()
        scale = np.float32(largest / np.float32(7)) if largest else np.float32(1)
        packed = bytearray(16)
        for i, value in enumerate(block):
            quotient = float(np.float32(value) / scale)
            nearest = int(abs(quotient) + 0.5) * (-1 if quotient < 0 else 1)
            nibble = max(-8, min(7, nearest)) + 8
            packed[i // 2] |= nibble << (4 * (i % 2))
        out += struct.pack("<e", float(scale)) + bytes(packed)
    return APR_Q4, values.shape, out


def apr_q8(values: NDArray[Any]) -> tuple[int, tuple[int, ...], bytes]:
    """A tensor stored as AprQ8: one scale, the largest magnitude over 127, and a byte a value."""
    flat = values.astype(np.float32).reshape(-1)
    largest = np.abs(flat).max()
    scale = np.float32(largest / np.float32(127)) if largest else np.float32(1)
    quotients = [float(value / scale) for value in flat]
    nearest = [int(abs(q) + 0.5) * (-1 if q < 0 else 1) for q in quotients]
    return APR_Q8, values.shape, struct.pack("<f", float(scale)) + struct.pack(f"<{flat.size}b", *nearest)
