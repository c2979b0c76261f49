"""Replays of each architecture on engines that others wrote: no op is far beyond its predicted noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.forward.models import write_model

from driftscope.analysis.replay import Replayer
from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.open import open_artifact
from driftscope.engines import llama_cpp, own, transformers
from driftscope.engines.trace import Trace
from driftscope.forward.architecture import taps
from driftscope.forward.arithmetic import Arithmetic

_GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "final_logit_softcapping": 30.0}
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 20.0},
    "gemma3": {**_GEMMA, "num_attention_heads": 4},
    # llama.cpp ignores phi3's window.
    "phi3-partial": {"num_attention_heads": 4, "num_key_value_heads": 2},
}
_RANDOM = np.random.Generator(np.random.Philox(3))
PROMPTS = [(f"p{n}", [int(i) for i in _RANDOM.integers(3, 320, size=n)]) for n in (2, 9, 48)]


@pytest.fixture(scope="module", params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    wide = {"hidden_size": 256, "intermediate_size": 512, **MODELS[request.param]}
    return write_model(tmp_path_factory.mktemp("model") / "teacher", request.param, **wide)


def check(trace: Trace, path: Path, reference: Path, absent: set[str]) -> None:
    """All taps are there and their parts within some fifty times their predicted noise, in every way."""
    replayer = Replayer(trace, open_artifact(path), reference=open_artifact(reference))
    found = {(layer, tap) for layer, tap, _ in replayer.places()}
    expected = {(tap.layer, tap.op.tap) for tap in taps(replayer.config) if tap.op.tap not in absent}
    assert found == expected
    for row in replayer.rows():
        scores = [row[name] for name in ("score", "score_token", "score_channel") if row[name] is not None]
        assert max(scores, default=0.0) < 2.3, row
        assert row["score"] is None or row["score"] < 1.2, row
        assert row["non_finite"] == 0


def test_our_own_engine(folder: Path, tmp_path: Path) -> None:
    trace = own.trace(open_artifact(folder), PROMPTS, tmp_path, Arithmetic.of())
    replayer = Replayer(trace, open_artifact(folder), components=("engine",))
    assert all(row["energy"] == 0 for row in replayer.rows())


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_transformers(folder: Path, dtype: str, tmp_path: Path) -> None:
    options = transformers.TransformersOptions(dtype=dtype)
    check(transformers.trace(folder, PROMPTS, tmp_path, options), folder, folder, set())


@pytest.mark.parametrize("scheme", ["F32", "Q4_K_M"])
def test_llama_cpp(folder: Path, scheme: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_candidate(open_artifact(folder), file, scheme=scheme)
    absent = {"ffn_silu"}
    if open_artifact(file).config.architecture == "phi3":
        absent.add("post_attn_residual")
    check(llama_cpp.trace(file, PROMPTS, tmp_path / "trace"), file, folder, absent)
