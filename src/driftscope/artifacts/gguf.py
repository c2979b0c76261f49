"""GGUF files, versions 2 and 3, little-endian.

Layout (ggml's ``docs/gguf.md``): magic, version, tensor count, key-value count; the key-values; for each
tensor its name, shape (fastest axis first), type and offset; padding to the alignment; the data. Nothing
in a file is trusted: each length, count and offset is checked against the file before it is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np

from driftscope.artifacts.files import regular_file_size
from driftscope.artifacts.ggml_types import GGML_TYPES
from driftscope.errors import InputError

MAGIC = b"GGUF"

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = _SCALARS[4]
_U64 = _SCALARS[10]

# The fewest bytes that an entry can take: they bound the counts by the size of the file.
_MIN_KEY_VALUE_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

# Far above any model's, and low enough that a hostile file costs seconds and megabytes only.
_MAX_KEY_VALUES = 2**16
_MAX_TENSORS = 2**18
_MAX_ARRAY_LENGTH = 2**22
_MAX_STRING_BYTES = 2**26
_MAX_ELEMENTS = 2**23
_MAX_STRUCTURE_BYTES = 2**27


class Strings(Sequence[str]):
    """An array of strings that are decoded when they are asked for.

    A vocabulary has 100,000 and more; most readers of a model never look at one.
    """

    def __init__(self, data: bytes, ends: list[int], where: str) -> None:
        """Keep the strings of an array.

        Args:
            data: the stored array: for each string its length in 8 bytes, and its bytes.
            ends: offset in `data` behind each string; checked by the caller.
            where: file and key, for messages.
        """
        self._data = data
        self._ends = ends
        self._where = where

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        """One string, or a tuple of some.

        Raises:
            InputError: it is not UTF-8.
        """
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self._ends[index - 1] if index else 0
        try:
            return self._data[start + 8 : self._ends[index]].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self._where}: string {index} is not UTF-8") from error

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings):
            return self._data == other._data
        if isinstance(other, list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self._data)

    def __repr__(self) -> str:
        return f"Strings({len(self)})"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: `shape` in numpy order, `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int
    file: Path


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says.

    Attributes:
        path: the file; of a model in parts, the first.
        version: of the format.
        alignment: bytes that every tensor's offset is a multiple of.
        data_offset: where the tensor data starts.
        metadata: key to number, bool, string, tuple of these, or `Strings`.
        tensors: in the order of the file, or of the files.
        files: the file, or the parts in their order.
    """

    path: Path
    version: int
    alignment: int
    data_offset: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    files: tuple[Path, ...]


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file; the tensor data is not touched.

    Raises:
        InputError: not a GGUF file of a known version, truncated, or inconsistent.
    """
    size = regular_file_size(path)
    if size < len(MAGIC):
        raise InputError(f"{path}: {size} bytes; expected a GGUF file")
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).file()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


class _Reader:
    """A cursor over the mapped file that never leaves it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._position = 0
        self._elements = 0

    def file(self) -> GgufFile:
        if self._data[: len(MAGIC)] != MAGIC:
            self._fail(f"starts with {self._data[:4]!r}; expected {MAGIC!r}")
        self._position = len(MAGIC)
        version = self._scalar(_U32, "version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in _VERSIONS:
                self._fail("is big-endian, which is not supported")
            self._fail(f"is GGUF version {version}; expected one of {', '.join(map(str, _VERSIONS))}")
        n_tensors = self._count("tensor count", _MIN_TENSOR_BYTES, _MAX_TENSORS)
        n_keys = self._count("key-value count", _MIN_KEY_VALUE_BYTES, _MAX_KEY_VALUES)
        metadata: dict[str, Any] = {}
        for number in range(n_keys):
            key = self._string(f"key {number} of {n_keys}")
            if not key:
                self._fail(f"key {number} of {n_keys} is empty")
            if key in metadata:
                self._fail(f"the key {_short(key)} is there twice")
            metadata[key] = self._value(key)
        alignment = self._alignment(metadata)
        entries = [self._tensor_entry(number, n_tensors) for number in range(n_tensors)]
        data_offset = -(-self._position // alignment) * alignment
        tensors = tuple(self._placed(entry, data_offset, alignment) for entry in entries)
        self._check_distinct(tensors)
        return GgufFile(self._path, version, alignment, data_offset, metadata, tensors, (self._path,))

    def _value(self, key: str) -> Any:
        kind = self._scalar(_U32, f"type of {key}")
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            self._fail(f"{_short(key)} has the unknown type {kind}")
        return self._boolean(self._scalar(_SCALARS[kind], key), kind, key)

    def _array(self, key: str) -> Any:
        kind = self._scalar(_U32, f"element type of {key}")
        if kind == _STRING:
            length = self._count(f"length of {key}", 8, _MAX_ARRAY_LENGTH)
            return self._strings(key, self._add_elements(length, key))
        if kind == _ARRAY:
            self._fail(f"{_short(key)} is an array of arrays, which is not supported")
        if kind not in _SCALARS:
            self._fail(f"{_short(key)} has elements of the unknown type {kind}")
        form = _SCALARS[kind]
        length = self._add_elements(self._count(f"length of {key}", form.size, _MAX_ARRAY_LENGTH), key)
        start = self._take(length * form.size, key)
        values = np.frombuffer(self._data[start : self._position], dtype=form.format)
        if kind == _BOOL:
            if values.size and int(values.max()) > 1:
                self._fail(f"{_short(key)} holds a truth value that is neither 0 nor 1")
            values = values.astype(bool)
        return tuple(values.tolist())

    def _strings(self, key: str, length: int) -> Strings:
        start, size, unpack = self._position, self._size, _U64.unpack_from
        data = self._data
        position = start
        ends = []
        for index in range(length):
            # The length itself lies inside the file too: unpack_from would raise otherwise.
            position = position + 8 + unpack(data, position)[0] if position + 8 <= size else size + 1
            if position > size:
                self._fail(f"string {index} of {length} of {_short(key)} reaches past the end of the file")
            ends.append(position - start)
        self._move_to(position, key)
        return Strings(data[start:position], ends, f"{self._path}: {_short(key)}")

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int):
            self._fail(f"general.alignment is {_short(alignment)}; expected a whole number")
        if alignment <= 0 or alignment & (alignment - 1) or alignment > 2**31:
            self._fail(f"general.alignment is {alignment}; expected a power of two")
        return int(alignment)

    def _tensor_entry(self, number: int, total: int) -> GgufTensor:
        """A tensor as the file describes it; its offset is still that from the start of the data."""
        name = self._string(f"name of tensor {number} of {total}")
        if not name:
            self._fail(f"tensor {number} of {total} has no name")
        label = f"tensor {_short(name)}"
        n_dims = self._scalar(_U32, f"number of dimensions of {label}")
        if not 1 <= n_dims <= _MAX_DIMS:
            self._fail(f"{label} has {n_dims} dimensions; expected 1 to {_MAX_DIMS}")
        shape = tuple(self._scalar(_U64, f"shape of {label}") for _ in range(n_dims))[::-1]
        if not all(shape):
            self._fail(f"{label} has the shape {list(shape)}; expected no empty dimension")
        kind = self._scalar(_U32, f"type of {label}")
        if kind not in GGML_TYPES:
            self._fail(f"{label} has the unknown ggml type {kind}")
        dtype, block_size, block_bytes = GGML_TYPES[kind]
        if shape[-1] % block_size:
            self._fail(f"{label} has rows of {shape[-1]} values; {dtype} expects a multiple of {block_size}")
        nbytes = block_bytes
        for blocks in (*shape[:-1], shape[-1] // block_size):
            nbytes *= blocks
        return GgufTensor(name, shape, dtype, self._scalar(_U64, f"offset of {label}"), nbytes, self._path)

    def _placed(self, entry: GgufTensor, data_offset: int, alignment: int) -> GgufTensor:
        """The tensor with its offset from the start of the file, which holds all of it."""
        label = f"tensor {_short(entry.name)}"
        if entry.offset % alignment:
            self._fail(f"{label} is at offset {entry.offset}; expected a multiple of {alignment}")
        start = data_offset + entry.offset
        if start + entry.nbytes > self._size:
            self._fail(
                f"{label} ({entry.dtype} {'x'.join(map(str, entry.shape))}) ends at byte "
                f"{start + entry.nbytes}, but the file has {self._size}; is it truncated?"
            )
        return replace(entry, offset=start)

    def _check_distinct(self, tensors: tuple[GgufTensor, ...]) -> None:
        """No two tensors have one name or share bytes."""
        seen: set[str] = set()
        for tensor in tensors:
            if tensor.name in seen:
                self._fail(f"the tensor {_short(tensor.name)} is there twice")
            seen.add(tensor.name)
        ordered = sorted(tensors, key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                self._fail(f"the tensors {_short(before.name)} and {_short(after.name)} overlap")

    def _take(self, count: int, what: str) -> int:
        """Move `count` bytes on, and return where they start."""
        start = self._position
        if count > self._size - start:
            self._fail(f"{_short(what)} reaches past the end of the file; is it truncated?")
        self._move_to(start + count, what)
        return start

    def _move_to(self, position: int, what: str) -> None:
        """Go on at another position, within what a file may have in front of its data."""
        if position > _MAX_STRUCTURE_BYTES:
            self._fail(f"{_short(what)} ends at byte {position}; expected at most {_MAX_STRUCTURE_BYTES}")
        self._position = position

    def _add_elements(self, count: int, key: str) -> int:
        """Count the elements of all arrays together; returns those of this one."""
        self._elements += count
        if self._elements > _MAX_ELEMENTS:
            self._fail(f"the arrays up to {_short(key)} have more than {_MAX_ELEMENTS} elements together")
        return count

    def _scalar(self, form: struct.Struct, what: str) -> Any:
        return form.unpack_from(self._data, self._take(form.size, what))[0]

    def _boolean(self, value: Any, kind: int, what: str) -> Any:
        if kind != _BOOL:
            return value
        if value > 1:
            self._fail(f"{_short(what)} is {value}; expected a truth value, 0 or 1")
        return bool(value)

    def _count(self, what: str, min_bytes: int, most: int) -> int:
        """A count, at most `most`, of things that each take `min_bytes` or more of the rest of the file."""
        count = self._scalar(_U64, what)
        left = self._size - self._position
        if count > left // min_bytes:
            self._fail(f"{_short(what)} is {count}, but only {left} bytes follow")
        if count > most:
            self._fail(f"{_short(what)} is {count}; expected at most {most}")
        return int(count)

    def _string(self, what: str) -> str:
        length = self._scalar(_U64, f"length of {what}")
        if length > min(_MAX_STRING_BYTES, self._size - self._position):
            self._fail(f"{_short(what)} has a length of {length} bytes, in a file of {self._size}")
        start = self._take(length, what)
        try:
            return self._data[start : self._position].decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{_short(what)} is not UTF-8")

    def _fail(self, problem: str) -> NoReturn:
        raise InputError(f"{self._path}: {problem}")


def _short(value: object) -> str:
    """A value for a message: printable, cut where it is long."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
