"""GGUF models in parts, written by the gguf package and read by llama.cpp as well."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from tests.helpers.tiny_gguf import VOCAB, add_hyperparameters, tiny_tensors

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.gguf_split import part_ending, read_gguf_model
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError


def write_parts(
    folder: Path, tensors: dict[str, Any], *, limit: int = 0, architecture: str = "llama"
) -> list[Path]:
    """A model in parts of at most `limit` tensors, or in one file."""
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "m.gguf", architecture, split_max_tensors=limit)
    add_hyperparameters(writer)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A llama model in three parts."""
    files = write_parts(tmp_path / "parts", tiny_tensors("llama"), limit=8)
    assert [file.name for file in files] == [f"m{part_ending(number, 3)}" for number in range(3)]
    return files


def key(name: str, kind: str, value: int) -> bytes:
    return (
        struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{kind}", {"H": 2, "i": 5}[kind], value)
    )


def patch(file: Path, old: bytes, new: bytes) -> None:
    data = file.read_bytes()
    assert data.count(old) == 1
    file.write_bytes(data.replace(old, new))


def test_any_part_opens_the_model(parts: list[Path], tmp_path: Path) -> None:
    (whole,) = write_parts(tmp_path / "whole", tiny_tensors("llama"))
    expected = open_artifact(whole)
    for file in parts:
        artifact = open_artifact(file)
        check_complete(artifact)
        assert artifact.path == parts[0]
        assert artifact.files == tuple(parts)
        assert artifact.config == expected.config
        assert artifact.metadata == expected.metadata
        assert list(artifact.tensors) == list(expected.tensors)
        for name, tensor in artifact.tensors.items():
            assert np.array_equal(tensor.raw(), expected.tensors[name].raw())
    assert {tensor.file for tensor in open_artifact(parts[1]).tensors.values()} == set(parts)


def test_llama_cpp_reads_the_same_model(parts: list[Path]) -> None:
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(open_artifact(parts[2]).path).encode(), options)
    assert model
    try:
        stored = sum(tensor.n_elements for tensor in open_artifact(parts[0]).tensors.values())
        assert llama_cpp.llama_model_n_params(model) == stored
    finally:
        llama_cpp.llama_model_free(model)


def test_a_folder_and_patterns(parts: list[Path]) -> None:
    folder = parts[0].parent
    expected = open_artifact(parts[0]).tensors
    for path in (folder, folder / "*.gguf", folder / "m-0000?-of-00003.gguf", folder / "*2-of*"):
        assert open_artifact(path).tensors == expected
    shutil.copy(parts[0], folder / "n-00001-of-00003.gguf")
    for path in (folder, folder / "*.gguf"):
        with pytest.raises(InputError, match=r"n-00001-of-00003\.gguf is no part of the model of m-00001"):
            open_artifact(path)
    with pytest.raises(InputError, match="no file matches this pattern"):
        open_artifact(folder / "x*.gguf")


def test_links_to_parts(parts: list[Path], tmp_path: Path) -> None:
    """A person may type a link; the other parts may be links to where that one leads, and nowhere else."""
    links = tmp_path / "links"
    links.mkdir()
    for file in parts:
        (links / file.name).symlink_to(file)
    assert len(open_artifact(links / parts[1].name).tensors) == len(open_artifact(parts[0]).tensors)
    elsewhere = tmp_path / "elsewhere.gguf"
    shutil.copy(parts[2], elsewhere)
    (links / parts[2].name).unlink()
    (links / parts[2].name).symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"m-00003-of-00003\.gguf: a symbolic link to .*elsewhere"):
        open_artifact(links / parts[0].name)


def remove(parts: list[Path]) -> None:
    parts[1].unlink()


def wrong_number(parts: list[Path]) -> None:
    shutil.copy(parts[2], parts[1])


def other_total(parts: list[Path]) -> None:
    patch(parts[1], key("split.tensors.count", "i", 21), key("split.tensors.count", "i", 22))


def total_of_all(parts: list[Path]) -> None:
    for file in parts:
        patch(file, key("split.tensors.count", "i", 21), key("split.tensors.count", "i", 20))


def other_count(parts: list[Path]) -> None:
    patch(parts[2], key("split.count", "H", 3), key("split.count", "H", 4))


def no_count(parts: list[Path]) -> None:
    patch(parts[1], b"split.count", b"split.cuont")


