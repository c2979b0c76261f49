"""Evidence is validated, carries its header, appears whole or not at all, and repeats byte for byte."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from driftscope.errors import InputError
from driftscope.evidence.header import EvidenceHeader
from driftscope.evidence.schemas import COLUMNS, SCHEMAS, frame_of
from driftscope.evidence.store import read_json, read_table, read_table_header, write_json, write_table

HEADER = EvidenceHeader.of("decompose", {"b": "22", "a": "11"}, {"seed": 1})


def energy_rows(n: int = 4) -> list[dict[str, Any]]:
    """Rows of the smallest table."""
    place = {"by": "layer", "item": "0", "mechanism": "weight", "sequence": "tide"}
    return [{**place, "position": position, "energy": 0.5 * position} for position in range(n)]


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    frame = frame_of(energy_rows(), "energies")
    write_table(frame, tmp_path / "e.parquet", "energies", HEADER)
    assert read_table(tmp_path / "e.parquet", "energies").equals(frame)
    assert read_table_header(tmp_path / "e.parquet") == HEADER.as_dict()


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(frame_of(energy_rows(), "energies"), tmp_path / name, "energies", HEADER)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_times_and_hosts_are_kept_beside(tmp_path: Path) -> None:
    write_json({"x": 1}, tmp_path / "d.json", HEADER)
    assert set(read_json(tmp_path / "d.json")) == {"x", "evidence"}
    assert {"host", "finished_unix_seconds"} <= set(read_json(tmp_path / "d.json.provenance.json"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"by": "tensor"}, "by"),
        ({"mechanism": "noise"}, "mechanism"),
        ({"position": -1}, "position"),
        ({"energy": -0.25}, "energy"),
        ({"position": 1}, "unique"),
    ],
)
def test_a_value_that_the_schema_does_not_allow_is_refused(
    tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    path = tmp_path / "e.parquet"
    write_table(frame_of(energy_rows(), "energies"), path, "energies", HEADER)
    before = path.read_bytes()
    rows = energy_rows()
    rows[2] |= change
    with pytest.raises(InputError, match=word):
        write_table(frame_of(rows, "energies"), path, "energies", HEADER)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.parquet", "e.parquet.provenance.json"]


def test_a_missing_an_extra_and_a_reordered_column_are_refused(tmp_path: Path) -> None:
    frame = frame_of(energy_rows(), "energies")
    others = [frame.drop("item"), frame.with_columns(unit=pl.lit("nats")), frame.select(frame.columns[::-1])]
    for other in others:
        with pytest.raises(InputError, match="schema"):
            write_table(other, tmp_path / "e.parquet", "energies", HEADER)
    assert not list(tmp_path.iterdir())


def test_nothing_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows"):
        write_table(frame_of([], "energies"), tmp_path / "e.parquet", "energies", HEADER)


def test_a_table_is_validated_when_it_is_read(tmp_path: Path) -> None:
    frame_of(energy_rows(), "energies").drop("energy").write_parquet(tmp_path / "e.parquet")
    with pytest.raises(InputError, match="energy"):
        read_table(tmp_path / "e.parquet", "energies")
    with pytest.raises(InputError, match="no evidence header"):
        read_table_header(tmp_path / "e.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a table at all", b"PAR1" + bytes(64) + b"PAR1"])
def test_what_is_not_a_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "e.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"e\.parquet"):
        read_table(tmp_path / "e.parquet", "energies")


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    write_table(frame_of(energy_rows(), "energies"), path, "energies", HEADER)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="not a readable"):
        read_table(path, "energies")


def test_what_is_missing_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        read_table(tmp_path / "e.parquet", "energies")
    with pytest.raises(InputError, match="missing"):
        read_json(tmp_path / "d.json")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\ud800".encode("utf-8", "surrogatepass"), "null"])
def test_what_is_not_a_document_is_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"d\.json"):
        read_json(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_number_is_named_and_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(InputError, match=r"\$\.figures\[1\]\.kl"):
        write_json({"figures": [{"kl": 1.0}, {"kl": value}]}, tmp_path / "d.json", HEADER)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_earlier_files(tmp_path: Path) -> None:
    table, document = tmp_path / "e.parquet", tmp_path / "d.json"
    write_table(frame_of(energy_rows(), "energies"), table, "energies", HEADER)
    write_json({"x": 1}, document, HEADER)
    before = table.read_bytes(), document.read_bytes()
    with full_disk(), pytest.raises(InputError, match=r"e\.parquet: cannot be written"):
        write_table(frame_of(energy_rows(9), "energies"), table, "energies", HEADER)
    with full_disk(), pytest.raises(InputError, match=r"d\.json: cannot be written"):
        write_json({"x": 2}, document, HEADER)
    assert (table.read_bytes(), document.read_bytes()) == before
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]


def test_documents_are_plain_utf8_json_in_the_order_given(tmp_path: Path) -> None:
    write_json({"b": "naïve", "a": 0.1}, tmp_path / "d.json", HEADER)
    text = (tmp_path / "d.json").read_text(encoding="utf-8")
    assert "naïve" in text
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["b", "a", "evidence"]


def test_every_schema_builds_its_frames() -> None:
    assert set(SCHEMAS) == set(COLUMNS)
    for name, columns in COLUMNS.items():
        assert frame_of([], name).columns == list(columns)
