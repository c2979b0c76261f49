"""Faults in engines that are not ours: files edited on disk, modules patched."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from driftscope.analysis.floors import Floors
from driftscope.artifacts.open import open_artifact
from driftscope.faultbench import elsewhere
from driftscope.faultbench.edited import values_of
from driftscope.faultbench.elsewhere import Elsewhere
from driftscope.faultbench.gguf_files import FAULTS, edited
from driftscope.faultbench.subjects import Workbench
from driftscope.faultbench.weights import tensor

RIGHT = ("detected", "layer_right", "op_right", "class_right")


def of(name: str) -> object:
    return next(fault for fault in FAULTS if f"{fault.fault}/{fault.name}" == name)


@pytest.mark.parametrize(
    ("name", "key", "factor"),
    [("F11/eps-times-ten", "rms_norm_eps", 10.0), ("F16/theta-times-ten", "rope_theta", 10.0)],
)
def test_metadata_is_changed_on_disk(
    bench: Workbench, tmp_path: Path, name: str, key: str, factor: float
) -> None:
    fault = of(name)
    source = bench.file(fault.model, fault.scheme)  # type: ignore[attr-defined]
    target = edited(source, tmp_path / "edited.gguf", fault, 1)  # type: ignore[arg-type]
    before, after = (getattr(open_artifact(path).config, key) for path in (source, target))

    assert after == pytest.approx(factor * before, rel=1e-6)
    assert source.stat().st_size == target.stat().st_size


def test_an_edit_touches_its_tensors_alone(bench: Workbench, tmp_path: Path) -> None:
    for fault in FAULTS:
        source = bench.file(fault.model, fault.scheme)
        target = edited(source, tmp_path / "edited.gguf", fault, 1)
        a, b = (
            {item.name: np.array(item.data) for item in gguf.GGUFReader(path).tensors}
            for path in (source, target)
        )
        changed = {name for name in a if not np.array_equal(a[name], b[name])}
        count = {"F01": 2, "F05": 9, "F08": 2, "F11": 0, "F16": 0, "F33": 2}.get(fault.fault, 1)
        assert len(changed) == count, (fault.fault, changed)


def test_rows_are_in_hugging_face_s_order_on_disk(bench: Workbench, tmp_path: Path) -> None:
    fault = of("F01/rows-of-q-and-k")
    source = bench.file("llama", "F32")
    target = edited(source, tmp_path / "edited.gguf", fault, 1)  # type: ignore[arg-type]
    stored = {item.name: np.array(item.data) for item in gguf.GGUFReader(target).tensors}

    expected = values_of(open_artifact(source), tensor(1, "q"))
    np.testing.assert_array_equal(stored["blk.1.attn_q.weight"].reshape(expected.shape), expected)


def test_an_engine_that_is_not_installed_is_said_to_be_missing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "missing_module", lambda engine: "llama_cpp")
    rows = list(Elsewhere(bench, Floors({})).llama_cpp())

    assert {row["status"] for row in rows} == {"not-run"}
    assert "driftscope[llama-cpp]" in rows[0]["reason"]


@pytest.mark.slow
def test_faults_of_files_are_found_through_llama_cpp(bench: Workbench) -> None:
    rows = list(Elsewhere(bench, Floors({})).llama_cpp())

    assert len(rows) == len(FAULTS)
    for row in rows:
        # Without calibration an epsilon that is ten times too large stays within what theory allows.
        if row["fault"] != "F11":
            assert all(row[key] for key in RIGHT), row


@pytest.mark.slow
def test_patches_of_torch_modules_are_found(bench: Workbench) -> None:
    rows = [
        row for row in Elsewhere(bench, Floors({})).transformers("qwen2-square") if row["status"] == "run"
    ]

    assert len(rows) >= 13
    for row in rows:
        if row["fault"] != "F11":
            assert all(row[key] for key in RIGHT), row
