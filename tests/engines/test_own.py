from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.forward.models import write_model

from driftscope.artifacts.open import open_artifact
from driftscope.config import PATHS
from driftscope.engines import own
from driftscope.errors import InputError
from driftscope.forward.architecture import taps
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.taps import Collector


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


PROMPTS = [("short", [3]), ("long", [5, 9, 200, 7, 7, 41])]


@pytest.mark.parametrize("path", ["f32", "int8-dot"])
def test_a_trace_holds_what_the_pass_taps(path: str, tmp_path: Path) -> None:
    artifact = open_artifact(write_model(tmp_path / "model", "qwen2"))
    arithmetic = Arithmetic.of(path, activation="f16" if path == "f32" else None, kv_type="f16")
    done: list[tuple[int, int]] = []
    trace = own.trace(artifact, PROMPTS, tmp_path / "trace", arithmetic, progress=lambda *at: done.append(at))
    collector = Collector()
    ForwardPass({"model": artifact}, arithmetic.policy).run(trace.batch, collector)
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert trace.manifest.arithmetic == arithmetic
    assert trace.places == {(tap.layer, tap.op.tap) for tap in taps(artifact.config)}
    for tap in taps(artifact.config):
        if tap.op.ragged:
            for index, rows in enumerate(trace.ragged(tap.layer, tap.op.tap)):
                assert np.array_equal(rows, collector.arrays[f"{tap.name}[{index}]"])
        else:
            assert np.array_equal(trace.tap(tap.layer, tap.op.tap), collector.arrays[tap.name])


def test_a_trace_of_some_taps(tmp_path: Path) -> None:
    artifact = open_artifact(write_model(tmp_path / "model", "llama"))
    trace = own.trace(
        artifact, PROMPTS, tmp_path / "trace", Arithmetic.of(), wanted=lambda layer, tap: tap == "ffn_out"
    )
    assert trace.places == {(layer, "ffn_out") for layer in range(3)}


def test_a_dtype_that_our_kernels_do_not_have_is_refused(tmp_path: Path) -> None:
    artifact = open_artifact(write_model(tmp_path / "model", "llama"))
    with pytest.raises(InputError, match="'bf16' is not implemented"):
        own.trace(artifact, PROMPTS, tmp_path / "trace", Arithmetic.of(dtype="bf16"))
