"""An .apr file as parts that can be changed one by one, its checksums made right again or not."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from random import Random

from tests.fuzz.mutations import change_bytes, change_json, number, text_like
from tests.helpers.apr_bytes import padded

_HEADER = struct.Struct("<4sBBHIQIQQI")
_FIELDS = ("magic", "major", "minor", "flags", "count", "at_metadata", "metadata_size", "at_index", "at_data")
_BITS = {"major": 8, "minor": 8, "flags": 16, "count": 32, "metadata_size": 32}


@dataclass
class Entry:
    """One entry of the index."""

    name: bytes
    code: int
    dims: list[int]
    offset: int
    size: int

    def packed(self) -> bytes:
        """The bytes of it."""
        head = struct.pack("<H", len(self.name) % 65536) + self.name
        head += struct.pack("<BB", self.code % 256, len(self.dims) % 256)
        return head + struct.pack(f"<{len(self.dims)}QQQ", *self.dims, self.offset, self.size)


def entries_of(index: bytes, count: int) -> list[Entry] | None:
    """The entries of an index, or None where it is not well-formed."""
    found = []
    position = 0
    try:
        for _ in range(count):
            (length,) = struct.unpack_from("<H", index, position)
            name = index[position + 2 : position + 2 + length]
            position += 2 + length
            code, n_dims = struct.unpack_from("<BB", index, position)
            *dims, offset, size = struct.unpack_from(f"<{n_dims}QQQ", index, position + 2)
            position += 2 + 8 * (n_dims + 2)
            found.append(Entry(name, code, list(dims), offset, size))
    except struct.error:
        return None
    return found


def with_checksums(data: bytes) -> bytes:
    """The same file with both checksums made right."""
    if len(data) < 68:
        return data
    front = data[:40]
    head = front + struct.pack("<I", zlib.crc32(data[44:64], zlib.crc32(front))) + data[44:64]
    body = head + data[64:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def change_apr(random: Random, data: bytes, other: bytes) -> bytes:
    """One to three changes; in half of the cases of bytes, and mostly otherwise, the checksums are right."""
    changed = data
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        changed = _changed(random, changed, other)
    return with_checksums(changed) if random.random() < 0.85 else changed


def _changed(random: Random, data: bytes, other: bytes) -> bytes:
    if len(data) < 68 or random.random() < 0.15:
        return change_bytes(random, data, other)
    fields = dict(zip(_FIELDS, _HEADER.unpack_from(data)[:-1], strict=True))
    at_index, at_data = fields["at_index"], fields["at_data"]
    text = data[64 : 64 + fields["metadata_size"]]
    entries = entries_of(data[at_index:at_data], min(fields["count"], 1000))
    if not 64 <= at_index <= at_data <= len(data) or entries is None:
        return change_bytes(random, data, other)
    how = random.randrange(8)
    if how == 0:
        name = random.choice(_FIELDS[1:])
        fields[name] = number(random, fields[name], _BITS.get(name, 64))
        return _HEADER.pack(*fields.values(), 0) + data[44:]
    if how < 4:
        text = change_json(random, text, text)
    elif how < 7 and entries:
        _change_entries(random, entries)
    else:
        stored = change_bytes(random, data[at_data:-4], other)
        return data[:at_data] + stored + data[-4:]
    index = b"".join(entry.packed() for entry in entries)
    at_index = 64 + len(padded(text))
    fields |= {
        "count": len(entries),
        "metadata_size": len(text),
        "at_index": at_index,
        "at_data": at_index + len(padded(index)),
    }
    head = _HEADER.pack(*fields.values(), 0) + bytes(20)
    return head[:64].ljust(64, b"\0") + padded(text) + padded(index) + data[at_data:]


def _change_entries(random: Random, entries: list[Entry]) -> None:
    how = random.randrange(9)
    at = random.randrange(len(entries))
    entry = entries[at]
    if how == 0:
        del entries[at]
    elif how == 1:
        entries.insert(at, Entry(entry.name, entry.code, list(entry.dims), entry.offset, entry.size))
    elif how == 2:
        random.shuffle(entries)
    elif how == 3:
        others = [item.name for item in entries]
        new = text_like(random, entry.name.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
        entry.name = random.choice((new, random.choice(others), b"lm_head.weight", b"\xff" * 3))[:300]
        entries.sort(key=lambda item: item.name)
    elif how == 4:
        entry.code = random.choice((*range(16), 30, 128, 129, 255))
        sizes = {0: 4, 1: 2, 3: 8, 4: 4, 5: 8, 6: 1, 7: 1, 30: 2}
        values = entry.size // 4
        entry.size = values * sizes[entry.code] if entry.code in sizes else entry.size
    elif how == 5:
        if entry.dims and random.random() < 0.8:
            axis = random.randrange(len(entry.dims))
            entry.dims[axis] = number(random, entry.dims[axis])
        else:
            entry.dims = (entry.dims * 9)[: random.choice((0, 1, 2, 3, 8, 9))]
    elif how == 6:
        entry.offset = number(random, entry.offset)
    elif how == 7:
        entry.size = number(random, entry.size)
    else:
        entry.offset = random.choice(entries).offset
