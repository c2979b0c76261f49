from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.forward.models import write_model

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.open import open_artifact
from driftscope.engines import llama_cpp as engine
from driftscope.engines.llama_cpp_session import LlamaCppOptions, Session, load_api
from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    teacher = open_artifact(write_model(folder / "teacher", "qwen2"))
    write_candidate(teacher, folder / "model.gguf", scheme="F32")
    return folder / "model.gguf"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"kv_type": "q4_0"}, "kv_type 'q4_0' is unknown; expected one of f32, f16, bf16, q8_0"),
        ({"kv_type": "q8_0"}, "kv_type q8_0 needs flash_attention"),
        ({"threads": 0}, "0 threads; expected at least 1"),
        ({"batch_size": -1}, "batch_size -1; expected 0 or more tokens"),
    ],
)
def test_options_that_cannot_be(values: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=found):
        LlamaCppOptions(**values)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8])
def test_batches_cover_a_sequence_and_give_its_logits(model: Path, size: int) -> None:
    ids = TokenBatch.of([[5, 1, 4, 2, 3, 300, 7]])
    options = LlamaCppOptions(kv_type="f32", batch_size=size)
    with Session(load_api(), model, 7, options) as session:
        spans = list(session.batches(7))
    assert [begin for begin, _ in spans] == list(range(0, 7, size or 7))
    assert [end for _, end in spans] == [*range(size or 7, 7, size or 7), 7]
    whole = engine.logits(model, ids, LlamaCppOptions(kv_type="f32"))
    found = engine.logits(model, ids, options)
    assert np.square(found - whole).sum() / np.square(whole).sum() <= 1e-11


def test_a_sequence_begins_with_an_empty_cache(model: Path) -> None:
    ids = np.array([3, 4, 5, 6], dtype=np.int32)
    with Session(load_api(), model, 4, LlamaCppOptions(batch_size=2)) as session:
        found = []
        for _ in range(2):
            for begin, end in session.batches(4):
                session.decode(ids, begin, end)
            found.append(session.logits(2).copy())
    assert np.array_equal(*found)


def test_what_llama_cpp_says_is_part_of_the_error(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with (
        pytest.raises(InputError, match=r"model\.gguf: llama\.cpp cannot load the file: .*version"),
        Session(load_api(), tmp_path / "model.gguf", 1, LlamaCppOptions()),
    ):
        pass
