"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from driftscope.errors import InputError
from driftscope.evidence.atomic import replacing, write_text


def test_the_file_is_there_after_the_block_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
        assert partial.parent == path.parent
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_in_the_block_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "earlier")

    def fail_half_way() -> None:
        with replacing(path) as partial:
            partial.write_text("half of it")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder: cannot be written: ") as caught:
        write_text(tmp_path / "folder", "text")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("place", ["below/a/file", "below"])
def test_a_file_where_a_folder_must_be_is_bad_input(tmp_path: Path, place: str) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a").write_text("a file")
    with pytest.raises(InputError):
        write_text(tmp_path / place, "text")
