from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.report import helpers

from driftscope.errors import InputError
from driftscope.report.build import build_report
from driftscope.report.write import read_report, write_report


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    report = build_report(helpers.synthetic_evidence(layers=1))
    write_report(report, tmp_path / "r.json")
    assert read_report(tmp_path / "r.json") == json.loads(json.dumps(report))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_spoilt_report_leaves_earlier_files_alone(tmp_path: Path) -> None:
    report = build_report(helpers.synthetic_evidence(layers=1))
    write_report(report, tmp_path / "r.json", tmp_path / "r.html")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError):
        write_report({**report, "gates": []}, tmp_path / "r.json", tmp_path / "r.html")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_reading_a_foreign_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"name": "x"}')
    with pytest.raises(InputError, match="breaks the report's schema"):
        read_report(tmp_path / "r.json")
    with pytest.raises(InputError, match="is missing"):
        read_report(tmp_path / "absent.json")
