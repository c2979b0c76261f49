"""What measurements read: evidence by name, models by their role in the configured pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from driftscope.errors import InputError
from driftscope.falsifiers.reader import FolderReader, manifest_of

PAIR = {"teacher": "original", "candidate": "candidate"}


def test_a_role_is_the_model_that_has_it() -> None:
    assert manifest_of("models/teacher.json", PAIR) == "models/original.json"
    assert manifest_of("models/candidate.json", PAIR) == "models/candidate.json"
    assert manifest_of("models/original.json", PAIR) == "models/original.json"
    assert manifest_of("sweep.parquet", PAIR) == "sweep.parquet"


def test_the_folder_knows_its_pair(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/original.json").write_text(json.dumps({"model": "original"}))
    reader = FolderReader(tmp_path)
    assert not reader.has("models/teacher.json")
    (tmp_path / "config.json").write_text(json.dumps({"pair": PAIR}))
    assert reader.has("models/teacher.json")
    assert reader.document("models/teacher.json") == {"model": "original"}
    assert not reader.has("models/candidate.json")


def test_a_missing_manifest_is_one_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="teacher"):
        FolderReader(tmp_path).model("models/teacher.json")
