"""Written .apr files: the container against a parser of its own, the values against the source's."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers import apr_bytes
from tests.helpers.tiny_models import save_tiny_model

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.derive.apr_file import StoredTensor, write_apr, write_apr_file
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def _parse(
    path: Path,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, tuple[int, tuple[int, ...], bytes]]]:
    """Header fields, metadata and tensors of a file, by the description of the format alone."""
    data = path.read_bytes()
    magic, major, minor, flags, count = struct.unpack_from("<4sBBHI", data)
    at_metadata, metadata_size, at_index, at_data, checksum = struct.unpack_from("<QIQQI", data, 12)
    assert (magic, major, minor) == (b"APR\0", 2, 0)
    assert checksum == zlib.crc32(data[:40] + data[44:64])
    assert data[44:64] == bytes(20)
    assert int.from_bytes(data[-4:], "little") == zlib.crc32(data[:-4])
    assert at_metadata == 64
    assert at_index == 64 + -(-metadata_size // 64) * 64
    assert at_data % 64 == 0
    assert (len(data) - 4 - at_data) % 64 == 0
    metadata = json.loads(data[64 : 64 + metadata_size])
    tensors = {}
    position = at_index
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, position)
        name = data[position + 2 : position + 2 + length].decode()
        position += 2 + length
        code, n_dims = data[position : position + 2]
        dims = struct.unpack_from(f"<{n_dims}Q", data, position + 2)
        offset, size = struct.unpack_from("<QQ", data, position + 2 + 8 * n_dims)
        position += 2 + 8 * n_dims + 16
        assert offset % 64 == 0
        tensors[name] = code, dims, data[at_data + offset : at_data + offset + size]
    assert -(-(position - at_index) // 64) * 64 == at_data - at_index
    assert list(tensors) == sorted(tensors, key=str.encode)
    return {"flags": flags}, metadata, tensors


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_and_hyperparameters(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    save_tiny_model(tmp_path / "source", architecture, dtype=dtype)
    source = open_artifact(tmp_path / "source")
    write_apr(source, tmp_path / "m.apr")
    header, metadata, tensors = _parse(tmp_path / "m.apr")
    assert header["flags"] == 1024
    assert metadata["architecture"] == architecture
    assert metadata["rope_type"] == 2
    for key in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "rope_theta"):
        assert metadata[key] == getattr(source.config, key)
    assert tensors.keys() == source.tensors.keys()
    for name, ref in source.tensors.items():
        code, dims, data = tensors[name]
        assert code == (0 if dtype == torch.float32 else 30)
        assert dims == ref.shape
        assert data == ref.raw().tobytes()
    back = open_artifact(tmp_path / "m.apr")
    check_complete(back)
    assert back.config == source.config


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "qwen2")
    for name in ("a", "b"):
        write_apr(open_artifact(tmp_path / "source"), tmp_path / f"{name}.apr", quantize="AprQ4")
    assert (tmp_path / "a.apr").read_bytes() == (tmp_path / "b.apr").read_bytes()


@pytest.mark.parametrize(("quantize", "pack"), [("AprQ4", apr_bytes.apr_q4), ("AprQ8", apr_bytes.apr_q8)])
def test_quantized_matrices(tmp_path: Path, quantize: str, pack: Any) -> None:
    model = save_tiny_model(tmp_path / "source", "llama", hidden_size=48, intermediate_size=40)
    write_apr(open_artifact(tmp_path / "source"), tmp_path / "m.apr", quantize=quantize)
    header, metadata, tensors = _parse(tmp_path / "m.apr")
    assert header["flags"] == 1024 | 32
    assert metadata["quantization"] == {"quant_type": quantize}
    for name, value in model.state_dict().items():
        is_matrix = ".layers." in name and value.ndim == 2
        expected = pack(value.numpy()) if is_matrix else apr_bytes.f32(value.numpy())
        assert tensors[name] == expected, name


def test_k_quants_keep_their_bytes_and_rows_their_order(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "llama", **WIDE)
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "m.gguf", scheme="Q4_K_M")
    candidate = open_artifact(tmp_path / "m.gguf")
    write_apr(candidate, tmp_path / "m.apr")
    header, metadata, tensors = _parse(tmp_path / "m.apr")
    assert header["flags"] == 1024 | 32
    assert metadata["rope_type"] == 0
    assert {code for code, _, _ in tensors.values()} == {0, 12, 14}
    for name, ref in candidate.tensors.items():
        assert tensors[name][2] == ref.raw().tobytes()
    back = open_artifact(tmp_path / "m.apr")
    assert back.config == candidate.config
    for name, ref in candidate.tensors.items():
        assert (back.tensors[name].dtype, back.tensors[name].rope_heads) == (ref.dtype, ref.rope_heads)


def test_q4_0_is_apr_q4_with_its_values_in_another_order(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "qwen3", **WIDE)
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "m.gguf", scheme="Q4_0")
    candidate = open_artifact(tmp_path / "m.gguf")
    write_apr(candidate, tmp_path / "m.apr", dequantize_rest=True)
    back = open_artifact(tmp_path / "m.apr")
    kinds = {ref.stored_dtype for ref in back.tensors.values()}
    assert kinds == {"AprQ4", "F32", "Q6_K"}
    for name, ref in candidate.tensors.items():
        assert np.array_equal(back.tensors[name].raw(), ref.raw())


@pytest.mark.parametrize("scheme", ["Q8_0", "Q5_K_M"])
def test_formats_that_it_lacks(tmp_path: Path, scheme: str) -> None:
    save_tiny_model(tmp_path / "source", "llama", **WIDE)
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "m.gguf", scheme=scheme)
    candidate = open_artifact(tmp_path / "m.gguf")
    (tmp_path / "m.apr").write_text("earlier")
    with pytest.raises(InputError, match=rf"m\.gguf: .* is {scheme[:4]}, which an \.apr file cannot hold; "):
        write_apr(candidate, tmp_path / "m.apr")
    assert (tmp_path / "m.apr").read_text() == "earlier"
    write_apr(candidate, tmp_path / "m.apr", dequantize_rest=True)
    assert {ref.dtype for ref in open_artifact(tmp_path / "m.apr").tensors.values()} <= {"F32", "Q6_K"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_cannot_be_quantized(tmp_path: Path, value: float) -> None:
    model = save_tiny_model(tmp_path / "source", "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] = value
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    for quantize in ("AprQ4", "AprQ8"):
        with pytest.raises(
            InputError, match=r"up_proj\.weight holds NaN or infinity, which cannot be quantized"
        ):
            write_apr(open_artifact(tmp_path / "source"), tmp_path / "m.apr", quantize=quantize)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    write_apr(open_artifact(tmp_path / "source"), tmp_path / "m.apr")


def test_a_scale_that_f16_cannot_hold(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "source", "llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    with pytest.raises(InputError, match="holds values beyond 458528, too large for AprQ4"):
        write_apr(open_artifact(tmp_path / "source"), tmp_path / "m.apr", quantize="AprQ4")


def test_an_unknown_format_to_quantize_to(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "llama")
    with pytest.raises(InputError, match="format 'Q4_K' is not one to quantize to; expected AprQ4 or AprQ8"):
        write_apr(open_artifact(tmp_path / "source"), tmp_path / "m.apr", quantize="Q4_K")


def test_limits_of_the_format(tmp_path: Path) -> None:
    def tensor(name: str) -> list[StoredTensor]:
        return [StoredTensor(name, "F32", (1,), lambda: [np.zeros(4, np.uint8)])]

    with pytest.raises(InputError, match=r"16777218 bytes of metadata; \.apr holds at most 16777216"):
        write_apr_file(tmp_path / "m.apr", {"a": "x" * (2**24 - 6)}, [])
    with pytest.raises(InputError, match="has more than 256 bytes"):
        write_apr_file(tmp_path / "m.apr", {}, tensor("é" * 129))
    write_apr_file(tmp_path / "m.apr", {}, tensor("é" * 128))
    assert list(_parse(tmp_path / "m.apr")[2]) == ["é" * 128]


def test_progress_ends_with_everything(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "llama")
    calls: list[tuple[int, int]] = []
    write_apr(
        open_artifact(tmp_path / "source"),
        tmp_path / "m.apr",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]
