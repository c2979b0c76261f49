"""The .apr container, version 2: header, metadata, tensor index and both checksums.

Layout, all little-endian: a header of 64 bytes; a JSON object; the index, sorted by name; the data; a CRC-32
of everything before it. Each section and each tensor starts at a multiple of 64 (``docs/reference/apr.md``).
Nothing in a file is trusted: each length, count and offset is checked against the file before it is used.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO, NoReturn

from driftscope.artifacts.apr.dtypes import NAMES, stored_bytes
from driftscope.artifacts.files import parse_json_object, regular_file_size
from driftscope.errors import InputError

MAGIC = b"APR\0"
VERSION = (2, 0)
ALIGNMENT = 64
HEADER_BYTES = 64
CHECKSUM_BYTES = 4
MAX_METADATA_BYTES = 16 * 2**20
MAX_NAME_BYTES = 256
MAX_DIMS = 8

# Magic, version, flags, tensor count, metadata offset and size, index offset, data offset, checksum.
HEADER = Struct("<4sBBHIQIQQI")
CHECKSUM_OFFSET = 40

FLAGS: dict[int, str] = {
    1: "LZ4 compression",
    2: "ZSTD compression",
    4: "encryption",
    8: "a signature",
    16: "sharding",
    32: "quantized",
    64: "filterbank",
    128: "model card",
    256: "streaming",
    512: "has vocabulary",
    1024: "row-major",
    2048: "a column-major layout",
}
QUANTIZED, HAS_VOCABULARY, ROW_MAJOR = 32, 512, 1024
_REFUSED = 1 | 2 | 4 | 8 | 16 | 2048

_U16 = Struct("<H")
_U64 = Struct("<Q")
_MIN_ENTRY_BYTES = 2 + 1 + 1 + 1 + 8 + 8
_MAX_ENTRY_BYTES = 2 + MAX_NAME_BYTES + 1 + 1 + 8 * MAX_DIMS + 8 + 8
_MAX_TENSORS = 2**18
_CHUNK = 4 * 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class AprEntry:
    """One tensor of a file: `shape` in numpy order, `dtype` as stored, `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class AprFile:
    """What an .apr file says.

    Attributes:
        path: the file.
        flags: the bits of `FLAGS`.
        metadata: the JSON object.
        tensors: in the order of the index, which is that of the names' bytes.
    """

    path: Path
    flags: int
    metadata: dict[str, Any]
    tensors: tuple[AprEntry, ...]


def aligned(size: int) -> int:
    """`size`, rounded up to the alignment of sections and tensors."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def read_apr(path: Path, *, verified: bool = False, progress: Progress | None = None) -> AprFile:
    """Read and check an .apr file.

    Args:
        path: the file.
        verified: its checksum has been verified since it was last written. Otherwise the whole file is read
            once, a few megabytes at a time.
        progress: called with (bytes read, bytes in all) while the file is verified.

    Raises:
        InputError: not an .apr file of this version, truncated, inconsistent or corrupt, or of a kind that is
            not supported (compressed, encrypted, signed, sharded, column-major).
    """
    size = regular_file_size(path)
    try:
        with path.open("rb") as stream:
            file = _Reader(path, stream, size).file()
            if not verified:
                _verify(path, stream, size, progress)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return file


def header_checksum(header: bytes) -> int:
    """CRC-32 of the 64 bytes of a header without the checksum itself."""
    return zlib.crc32(header[CHECKSUM_OFFSET + CHECKSUM_BYTES :], zlib.crc32(header[:CHECKSUM_OFFSET]))


def _verify(path: Path, stream: BinaryIO, size: int, progress: Progress | None) -> None:
    """Compare the checksum at the end of a file with that of everything before it."""
    stream.seek(0)
    left, found = size - CHECKSUM_BYTES, 0
    buffer = memoryview(bytearray(_CHUNK))
    while left:
        count = stream.readinto(buffer[: min(left, _CHUNK)])  # type: ignore[attr-defined]
        if not count:
            raise InputError(f"{path}: ends {left} bytes early; did the file change?")
        found = zlib.crc32(buffer[:count], found)
        left -= count
        if progress is not None:
            progress(size - CHECKSUM_BYTES - left, size - CHECKSUM_BYTES)
    stored = int.from_bytes(stream.read(CHECKSUM_BYTES), "little")
    if found != stored:
        raise InputError(
            f"{path}: the checksum of the file is {found:08x}; expected {stored:08x}, as its end says; "
            "it is corrupt"
        )


class _Reader:
    """The sections in front of the data, checked."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path = path
        self._stream = stream
        self._size = size

    def file(self) -> AprFile:
        if self._size < HEADER_BYTES + CHECKSUM_BYTES:
            self._fail(f"{self._size} bytes; expected an .apr file")
        header = self._read(0, HEADER_BYTES, "the header")
        fields = HEADER.unpack_from(header)
        magic, major, minor, flags, count, at_metadata, metadata_size, at_index, at_data, checksum = fields
        if magic != MAGIC:
            self._fail(f"starts with {magic!r}; expected {MAGIC!r}")
        if (major, minor) != VERSION:
            self._fail(f"is .apr version {major}.{minor}; expected {VERSION[0]}.{VERSION[1]}")
        found = header_checksum(header)
        if found != checksum:
            self._fail(f"the checksum of the header is {found:08x}; expected {checksum:08x}; it is corrupt")
        self._check_flags(flags)
        self._check_sections(at_metadata, metadata_size, at_index, at_data)
        text = self._read(at_metadata, metadata_size, "the metadata")
        metadata = parse_json_object(text, f"{self._path}: metadata")
        return AprFile(self._path, flags, metadata, self._tensors(count, at_index, at_data))

    def _check_flags(self, flags: int) -> None:
        refused = [name for bit, name in FLAGS.items() if flags & _REFUSED & bit]
        if refused:
            self._fail(f"the flags say {', '.join(refused)}, which is not supported")
        unknown = flags & ~sum(FLAGS)
        if unknown:
            self._fail(f"the flags hold {unknown:#x}, whose meaning is unknown")
        if not flags & ROW_MAJOR:
            self._fail(f"the flags are {flags:#x}; expected row-major, {ROW_MAJOR:#x}, among them")

    def _check_sections(self, at_metadata: int, metadata_size: int, at_index: int, at_data: int) -> None:
        if at_metadata != HEADER_BYTES:
            self._fail(f"the metadata is at byte {at_metadata}; expected {HEADER_BYTES}")
        if metadata_size > MAX_METADATA_BYTES:
            self._fail(f"the metadata has {metadata_size} bytes; expected at most {MAX_METADATA_BYTES}")
        ends = {
            "end of the metadata": at_metadata + metadata_size,
            "tensor index": at_index,
            "data": at_data,
            "checksum": self._size - CHECKSUM_BYTES,
        }
        for (before, start), (after, end) in pairwise(ends.items()):
            if start > end:
                self._fail(f"the {before} is at byte {start}, but the {after} at {end}; is it truncated?")
        for name, start in (("tensor index", at_index), ("data", at_data)):
            if start % ALIGNMENT:
                self._fail(f"the {name} starts at byte {start}; expected a multiple of {ALIGNMENT}")

    def _tensors(self, count: int, at_index: int, at_data: int) -> tuple[AprEntry, ...]:
        room = at_data - at_index
        if count > min(room // _MIN_ENTRY_BYTES, _MAX_TENSORS):
            self._fail(f"{count} tensors in an index of {room} bytes; expected at most {_MAX_TENSORS}")
        index = self._read(at_index, min(room, count * _MAX_ENTRY_BYTES), "the tensor index")
        entries = []
        position = 0
        for number in range(count):
            entry, position = self._entry(index, position, f"tensor {number} of {count}", at_data)
            entries.append(entry)
        self._check_distinct(entries)
        return tuple(entries)

    def _entry(self, index: bytes, position: int, label: str, at_data: int) -> tuple[AprEntry, int]:
        """The entry at a position of the index, and the position behind it."""

        def take(count: int, what: str) -> bytes:
            nonlocal position
            if count > len(index) - position:
                self._fail(f"the {what} of {label} reaches past the end of the tensor index")
            position += count
            return index[position - count : position]

        length = _U16.unpack(take(2, "name length"))[0]
        if not 0 < length <= MAX_NAME_BYTES:
            self._fail(f"the name of {label} has {length} bytes; expected 1 to {MAX_NAME_BYTES}")
        try:
            name = take(length, "name").decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"the name of {label} is not UTF-8")
        label = f"tensor {_short(name)}"
        code, n_dims = take(2, "dtype")
        if code not in NAMES:
            self._fail(f"{label} has the dtype {code}; expected one of {', '.join(map(str, sorted(NAMES)))}")
        if n_dims > MAX_DIMS:
            self._fail(f"{label} has {n_dims} dimensions; expected at most {MAX_DIMS}")
        dims = take(8 * n_dims, "shape")
        shape = tuple(_U64.unpack_from(dims, 8 * axis)[0] for axis in range(n_dims))
        offset, nbytes = _U64.unpack(take(8, "offset"))[0], _U64.unpack(take(8, "size"))[0]
        dtype = NAMES[code]
        expected = stored_bytes(dtype, shape)
        if nbytes != expected:
            self._fail(f"{label} has {nbytes} bytes; {dtype} {list(shape)} takes {expected}")
        if offset % ALIGNMENT:
            self._fail(f"{label} is at offset {offset}; expected a multiple of {ALIGNMENT}")
        start, end = at_data + offset, self._size - CHECKSUM_BYTES
        if start + nbytes > end:
            self._fail(
                f"{label} ends at byte {start + nbytes}, but the data at {end}; is the file truncated?"
            )
        return AprEntry(name, shape, dtype, start, nbytes), position

    def _check_distinct(self, entries: list[AprEntry]) -> None:
        """The names are sorted, and no two tensors share bytes."""
        for before, after in pairwise(entries):
            if before.name == after.name:
                self._fail(f"the tensor {_short(after.name)} is there twice")
            if before.name.encode() > after.name.encode():
                self._fail(
                    f"the tensor {_short(after.name)} comes behind {_short(before.name)}; "
                    "expected the index sorted by name"
                )
        placed = sorted((entry for entry in entries if entry.nbytes), key=lambda entry: entry.offset)
        for before, after in pairwise(placed):
            if before.offset + before.nbytes > after.offset:
                self._fail(f"the tensors {_short(before.name)} and {_short(after.name)} overlap")

    def _read(self, start: int, count: int, what: str) -> bytes:
        self._stream.seek(start)
        data = self._stream.read(count)
        if len(data) != count:
            self._fail(f"ends within {what}; is it truncated?")
        return data

    def _fail(self, problem: str) -> NoReturn:
        raise InputError(f"{self._path}: {problem}")


def _short(value: str) -> str:
    """A name for a message: printable, cut where it is long."""
    text = value if value.isprintable() else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
