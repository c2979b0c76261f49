from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tests.forward.models import write_model

from driftscope.engines import transformers as engine
from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch


def test_a_sequence_gives_the_same_logits_alone_and_in_a_batch(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    together = engine.logits(folder, TokenBatch.of([[1, 2, 3], [4, 5]]))
    assert together.dtype == np.float32
    assert np.array_equal(together[3:], engine.logits(folder, TokenBatch.of([[4, 5]])))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="transformers cannot load the model"):
        engine.logits(tmp_path, TokenBatch.of([[1]]))


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install 'driftscope\[transformers\]'"):
        engine.version()


def test_the_version_names_both_packages() -> None:
    assert set(engine.version()) == {"transformers", "torch"}