def renamed(parts: list[Path]) -> None:
    parts[0].rename(parts[0].with_name("m.gguf"))
    parts[0] = parts[0].with_name("m.gguf")


def number_beyond(parts: list[Path]) -> None:
    patch(parts[0], key("split.no", "H", 0), key("split.no", "H", 3))


def same_name(parts: list[Path]) -> None:
    patch(parts[2], b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight")


def cut(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:100])


def pipe(parts: list[Path]) -> None:
    parts[1].unlink()
    os.mkfifo(parts[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"part 2 of 3 cannot be used: .*m-00002-of-00003\.gguf: cannot be opened"),
        (wrong_number, r"m-00002-of-00003\.gguf: says that it is part 3 of 3; expected part 2 of 3"),
        (other_total, r"m-00002-of-00003\.gguf: split\.tensors\.count is 22; m-00001-of-00003\.gguf says 21"),
        (total_of_all, r"split\.tensors\.count is 20, but the 3 parts hold 21"),
        (other_count, r"m-00003-of-00003\.gguf: says that it is part 3 of 4; expected part 3 of 3"),
        (no_count, r"m-00002-of-00003\.gguf: split\.count is missing"),
        (renamed, r"m\.gguf: is part 1 of 3; expected a name that ends in -00001-of-00003\.gguf"),
        (number_beyond, "says that it is part 4 of 3"),
        (same_name, r"the tensor 'blk\.0\.ffn_up\.weight' is in m-00002-of-00003\.gguf as well"),
        (cut, r"part 2 of 3 cannot be used: .*m-00002-of-00003\.gguf"),
        (pipe, "a pipe; expected a regular file"),
    ],
)
def test_parts_that_do_not_fit(parts: list[Path], damage: Callable[[list[Path]], None], message: str) -> None:
    damage(parts)
    with pytest.raises(InputError, match=message):
        open_artifact(parts[0])


def test_a_part_of_another_model(parts: list[Path], tmp_path: Path) -> None:
    """A part that carries metadata of its own must agree with the first."""
    data = parts[1].read_bytes()
    name = b"general.architecture"
    more = struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, 5) + b"qwen2"
    (n_keys,) = struct.unpack_from("<Q", data, 16)
    end = read_gguf_model(parts[0]).alignment
    more += (
        struct.pack("<Q", 1)
        + b"x"
        + struct.pack("<IQ", 8, (-len(more) - 21) % end)
        + bytes((-len(more) - 21) % end)
    )
    parts[1].write_bytes(data[:16] + struct.pack("<Q", n_keys + 2) + more + data[24:])
    with pytest.raises(InputError, match=r"general\.architecture is not what m-00001-of-00003\.gguf says"):
        open_artifact(parts[0])


def test_a_split_of_one(tmp_path: Path) -> None:
    (file,) = write_parts(tmp_path / "one", tiny_tensors("llama"))
    model = read_gguf_model(file)
    assert model.files == (file,)
    assert model.metadata == read_gguf_model(file).metadata


def test_a_tensor_beyond_four_gibibytes(tmp_path: Path) -> None:
    """Offsets and sizes past 2^32; the file has holes, so that it takes no room."""
    path = tmp_path / "big.gguf"
    rows, columns = 2**17 + 3, 2**13  # 4 GiB and 96 KiB of F32

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    def entry(name: bytes, dims: tuple[int, ...], offset: int) -> bytes:
        return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)

    size = 4 * rows * columns
    head = b"GGUF" + struct.pack("<IQQ", 2, 2, 0)
    head += entry(b"big", (columns, rows), 0) + entry(b"behind", (8,), size)
    start = -(-len(head) // 32) * 32
    with path.open("wb") as stream:
        stream.write(head)
        stream.seek(start + size - 4)
        stream.write(struct.pack("<f", 7.0))
        stream.write(np.arange(8, dtype="<f4").tobytes())
    file = read_gguf_model(path)
    big, behind = file.tensors
    assert big.nbytes > 2**32
    assert behind.offset == start + size > 2**32
    stored = np.memmap(path, np.uint8, "r")
    assert stored[behind.offset : behind.offset + behind.nbytes].view("<f4").tolist() == list(range(8))
    assert stored[big.offset + big.nbytes - 4 : big.offset + big.nbytes].view("<f4")[0] == 7
    with path.open("r+b") as stream:
        stream.truncate(start + size)
    with pytest.raises(InputError, match=r"tensor behind .* is it truncated"):
        read_gguf_model(path)
