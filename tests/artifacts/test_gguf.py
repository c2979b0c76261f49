"""The GGUF reader, against the gguf package's reader and writer and against damaged files."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tests.helpers.tiny_gguf import tiny_tensors, write_gguf

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.ggml_types import GGML_TYPES
from driftscope.artifacts.gguf import Strings, read_gguf
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError

Q = gguf.GGMLQuantizationType
QUANTIZED = {
    "token_embd.weight": Q.Q8_0,
    "blk.0.attn_q.weight": Q.Q4_0,
    "blk.0.attn_k.weight": Q.Q4_1,
    "blk.0.attn_v.weight": Q.F16,
    "blk.0.ffn_up.weight": Q.BF16,
    "blk.1.ffn_gate.weight": Q.Q5_0,
    "blk.1.ffn_down.weight": Q.Q5_1,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole llama model with tensors of several types."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, "llama", tiny_tensors("llama"), formats=QUANTIZED)


def assert_same_as_gguf_reader(path: Path) -> None:
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    for our, their in zip(ours.tensors, theirs.tensors, strict=True):
        assert our.dtype == their.tensor_type.name
        assert our.shape == tuple(int(dim) for dim in reversed(their.shape))
        assert (our.offset, our.nbytes) == (their.data_offset, their.n_bytes)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(expected)
    for key, value in ours.metadata.items():
        found = list(value) if isinstance(value, tuple | Strings) else value
        assert found == expected[key], key
        assert type(found) is type(expected[key]), key
    artifact = open_artifact(path)
    by_name = {t.name: t for t in theirs.tensors}
    for tensor in artifact.tensors.values():
        their = by_name[tensor.stored_name]
        stored = np.ascontiguousarray(their.data).view(np.uint8)
        assert np.array_equal(tensor.raw(), stored.reshape(tensor.n_rows, -1))
        assert tensor.raw().flags.writeable is False


def test_same_as_gguf_reader(tiny: Path) -> None:
    assert_same_as_gguf_reader(tiny)


@pytest.mark.model
def test_default_model_same_as_gguf_reader(default_gguf: Path) -> None:
    assert_same_as_gguf_reader(default_gguf)


@pytest.mark.model
def test_default_model_opens_fast(default_gguf: Path) -> None:
    open_artifact(default_gguf)
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        open_artifact(default_gguf)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.3


def test_types_are_those_of_the_gguf_package() -> None:
    for kind, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        # The gguf package counts two f32 in a q8_1 block; in ggml they have been f16 since 2023.
        expected = (kind.name, block_size, 36 if kind is Q.Q8_1 else block_bytes)
        assert GGML_TYPES[int(kind)] == expected


@pytest.mark.parametrize("alignment", [8, 64, 1024])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    path = write_gguf(tmp_path / "a.gguf", "llama", tiny_tensors("llama"), alignment=alignment)
    file = read_gguf(path)
    assert file.alignment == alignment
    assert all(tensor.offset % alignment == 0 for tensor in file.tensors)
    assert_same_as_gguf_reader(path)


def test_version_2_is_read(tiny: Path, tmp_path: Path) -> None:
    path = patched(tiny, tmp_path, 4, struct.pack("<I", 2))
    assert read_gguf(path).version == 2
    assert [replace(tensor, file=tiny) for tensor in read_gguf(path).tensors] == list(read_gguf(tiny).tensors)


def test_every_scalar_type(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.1,
        "float64": 0.1,
        "bool": True,
        "string": "naïve\n",
    }

    def keys(writer: gguf.GGUFWriter) -> None:
        for name, value in values.items():
            getattr(writer, f"add_{name}")(f"x.{name}", value)
        for name, value in values.items():
            kind = gguf.GGUFValueType[name.upper()]
            writer.add_key_value(f"x.{name}s", [value] * 3, gguf.GGUFValueType.ARRAY, kind)

    metadata = read_gguf(write_gguf(tmp_path / "k.gguf", "llama", {}, keys=keys)).metadata
    for name, value in values.items():
        expected = float(np.float32(value)) if name == "float32" else value
        assert metadata[f"x.{name}"] == expected
        assert type(metadata[f"x.{name}"]) is type(value)
        assert list(metadata[f"x.{name}s"]) == [expected] * 3


def test_strings_are_a_sequence(tiny: Path) -> None:
    tokens = read_gguf(tiny).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Strings)
    assert tokens[0] == "token 0 é"
    assert tokens[-1] == tokens[len(tokens) - 1]
    assert tokens[2:4] == ("token 2 é", "token 3 é")
    assert tokens == [f"token {i} é" for i in range(len(tokens))]
    assert "token 7 é" in tokens
    with pytest.raises(IndexError):
        tokens[len(tokens)]


def test_string_that_is_not_utf8_is_named_when_it_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    position = tiny.read_bytes().index("token 3 é".encode())
    path = patched(tiny, tmp_path, position, b"\xff")
    tokens = read_gguf(path).metadata["tokenizer.ggml.tokens"]
    assert tokens[2] == "token 2 é"
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.tokens: string 3 is not UTF-8"):
        tokens[3]


# --- Damaged files.


def patched(source: Path, folder: Path, offset: int, new: bytes) -> Path:
    """A copy with some bytes replaced."""
    data = bytearray(source.read_bytes())
    data[offset : offset + len(new)] = new
    path = folder / "patched.gguf"
    path.write_bytes(data)
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A tensor's description; `shape` in GGUF's order."""
    return text(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


def built(
    keys: list[bytes],
    entries: list[bytes],
    data: bytes = bytes(1024),
    *,
    n_keys: int = -1,
    n_tensors: int = -1,
) -> bytes:
    """A file from its parts; the counts are right unless they are given."""
    n_keys = len(keys) if n_keys < 0 else n_keys
    n_tensors = len(entries) if n_tensors < 0 else n_tensors
    head = b"GGUF" + u32(3) + u64(n_tensors) + u64(n_keys) + b"".join(keys) + b"".join(entries)
    return head + bytes(-len(head) % 32) + data


ARCHITECTURE_KEY = text("general.architecture") + u32(8) + text("llama")
GOOD = entry("a", (8, 2), 0, 0)

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "short magic": (b"GG", "2 bytes"),
    "magic": (b"GGML" + bytes(60), "starts with b'GGML'"),
    "version 1": (b"GGUF" + u32(1) + bytes(60), "version 1; expected one of 2, 3"),
    "version 4": (b"GGUF" + u32(4) + bytes(60), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
    "no counts": (b"GGUF" + u32(3) + bytes(4), "tensor count reaches past the end"),
    "tensor count": (built([], [GOOD], n_tensors=2**63), f"tensor count is {2**63}, but only"),
    "tensor count off by many": (built([], [GOOD], n_tensors=20), "tensor 1 of 20"),
    "key count": (built([ARCHITECTURE_KEY], [GOOD], n_keys=2**64 - 1), "key-value count is"),
    "key length": (built([u64(2**62)], []), "key 0 of 1 has a length of"),
    "empty key": (built([text("") + u32(8) + text("x")], []), "key 0 of 1 is empty"),
    "key is not UTF-8": (built([u64(2) + b"\xff\xfe" + u32(8) + text("x")], []), "not UTF-8"),
    "repeated key": (built([ARCHITECTURE_KEY] * 2, []), "general.architecture is there twice"),
    "unknown type": (built([text("k") + u32(13)], []), "k has the unknown type 13"),
    "string length": (built([text("k") + u32(8) + u64(5000)], []), "k has a length of 5000"),
    "array element type": (built([text("k") + u32(9) + u32(99) + u64(1)], []), "unknown type 99"),
    "nested array": (built([text("k") + u32(9) + u32(9) + u64(1)], []), "k is an array of arrays"),
    "array length": (built([text("k") + u32(9) + u32(4) + u64(2**61)], []), "length of k is"),
    "string array length": (built([text("k") + u32(9) + u32(8) + u64(2**60)], []), "length of k is"),
    "string in array": (
        built([text("k") + u32(9) + u32(8) + u64(3) + text("x") + u64(2**64 - 1)], []),
        "string 1 of 3 of k reaches past",
    ),
    "bool": (built([text("k") + u32(7) + b"\x02"], []), "k is 2; expected a truth value"),
    "bool in array": (built([text("k") + u32(9) + u32(7) + u64(2) + b"\x01\x07"], []), "neither 0 nor 1"),
    "alignment 0": (built([text("general.alignment") + u32(4) + u32(0)], [GOOD]), "alignment is 0"),
    "alignment 48": (built([text("general.alignment") + u32(4) + u32(48)], [GOOD]), "a power of two"),
    "alignment string": (built([text("general.alignment") + u32(8) + text("32")], [GOOD]), "a whole number"),
    "tensor without name": (built([], [entry("", (8,), 0, 0)]), "tensor 0 of 1 has no name"),
    "no dimensions": (built([], [entry("a", (), 0, 0)]), "tensor a has 0 dimensions; expected 1 to 4"),
    "five dimensions": (built([], [entry("a", (1,) * 5, 0, 0)]), "tensor a has 5 dimensions"),
    "empty dimension": (built([], [entry("a", (8, 0), 0, 0)]), "tensor a has the shape"),
    "product overflows": (built([], [entry("a", (2**40, 2**40), 0, 0)]), "is it truncated"),
    "product wraps to nothing": (built([], [entry("a", (2**32, 2**32), 0, 0)]), "is it truncated"),
    "ggml type": (built([], [entry("a", (8,), 4, 0)]), "tensor a has the unknown ggml type 4"),
    "ggml type beyond": (built([], [entry("a", (8,), 2**32 - 1, 0)]), "unknown ggml type"),
    "row is not whole blocks": (built([], [entry("a", (48,), 8, 0)]), "Q8_0 expects a multiple of 32"),
    "offset not aligned": (built([], [entry("a", (8,), 0, 8)]), "offset 8; expected a multiple of 32"),
    "offset beyond": (built([], [entry("a", (8,), 0, 2**63)]), "tensor a (F32 8) ends at byte"),
    "data cut": (built([], [entry("a", (8,), 0, 992)], bytes(1000)), "but the file has"),
    "repeated tensor": (built([], [GOOD, entry("a", (8,), 0, 64)]), "the tensor a is there twice"),
    "overlap": (built([], [entry("b", (16, 2), 0, 0), entry("a", (8,), 0, 96)]), "b and a overlap"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, message = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_the_parts_make_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(built([ARCHITECTURE_KEY], [GOOD]))
    (tensor,) = read_gguf(path).tensors
    assert (tensor.name, tensor.shape, tensor.nbytes) == ("a", (2, 8), 64)


def structure_end(path: Path) -> int:
    """Where the tensor data starts: everything before is structure."""
    return read_gguf(path).data_offset


def open_or_refuse(path: Path) -> bool:
    """Whether a file opens; the only other way out is `InputError` in one line, and both are quick."""
    start = time.perf_counter()
    refusal = ""
    try:
        artifact = open_artifact(path)
        check_complete(artifact)
        for tensor in artifact.tensors.values():
            assert tensor.raw().size == tensor.nbytes
            tensor.row_order()
        for value in artifact.metadata.values():
            list(value) if isinstance(value, Strings) else None
    except InputError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert time.perf_counter() - start < 5
    return not refusal


def test_truncation_anywhere_is_refused(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    end = structure_end(tiny)
    last = max(t.offset + t.nbytes for t in read_gguf(tiny).tensors)
    cuts = sorted({*range(0, end, 41), *range(end - 70, end + 70, 3), *range(end, last, 9973), last - 1})
    path = tmp_path / "cut.gguf"
    for cut in cuts:
        path.write_bytes(data[:cut])
        assert not open_or_refuse(path), cut
    path.write_bytes(data[:last])
    assert open_or_refuse(path)


def mutations(data: bytes, end: int, seed: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Bytes changed at one place of the structure: a bit, a byte, or a field set to a telling value."""
    random = np.random.Generator(np.random.Philox(seed))
    extremes = [u32(0), u32(2**31), u32(2**32 - 1), u64(0), u64(2**31), u64(2**63), u64(2**64 - 1), b"\xff"]
    for _ in range(count):
        place = int(random.integers(4, end))
        how = int(random.integers(3))
        if how == 0:
            new = bytes([data[place] ^ (1 << int(random.integers(8)))])
        elif how == 1:
            new = bytes([int(random.integers(256))])
        else:
            new = extremes[int(random.integers(len(extremes)))]
        yield place, new


@pytest.mark.parametrize("seed", range(4))
def test_mutated_structure_opens_or_is_refused(tiny: Path, tmp_path: Path, seed: int) -> None:
    data = tiny.read_bytes()
    end = structure_end(tiny)
    outcomes = []
    for place, new in mutations(data, end, seed, 150):
        outcomes.append(open_or_refuse(patched(tiny, tmp_path, place, new)))
    # Half of the structure is text; a change there is often harmless. Both ways out must occur.
    assert 10 < sum(outcomes) < 140


def test_every_count_and_length_of_the_structure(tiny: Path, tmp_path: Path) -> None:
    """Each byte of the first kilobyte and of the tensor descriptions, set to 0xff, one at a time."""
    end = structure_end(tiny)
    for place in (*range(4, 700, 7), *range(end - 1200, end, 11)):
        open_or_refuse(patched(tiny, tmp_path, place, b"\xff"))


# --- Files that are not files.


def test_what_is_not_a_regular_file(tmp_path: Path, tiny: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    for path, message in (
        (tmp_path / "none.gguf", "cannot be opened"),
        (pipe, "a pipe; expected a regular file"),
        (Path("/dev/zero"), "a character device; expected a regular file"),
        (Path("a" * 5000), "cannot be opened"),
        (Path("nul\0byte"), "cannot be opened"),
    ):
        with pytest.raises(InputError, match=message):
            open_artifact(path)
    with pytest.raises(InputError, match="a folder"):
        read_gguf(tmp_path)
    link = tmp_path / "link.gguf"
    link.symlink_to(tiny)
    assert len(open_artifact(link).tensors) == len(open_artifact(tiny).tensors)


def test_other_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a model")
    with pytest.raises(InputError, match="neither a GGUF file"):
        open_artifact(path)


def test_file_that_shrinks_after_it_was_opened(tiny: Path, tmp_path: Path) -> None:
    path = patched(tiny, tmp_path, 0, b"G")
    tensor = open_artifact(path).tensors["lm_head.weight"]
    os.truncate(path, tensor.offset + 8)
    with pytest.raises(InputError, match=r"lm_head\.weight cannot be read"):
        tensor.raw()


def test_hostile_arrays_cost_little(tmp_path: Path) -> None:
    """Ten million empty strings are refused, not kept."""
    path = tmp_path / "bomb.gguf"
    count = 10_000_000
    key = text("k") + u32(9) + u32(8) + u64(count)
    path.write_bytes(b"GGUF" + u32(3) + u64(0) + u64(1) + key + bytes(8 * count))
    start = time.perf_counter()
    with pytest.raises(InputError, match="length of k is 10000000; expected at most"):
        read_gguf(path)
    assert time.perf_counter() - start < 2
