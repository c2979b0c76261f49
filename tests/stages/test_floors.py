from __future__ import annotations

from pathlib import Path

import pytest

from driftscope.analysis import calibration
from driftscope.analysis.calibration import calibrate
from driftscope.stages import floors as stage

RUNS = 4


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A cache of the test's own, a short calibration, and a note for each that is made."""
    made: list[int] = []

    def few(*, progress: object) -> object:
        made.append(RUNS)
        return calibrate(RUNS)

    monkeypatch.setattr(calibration, "calibrate", few)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


def test_floors_are_calibrated_once(calls: list[int]) -> None:
    first, second = stage.kept_floors(), stage.kept_floors()
    assert calls == [RUNS]
    assert first.to_dict() == second.to_dict() == calibrate(RUNS).to_dict()


def test_other_code_calibrates_anew(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stage.kept_floors()
    monkeypatch.setattr(stage, "code_digest", lambda _: "0123456789abcdef")
    stage.kept_floors()
    assert len(calls) == 2


def test_a_damaged_cache_is_made_anew(calls: list[int], tmp_path: Path) -> None:
    stage.kept_floors()
    (file,) = (tmp_path / "cache").rglob("*.json")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    stage.kept_floors()
    assert len(calls) == 2
    assert file.read_bytes() == whole


def test_without_a_place_to_keep_them(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert stage.kept_floors().to_dict() == calibrate(RUNS).to_dict()
    assert calls == [RUNS]
