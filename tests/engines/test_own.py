from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.forward.models import write_model

from driftscope.artifacts.open import open_artifact
from driftscope.config import PATHS
from driftscope.engines import own
from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch


def test_the_paths_are_those_of_the_configuration() -> None:
    assert tuple(own.PATHS) == PATHS


def test_a_path_is_its_role_and_its_arithmetic() -> None:
    for path in own.PATHS:
        base = own.policy_of(path).base
        assert f"{base.artifact}.{base.path}" == path


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(InputError, match=r"'teacher.f16' is unknown; expected one of teacher.f32"):
        own.policy_of("teacher.f16")


def test_float32_weights_have_no_activation_format(tmp_path: Path) -> None:
    """Float32 weights are multiplied in float32 by ggml too: the two paths of such a model are one."""
    artifact = open_artifact(write_model(tmp_path, "qwen2"))
    batch = TokenBatch.of([[1, 2, 3]])
    runs = [
        own.forward_pass({"candidate": artifact}, path).run(batch)
        for path in ("candidate.f32", "candidate.int8-dot")
    ]
    assert np.array_equal(*runs)
