"""Opening models of every container."""

from __future__ import annotations

from pathlib import Path

import pytest

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.open import open_artifact


@pytest.mark.model
def test_default_model(default_gguf: Path) -> None:
    artifact = open_artifact(default_gguf)
    check_complete(artifact)
    assert artifact.container == "gguf"
    assert artifact.config.architecture == "llama"
    assert len(artifact.tensors) == 272
    assert artifact.unmapped == ()
