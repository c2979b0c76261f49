"""The safetensors reader, against the safetensors library and against damaged files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from tests.helpers.tiny_models import save_tiny_model

from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.safetensors import INDEX, read_safetensors, read_sharded
from driftscope.errors import InputError


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen2 model in several shards."""
    folder = tmp_path_factory.mktemp("sharded")
    save_tiny_model(folder, "qwen2")
    return folder


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_same_as_the_safetensors_library(tmp_path: Path) -> None:
    random = np.random.Generator(np.random.Philox(0))
    path = tmp_path / "x.safetensors"
    arrays = {
        "double": random.standard_normal((3, 5)),
        "single": random.standard_normal((2, 3, 4)).astype(np.float32),
        "half": random.standard_normal(7).astype(np.float16),
        "scalar": np.full((), 3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "number": np.arange(5),
    }
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    found = read_safetensors(path)
    assert set(found) == set(arrays)
    data = path.read_bytes()
    for name, array in arrays.items():
        tensor = found[name]
        assert tensor.shape == array.shape
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == array.tobytes()
    assert [found[n].dtype for n in ("double", "single", "half", "number")] == ["F64", "F32", "F16", "I64"]


def test_bfloat16(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "llama", dtype=torch.bfloat16)
    artifact = open_artifact(tmp_path)
    for name, parameter in model.state_dict().items():
        tensor = artifact.tensors[name]
        assert tensor.dtype == "BF16"
        expected = parameter.view(torch.int16).numpy().view(np.uint8).reshape(tensor.n_rows, -1)
        assert np.array_equal(tensor.raw(), expected)


def test_shards_are_those_of_the_index(sharded: Path) -> None:
    tensors, unlisted, files = read_sharded(sharded)
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert {name: tensor.file.name for name, tensor in tensors.items()} == weight_map
    assert len(set(weight_map.values())) > 3
    assert unlisted == ()
    assert files == (sharded / INDEX, *sorted(sharded.glob("*.safetensors")))
    for name, tensor in tensors.items():
        with safe_open(tensor.file, framework="numpy") as file:
            stored = file.get_tensor(name)
        assert open_artifact(sharded).tensors[name].raw().tobytes() == stored.tobytes()


# --- Damaged indexes.


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "a\\b.safetensors",
        "c:x.safetensors",
        ".hidden.safetensors",
        "nul\0.safetensors",
        "..",
        "",
        "x.bin",
        7,
        None,
        ["model.safetensors"],
        {"a": 1},
    ],
)
def test_shard_that_is_not_a_plain_name(copy: Path, shard: Any) -> None:
    edit_index(copy, lambda weights: weights.update({"model.norm.weight": shard}))
    with pytest.raises(InputError, match=r"expected a \.safetensors file name without a path"):
        open_artifact(copy)


def test_missing_shard(copy: Path) -> None:
    shard = min(copy.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}: cannot be opened"):
        open_artifact(copy)


def test_tensor_that_is_not_in_its_shard(copy: Path) -> None:
    shard = max(copy.glob("*.safetensors")).name
    edit_index(copy, lambda weights: weights.update({"lm_head.bias": shard}))
    with pytest.raises(InputError, match=rf"lm_head\.bias is not in {shard}"):
        open_artifact(copy)


def test_tensor_that_the_index_does_not_know(copy: Path) -> None:
    edit_index(copy, lambda weights: weights.pop("model.norm.weight"))
    assert open_artifact(copy).unmapped == ("model.norm.weight",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "weight_map is missing or empty"),
        ('{"weight_map": {}}', "weight_map is missing or empty"),
        ('{"weight_map": []}', "weight_map is missing or empty"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the key 'a' is there twice"),
        ('{"weight_map": ' + "[" * 100000, "not valid JSON"),
        ('{"weight_map": \ud800}', "not valid JSON"),
    ],
)
def test_unusable_index(copy: Path, text: str, message: str) -> None:
    (copy / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=message):
        open_artifact(copy)


# --- Damaged files.


