"""``driftscope convert``, and the other commands on an .apr file."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tests.helpers.tiny_models import save_tiny_model

from driftscope import cli


def _run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the program, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["driftscope", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three containers, and its layers in AprQ4."""
    folder = tmp_path_factory.mktemp("converted")
    save_tiny_model(folder / "hf", "qwen2", dtype=torch.bfloat16, hidden_size=256, head_dim=64)
    for arguments, says in (
        (("hf", "m.apr"), "apr, 27 tensors"),
        (("m.apr", "m.gguf"), "gguf, 27 tensors"),
        (("m.gguf", "back"), "safetensors, 27 tensors"),
        (("hf", "q4.apr", "--quantize", "AprQ4"), "apr, 27 tensors"),
        (("m.apr", "other", "--to", "gguf"), "gguf, 27 tensors"),
    ):
        source, destination, *options = arguments
        code, out, err = _run("convert", folder / source, folder / destination, *options)
        assert (code, out, err) == (0, f"{folder / destination}: {says}\n", "")
    assert (folder / "other").read_bytes() == (folder / "m.gguf").read_bytes()
    return folder


@pytest.mark.parametrize(
    ("a", "b"), [("hf", "m.apr"), ("m.apr", "m.gguf"), ("m.gguf", "back"), ("m.apr", "m.apr")]
)
def test_diff_says_identical(folder: Path, a: str, b: str) -> None:
    code, out, err = _run("diff", folder / a, folder / b, "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["summary"]["conclusion"] == "identical"


def test_diff_of_quantized_matrices(folder: Path) -> None:
    """The error of AprQ4 is what its steps predict."""
    code, out, _ = _run("diff", folder / "hf", folder / "q4.apr", "--json")
    summary = json.loads(out)["summary"]
    assert code == 0
    assert summary["relation_counts"]["quantized-from"] == 14
    assert set(summary["relation_counts"]) == {"quantized-from", "identical"}


def test_inspect(folder: Path) -> None:
    code, out, _ = _run("inspect", folder / "q4.apr", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["container"] == "apr"
    assert "AprQ4" in out
    code, out, _ = _run("inspect", folder / "q4.apr")
    assert code == 0
    assert "AprQ4" in out


def test_trace(folder: Path, tmp_path: Path) -> None:
    code, _, err = _run(
        "trace", folder / "m.apr", "--ids", "5,9,20", "--out", tmp_path / "trace", "--path", "int8-dot"
    )
    assert (code, err) == (0, "")
    assert (tmp_path / "trace").is_dir()


def test_what_would_be_lost_is_one_line(folder: Path, tmp_path: Path) -> None:
    code, out, err = _run("convert", folder / "q4.apr", tmp_path / "new")
    assert (code, out) == (2, "")
    assert err.endswith(
        "is AprQ4, which a safetensors file cannot hold; --dequantize writes such tensors as F32\n"
    )
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_one_line(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "m.apr").read_bytes())
    data[-100_000] ^= 1
    (tmp_path / "m.apr").write_bytes(data)
    for command in ("inspect", "diff"):
        code, out, err = _run(command, tmp_path / "m.apr", *((folder / "hf",) if command == "diff" else ()))
        assert (code, out) == (2, "")
        assert "m.apr: the checksum of the file is" in err
        assert err.count("\n") == 1


def test_diff_of_matrices_that_are_read_as_f32(folder: Path, tmp_path: Path) -> None:
    """Rows that are no whole blocks have their steps too, of the whole tensor."""
    save_tiny_model(tmp_path / "hf", "llama")
    assert _run("convert", tmp_path / "hf", tmp_path / "q8.apr", "--quantize", "AprQ8")[0] == 0
    code, out, _ = _run("diff", tmp_path / "hf", tmp_path / "q8.apr", "--json")
    assert code == 0
    assert json.loads(out)["summary"]["relation_counts"] == {"identical": 7, "quantized-from": 14}
