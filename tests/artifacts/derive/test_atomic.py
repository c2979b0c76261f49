from __future__ import annotations

import errno
from pathlib import Path

import pytest

from driftscope.artifacts.derive.atomic import atomic_file, atomic_folder
from driftscope.errors import InputError


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.bin"
    for text in ("one", "two"):
        with atomic_file(path) as partial:
            partial.write_text(text)
    assert path.read_text() == "two"
    assert _names(path.parent) == ["a.bin"]


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("old", "new"):
        with atomic_folder(path) as partial:
            (partial / name).write_text(name)
    assert _names(path) == ["new"]
    assert _names(tmp_path) == ["model"]


@pytest.mark.parametrize("manager", [atomic_file, atomic_folder])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_failing_disk_leaves_what_was_there(tmp_path: Path, manager: type, number: int) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "kept").touch()

    def fail() -> None:
        with manager(path) as partial:
            if manager is atomic_folder:
                (partial / "half").write_text("half")
            else:
                partial.write_text("half")
            raise OSError(number, "failed")

    with pytest.raises(InputError, match="no space left" if number == errno.ENOSPC else "cannot be written"):
        fail()
    assert _names(path) == ["kept"]
    assert _names(tmp_path) == ["model"]


@pytest.mark.parametrize("manager", [atomic_file, atomic_folder])
def test_another_failure_leaves_what_was_there(tmp_path: Path, manager: type) -> None:
    with pytest.raises(KeyError), manager(tmp_path / "model"):
        raise KeyError
    assert _names(tmp_path) == []
