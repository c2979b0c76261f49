from __future__ import annotations

import os
from pathlib import Path

import pytest

from driftscope.artifacts.sources import fetch, parse_source, resolve
from driftscope.errors import InputError


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/a.gguf").write_bytes(b"weights")
    source = parse_source("file:models/a.gguf", tmp_path)
    entry = resolve(source)
    fetched = fetch(source, tmp_path / "out", entry)
    assert fetched.path == tmp_path / "out/a.gguf"
    assert fetched.path.read_bytes() == b"weights"
    assert fetched.path.resolve() == (tmp_path / "models/a.gguf").resolve()


def test_a_relative_base_is_linked_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.gguf").write_bytes(b"weights")
    source = parse_source("file:a.gguf", Path())
    assert fetch(source, Path("deep/out"), resolve(source)).path.read_bytes() == b"weights"


def test_a_folder_without_its_hidden_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    for name in ("config.json", "model.safetensors", "sub/tokenizer.json", ".git/config", "sub/.cache"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    source = parse_source("file:model", tmp_path)
    entry = resolve(source)
    assert [file.name for file in entry.files] == ["config.json", "model.safetensors", "sub/tokenizer.json"]
    fetched = fetch(source, tmp_path / "out", entry)
    assert fetched.path == tmp_path / "out"
    assert [path.read_text() for path in fetched.paths] == [file.name for file in entry.files]


def test_a_change_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"weights")
    source = parse_source("file:a.gguf", tmp_path)
    entry = resolve(source)
    fetch(source, tmp_path / "out", entry)
    (tmp_path / "a.gguf").write_bytes(b"changed")
    with pytest.raises(InputError, match=r"checksum mismatch.*driftscope lock"):
        fetch(source, tmp_path / "out", entry)
    assert (tmp_path / "a.gguf").read_bytes() == b"changed"


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        resolve(parse_source("file:a.gguf", tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        resolve(parse_source("file:empty", tmp_path))


def test_gone_since_it_was_locked(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"weights")
    source = parse_source("file:a.gguf", tmp_path)
    entry = resolve(source)
    (tmp_path / "a.gguf").unlink()
    with pytest.raises(InputError, match="no file"):
        fetch(source, tmp_path / "out", entry)


def test_no_links_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links on this file system")

    monkeypatch.setattr(os, "symlink", refuse)
    (tmp_path / "a.gguf").write_bytes(b"weights")
    source = parse_source("file:a.gguf", tmp_path)
    fetched = fetch(source, tmp_path / "out", resolve(source))
    assert not fetched.path.is_symlink()
    assert fetched.path.read_bytes() == b"weights"