def file_of(header: Any, data: bytes = bytes(32), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def item(begin: int, end: int, dtype: str = "F32", shape: Any = (8,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes; expected a safetensors file"),
    "header length": (file_of({}, length=2**63), f"a header of {2**63} bytes"),
    "header cut": (file_of({"a": item(0, 32)})[:40], "a header of"),
    "not JSON": (file_of(b"{" * 20), "not valid JSON"),
    "deep JSON": (file_of(b'{"a":' * 50000), "not valid JSON"),
    "not an object": (file_of([]), "expected a JSON object"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "not valid JSON"),
    "repeated": (file_of(b'{"a":{},"a":{}}'), "the key 'a' is there twice"),
    "entry": (file_of({"a": 3}), "tensor a is 3; expected an object"),
    "dtype": (file_of({"a": item(0, 32, dtype=None)}), "tensor a has the dtype None"),  # type: ignore[arg-type]
    "unknown dtype": (
        file_of({"a": item(0, 32, dtype="Q9")}),
        "tensor a has the unknown dtype Q9; known are F64",
    ),
    "shape": (file_of({"a": item(0, 32, shape="8")}), "tensor a has the shape 8; expected a list"),
    "negative shape": (file_of({"a": item(0, 32, shape=[-8])}), "tensor a has the shape [-8]"),
    "bool shape": (file_of({"a": item(0, 4, shape=[True])}), "tensor a has the shape [True]"),
    "huge shape": (file_of({"a": item(0, 32, shape=[2**32, 2**32])}), "takes 73786976294838206464"),
    "offsets": (file_of({"a": {"dtype": "F32", "shape": [8]}}), "tensor a has the data_offsets None"),
    "one offset": (file_of({"a": item(0, 32) | {"data_offsets": [32]}}), "data_offsets [32]"),
    "backwards": (file_of({"a": item(32, 0)}), "data_offsets [32, 0]; expected a range"),
    "beyond": (file_of({"a": item(0, 36, shape=[9])}), "but the file has"),
    "wrong size": (file_of({"a": item(0, 32, shape=[7])}), "tensor a has 32 bytes; F32 [7] takes 28"),
    "gap": (file_of({"a": item(4, 32, shape=[7])}), ""),
    "overlap": (file_of({"a": item(0, 32), "b": item(16, 32, shape=[4])}), ""),
    "rest": (file_of({"a": item(0, 28, shape=[7])}), ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, message = BROKEN[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(SafetensorError), safe_open(path, framework="numpy"):
        pass


def opens(path: Path) -> bool:
    start = time.perf_counter()
    refused = False
    try:
        for tensor in read_safetensors(path).values():
            assert tensor.offset + tensor.nbytes <= path.stat().st_size
    except InputError:
        refused = True
    assert time.perf_counter() - start < 5
    return not refused


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    random = np.random.Generator(np.random.Philox(3))
    safetensors.numpy.save_file({f"t{i}": random.random((i + 1, 3)) for i in range(6)}, path)
    data = path.read_bytes()
    assert opens(path)
    for cut in range(0, len(data), 5):
        path.write_bytes(data[:cut])
        assert not opens(path), cut


@pytest.mark.parametrize("seed", range(3))
def test_mutated_header_is_refused_at_least_where_the_library_refuses_it(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "mutated.safetensors"
    random = np.random.Generator(np.random.Philox(seed))
    safetensors.numpy.save_file({f"t{i}": random.random((i + 1, 3)) for i in range(4)}, path)
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    outcomes = []
    for _ in range(150):
        data = bytearray(good)
        place = int(random.integers(end))
        data[place] = int(random.integers(256)) if random.random() < 0.5 else ord("0") + place % 10
        path.write_bytes(data)
        library_opens = True
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError:
            library_opens = False
        ours = opens(path)
        assert library_opens or not ours
        outcomes.append(ours)
    assert any(outcomes)
    assert not all(outcomes)


BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def test_the_dtypes_are_those_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"a": item(0, 32, dtype="none such")}))
    with pytest.raises(SafetensorError) as caught, safe_open(path, framework="numpy"):
        pass
    assert set(re.findall("`([A-Z0-9_]+)`", str(caught.value))) == set(BITS)


@pytest.mark.parametrize("dtype", BITS)
def test_sizes_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    nbytes = 8 * BITS[dtype] // 8
    path.write_bytes(file_of({"a": item(0, nbytes, dtype)}, bytes(nbytes)))
    assert read_safetensors(path)["a"].nbytes == nbytes
    with safe_open(path, framework="numpy"):
        pass
    for shape in ([7], [9], [2**61, 2**61, 2**10], [8, 0], [2**63 - 1]):
        path.write_bytes(file_of({"a": item(0, nbytes, dtype, shape)}, bytes(nbytes)))
        with pytest.raises(InputError, match=rf"tensor a has {nbytes} bytes; {dtype} .* takes"):
            read_safetensors(path)


RANGES: dict[str, tuple[dict[str, Any], str]] = {
    "begin beyond": ({"a": item(2**62, 2**62 + 32)}, "tensor a ends at byte"),
    "end of 2^63": ({"a": item(0, 2**63)}, "data_offsets"),
    "end of 2^64": ({"a": item(0, 2**64)}, "data_offsets"),
    "dim of 2^63": ({"a": item(0, 32, shape=[2**63])}, "tensor a has the shape"),
    "float offset": ({"a": item(0, 32.0)}, "data_offsets"),  # type: ignore[arg-type]
    "same range twice": ({"a": item(0, 32), "b": item(0, 32)}, "tensor b starts at byte"),
    "overlap": ({"a": item(0, 20, shape=[5]), "b": item(16, 32, shape=[4])}, "tensor b starts at byte"),
    "gap": ({"a": item(0, 12, shape=[3]), "b": item(16, 32, shape=[4])}, "tensor b starts at byte"),
    "many dimensions": ({"a": item(0, 4, shape=[1] * 65)}, "tensor a has 65 dimensions"),
    "empty in between": (
        {"a": item(0, 32), "b": item(5, 5, shape=[0])},
        "tensor b starts at byte|starts at byte",
    ),
}


@pytest.mark.parametrize("case", RANGES)
def test_ranges_that_cannot_be(tmp_path: Path, case: str) -> None:
    header, message = RANGES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(header))
    with pytest.raises(InputError, match=message) as caught:
        read_safetensors(path)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_the_library_s_own_message_is_not_needed_for_a_bad_range(tmp_path: Path) -> None:
    """Tensors that are out of place are named by us, also where the library would stop first."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"a": item(0, 32), "b": item(16, 32, shape=[4])}))
    with pytest.raises(InputError, match="tensor b"):
        read_safetensors(path)
