"""The .apr container, read from bytes that are packed by hand."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import apr_bytes as apr
from tests.helpers.apr_bytes import apr_bytes

from driftscope.artifacts.apr.container import read_apr
from driftscope.errors import InputError

ONES = np.ones((3, 40), np.float32)
TENSORS = {"b": apr.f32(ONES), "a": apr.f32(2 * ONES[0]), "é": (apr.U8, (5,), b"12345")}


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "m.apr"
    path.write_bytes(data)
    return path


def _refused(folder: Path, data: bytes, match: str) -> None:
    path = _write(folder, data)
    with pytest.raises(InputError, match=match) as caught:
        read_apr(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_every_field_is_read(tmp_path: Path) -> None:
    path = _write(tmp_path, apr_bytes({"name": "x"}, TENSORS, order=["é", "b", "a"], flags=1024 | 32 | 512))
    file = read_apr(path)
    assert file.metadata == {"name": "x"}
    assert file.flags == 1024 | 32 | 512
    assert [tensor.name for tensor in file.tensors] == ["a", "b", "é"]
    assert [tensor.dtype for tensor in file.tensors] == ["F32", "F32", "U8"]
    assert [tensor.shape for tensor in file.tensors] == [(40,), (3, 40), (5,)]
    data = path.read_bytes()
    for tensor in file.tensors:
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == TENSORS[tensor.name][2]


def test_file_without_tensors(tmp_path: Path) -> None:
    assert read_apr(_write(tmp_path, apr_bytes({}, {}))).tensors == ()


@pytest.mark.parametrize(
    ("code", "dims", "size", "dtype"),
    [
        (0, (2, 3), 24, "F32"),
        (1, (2, 3), 12, "F16"),
        (3, (2, 3), 48, "F64"),
        (4, (5,), 20, "I32"),
        (5, (5,), 40, "I64"),
        (6, (5,), 5, "I8"),
        (7, (5,), 5, "U8"),
        (30, (5,), 10, "BF16"),
        (12, (3, 256), 3 * 144, "Q4_K"),
        (12, (3, 300), 3 * 2 * 144, "Q4_K"),
        (14, (2, 1, 10), 2 * 210, "Q6_K"),
        (128, (3, 32), 3 * 18, "AprQ4"),
        (128, (3, 33), 4 * 18, "AprQ4"),
        (8, (1,), 18, "AprQ4"),
        (129, (3, 33), 4 + 99, "AprQ8"),
        (9, (1,), 5, "AprQ8"),
        (0, (), 4, "F32"),
        (0, (0, 4), 0, "F32"),
        (129, (0,), 0, "AprQ8"),
        (12, (4, 0), 0, "Q4_K"),
        (0, (1,) * 8, 4, "F32"),
    ],
)
def test_sizes_of_dtypes(tmp_path: Path, code: int, dims: tuple[int, ...], size: int, dtype: str) -> None:
    file = read_apr(_write(tmp_path, apr_bytes({}, {"t": (code, dims, bytes(size))})))
    assert (file.tensors[0].dtype, file.tensors[0].shape, file.tensors[0].nbytes) == (dtype, dims, size)
    expected = f"tensor t has {size + 1} bytes; {dtype} .* takes {size}"
    _refused(tmp_path, apr_bytes({}, {"t": (code, dims, bytes(size + 1))}), expected)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"magic": b"APR2"}, r"starts with b'APR2'; expected b'APR\\x00'"),
        ({"version": (1, 0)}, r"version 1\.0; expected 2\.0"),
        ({"version": (2, 1)}, r"version 2\.1; expected 2\.0"),
        ({"header_checksum": 1}, "the checksum of the header is .{8}; expected 00000001; it is corrupt"),
        ({"flags": 1024 | 1}, "LZ4 compression, which is not supported"),
        ({"flags": 1024 | 2}, "ZSTD compression"),
        ({"flags": 1024 | 4}, "encryption"),
        ({"flags": 1024 | 8}, "a signature"),
        ({"flags": 1024 | 16}, "sharding"),
        ({"flags": 2048}, "a column-major layout, which is not supported"),
        ({"flags": 1024 | 2048 | 1}, "LZ4 compression, a column-major layout"),
        ({"flags": 0}, "the flags are 0x0; expected row-major, 0x400, among them"),
        ({"flags": 1024 | 4096}, "the flags hold 0x1000, whose meaning is unknown"),
        ({"at_metadata": 128}, "the metadata is at byte 128; expected 64"),
        ({"metadata_size": 2**24 + 1}, "the metadata has 16777217 bytes; expected at most 16777216"),
        ({"metadata_size": 4000}, "end of the metadata is at byte 4064, but the tensor index at 128"),
        ({"at_index": 2**63}, "the tensor index is at byte 9223372036854775808, but the data at"),
        ({"at_data": 2**64 - 64}, "the data is at byte 18446744073709551552, but the checksum at"),
        ({"at_index": 129}, "the tensor index starts at byte 129; expected a multiple of 64"),
        ({"at_data": 257}, "the data starts at byte 257; expected a multiple of 64"),
        ({"count": 2**32 - 1}, "4294967295 tensors in an index of 128 bytes"),
        ({"count": 5}, "the name of tensor 3 of 5 has 0 bytes; expected 1 to 256"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, fields: dict[str, Any], match: str) -> None:
    _refused(tmp_path, apr_bytes({}, TENSORS, **fields), match)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        (apr.entry(b"t", 2, (4,), 0, 16), r"tensor t has the dtype 2; expected one of 0, 1, 3, 4, 5"),
        (apr.entry(b"t", 0, (1,) * 9, 0, 4), "tensor t has 9 dimensions; expected at most 8"),
        (apr.entry(b"t" * 257, 0, (4,), 0, 16), "the name of tensor 0 of 1 has 257 bytes"),
        (apr.entry(b"", 0, (4,), 0, 16), "the name of tensor 0 of 1 has 0 bytes"),
        (apr.entry(b"\xff", 0, (4,), 0, 16), "the name of tensor 0 of 1 is not UTF-8"),
        (apr.entry(b"t", 0, (4,), 8, 16), "tensor t is at offset 8; expected a multiple of 64"),
        (apr.entry(b"t", 0, (4,), 2**64 - 64, 16), "tensor t ends at byte .*, but the data at"),
        (apr.entry(b"t", 0, (2**63, 2**63), 0, 16), "tensor t has 16 bytes; F32 .* takes"),
        (apr.entry(b"t", 0, (80,), 0, 320), "tensor t ends at byte .*; is the file truncated"),
        (apr.entry(b"a\nb", 2, (4,), 0, 16), r"tensor 'a\\nb' has the dtype 2"),
    ],
)
def test_entries_that_are_refused(tmp_path: Path, index: bytes, match: str) -> None:
    _refused(tmp_path, apr_bytes({}, {"t": apr.f32(np.ones(4))}, index=index), match)


def test_names_out_of_order(tmp_path: Path) -> None:
    entries = [apr.entry(name, 0, (4,), 64 * i, 16) for i, name in enumerate((b"b", b"a"))]
    tensors = {name: apr.f32(np.ones(4)) for name in "ab"}
    _refused(tmp_path, apr_bytes({}, tensors, index=b"".join(entries)), "the tensor a comes behind b")


def test_the_same_name_twice(tmp_path: Path) -> None:
    entries = [apr.entry(b"a", 0, (4,), 64 * i, 16) for i in range(2)]
    tensors = {name: apr.f32(np.ones(4)) for name in "ab"}
    _refused(tmp_path, apr_bytes({}, tensors, index=b"".join(entries)), "the tensor a is there twice")


def test_ranges_that_overlap(tmp_path: Path) -> None:
    entries = [apr.entry(b"a", 0, (20,), 0, 80), apr.entry(b"b", 0, (4,), 64, 16)]
    tensors = {name: apr.f32(np.ones(20)) for name in "ab"}
    _refused(tmp_path, apr_bytes({}, tensors, index=b"".join(entries)), "the tensors a and b overlap")


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        (b"[]", "metadata: expected a JSON object"),
        (b"{", "metadata: not valid JSON"),
        (b'{"a": 1, "a": 2}', "metadata: the key 'a' is there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "metadata: the key 'b' is there twice"),
        (b'{"a": "\xff"}', "metadata: not valid JSON"),
        (b"[" * 5000, "metadata: not valid JSON"),
        (b"", "metadata: not valid JSON"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, metadata: bytes, match: str) -> None:
    _refused(tmp_path, apr_bytes(metadata, TENSORS), match)


def test_the_checksum_at_the_end(tmp_path: Path) -> None:
    good = apr_bytes({}, TENSORS)
    _refused(
        tmp_path, apr_bytes({}, TENSORS, checksum=7), "expected 00000007, as its end says; it is corrupt"
    )
    flipped = bytearray(good)
    flipped[-20] ^= 1
    _refused(tmp_path, bytes(flipped), "the checksum of the file is")
    # What has been verified is not read again.
    assert read_apr(_write(tmp_path, bytes(flipped)), verified=True).tensors


def test_progress_of_the_checksum(tmp_path: Path) -> None:
    big = {"t": (apr.U8, (9 * 2**20,), bytes(9 * 2**20))}
    path = _write(tmp_path, apr_bytes({}, big))
    calls: list[tuple[int, int]] = []
    read_apr(path, progress=lambda done, total: calls.append((done, total)))
    total = path.stat().st_size - 4
    assert [done for done, _ in calls] == [4 * 2**20, 8 * 2**20, total]
    assert {total for _, total in calls} == {total}


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = apr_bytes({"name": "x"}, TENSORS)
    for length in range(0, len(data), 7):
        _refused(tmp_path, data[:length], "expected|truncated|corrupt")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        read_apr(tmp_path / "none.apr")
    with pytest.raises(InputError, match="a folder; expected a regular file"):
        read_apr(tmp_path)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_changed_bytes_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes in front of the data are changed and both checksums made right again."""
    good = bytearray(apr_bytes({"name": "x"}, TENSORS))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(4, 320))] = data.draw(st.sampled_from([0, 1, 2, 64, 127, 128, 255]))
    good[40:44] = struct.pack("<I", zlib.crc32(good[44:64], zlib.crc32(good[:40])))
    good[-4:] = struct.pack("<I", zlib.crc32(good[:-4]))
    path = _write(tmp_path_factory.getbasetemp(), bytes(good))
    try:
        file = read_apr(path)
    except InputError:
        return
    assert all(tensor.offset + tensor.nbytes <= len(good) - 4 for tensor in file.tensors)
