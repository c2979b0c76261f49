"""Conversions that nothing is wrong with have only the relations that their containers declare."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.analysis.planted import judge
from tests.forward.models import write_model

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact

# Rows of 256 values and more, so that the K-quants take them; phi3 fuses, gemma adds, llama interleaves.
MODELS = {
    "llama": {"rows-interleaved"},
    "qwen3": set(),
    "gemma2": {"offset+1"},
    "gemma3": {"offset+1"},
    "phi3": set(),
}
_SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32}


@pytest.fixture(scope="module", params=MODELS)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Artifact]:
    folder = tmp_path_factory.mktemp(request.param)
    more = _GEMMA if request.param.startswith("gemma") else {}
    return request.param, open_artifact(write_model(folder, request.param, **_SHAPE, **more))


@pytest.mark.parametrize("scheme", ["F32", "BF16", "Q8_0", "Q4_K_M"])
def test_a_gguf_copy_has_only_expected_relations(
    teacher: tuple[str, Artifact], scheme: str, tmp_path: Path
) -> None:
    name, a = teacher
    write_candidate(a, tmp_path / "copy.gguf", scheme=scheme)
    b = open_artifact(tmp_path / "copy.gguf")
    found = judge(a, b)
    assert found["at_fault"] == []
    assert found["holds"], found["conclusion"]
    assert found["searched"] == {"tensors": 0, "alternatives": 0}
    relations = set(found["relations"].values())
    undone = {f"equal-under:{label}" for label in MODELS[name]}
    if scheme == "F32":
        assert relations == {"identical", *undone} - ({"identical"} if relations == undone else set())
    else:
        matrices = "downcast" if scheme == "BF16" else "quantized-from"
        assert matrices in relations <= {matrices, "identical", *undone}
    assert found["metadata_matters"] == []
    # The other way round, and against itself: the same transforms, or none.
    if scheme == "F32":
        assert judge(b, a)["relations"] == found["relations"]
        assert set(judge(b, b)["relations"].values()) == {"identical"}


def test_a_teacher_written_anew_is_identical(teacher: tuple[str, Artifact], tmp_path: Path) -> None:
    _, a = teacher
    write_teacher(a, tmp_path / "teacher")
    found = judge(a, open_artifact(tmp_path / "teacher"))
    assert found["conclusion"] == "identical"
    assert found["at_fault"] == []
