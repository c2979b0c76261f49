"""Parts and report of the fault benchmark on disk, and its commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from driftscope.cli.faultbench import faultbench
from driftscope.errors import InputError
from driftscope.stages.faultbench import join, part


def run(folder: Path, index: int) -> Path:
    out = folder / f"part_{index}.json"
    part(None, None, None, index, 2, out, models="tiny", faults=("F14", "F07"))
    return out


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    return [run(folder, index) for index in (0, 1)]


def test_a_part_repeats_to_the_byte(parts: list[Path], tmp_path: Path) -> None:
    assert run(tmp_path, 0).read_bytes() == parts[0].read_bytes()


def test_parts_join_to_a_report(parts: list[Path], tmp_path: Path) -> None:
    out, page = tmp_path / "report.json", tmp_path / "report.md"

    assert not join(parts, out, page)  # no clean pair was run

    document = json.loads(out.read_text())
    assert document["evidence"]["stage"] == "faultbench"
    assert {row["fault"] for row in document["rows"]} == {"F07", "F14"}
    assert document["misses"] == []
    assert page.read_text().startswith("# Fault benchmark")


def test_the_gate_is_an_exit_code(parts: list[Path], tmp_path: Path) -> None:
    arguments = [
        "join",
        *map(str, parts),
        "--out",
        str(tmp_path / "r.json"),
        "--page",
        str(tmp_path / "r.md"),
    ]

    assert CliRunner().invoke(faultbench, arguments).exit_code == 0
    assert CliRunner().invoke(faultbench, [*arguments, "--gate"]).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": "huge"}, "models 'huge' is unknown"),
        ({"models": "tiny", "faults": ("F99",)}, "fault 'F99' is unknown"),
        ({"models": "all"}, "no --teacher is given"),
    ],
)
def test_bad_choices_are_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        part(None, None, None, 0, 1, tmp_path / "x.json", **arguments)  # type: ignore[arg-type]


def test_what_is_no_part_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("{}")

    with pytest.raises(InputError, match="faults is missing"):
        join([file], tmp_path / "r.json", tmp_path / "r.md")
    with pytest.raises(InputError, match="no part"):
        join([], tmp_path / "r.json", tmp_path / "r.md")
