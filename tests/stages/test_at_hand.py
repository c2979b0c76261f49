"""Whether a case has the published model: by its shape and by its name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driftscope.falsifiers.reader import FolderReader
from driftscope.stages.at_hand import at_hand, manifests_of

SHAPE = {
    "architecture": "qwen2",
    "hidden_size": 3584,
    "num_layers": 28,
    "num_heads": 28,
    "num_kv_heads": 4,
    "intermediate_size": 18944,
}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A results folder with two manifests; what the models are is taken from the fixture's dictionary."""
    (tmp_path / "models").mkdir()
    about: dict[str, Any] = {"folder": tmp_path, "shape": dict(SHAPE), "metadata": {}}
    for role in ("teacher", "candidate"):
        _source(tmp_path, role, f"hf:Qwen/Qwen2.5-Coder-7B-Instruct/{role}")
        (tmp_path / f"models/{role}.json.provenance.json").write_text("{}")

    def model(reader: FolderReader, name: str) -> Any:
        return SimpleNamespace(config=SimpleNamespace(**about["shape"]), metadata=about["metadata"])

    monkeypatch.setattr(FolderReader, "model", model)
    return about


def _source(folder: Path, role: str, source: str) -> None:
    (folder / f"models/{role}.json").write_text(json.dumps({"model": role, "source": source}))


def test_the_published_model_is_known_by_shape_and_name(case: dict[str, Any]) -> None:
    assert at_hand(case["folder"]) == {"model-7b"}


def test_another_model_of_the_same_shape_is_not_it(case: dict[str, Any]) -> None:
    for role in ("teacher", "candidate"):
        _source(case["folder"], role, "hf:Qwen/Qwen2.5-7B-Instruct/*")
    assert at_hand(case["folder"]) == set()
    case["metadata"]["general.name"] = "Qwen2.5 Coder 7B Instruct"
    assert at_hand(case["folder"]) == {"model-7b"}


@pytest.mark.parametrize("key", sorted(SHAPE))
def test_another_shape_is_not_it(case: dict[str, Any], key: str) -> None:
    case["shape"][key] = 1
    assert at_hand(case["folder"]) == set()


def test_a_folder_without_models_has_nothing(tmp_path: Path) -> None:
    assert at_hand(tmp_path) == set()
    assert manifests_of(tmp_path) == []


def test_provenance_is_no_manifest(case: dict[str, Any]) -> None:
    assert [file.name for file in manifests_of(case["folder"])] == ["candidate.json", "teacher.json"]
