"""Writing a copy where a file cannot grow: the earlier copy stays, and nothing half-written does."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.helpers.tiny_models import save_tiny_model

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """The system refuses to write beyond `size` bytes of a file; Python sees an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _bytes(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("write", [write_teacher, write_candidate])
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_file_that_cannot_grow(tmp_path: Path, write: Callable[[Artifact, Path], None], size: int) -> None:
    save_tiny_model(tmp_path / "source", "llama", vocab_size=2048)
    source = open_artifact(tmp_path / "source")
    target = tmp_path / "copy"
    write(source, target)
    before = _bytes(target)
    with _largest_file(size), pytest.raises(InputError, match="copy: cannot be written"):
        write(source, target)
    assert _bytes(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "source"]
