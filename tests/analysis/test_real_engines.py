"""Floors that were calibrated without any engine, on engines that others wrote: nothing is flagged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.helpers.tiny_models import ARCHITECTURES, save_tiny_model

from driftscope.analysis.first_divergence import flags
from driftscope.analysis.floors import Floors
from driftscope.analysis.replay import Replayer
from driftscope.artifacts.open import open_artifact
from driftscope.engines import llama_cpp, transformers
from driftscope.engines.trace import Trace

pytestmark = pytest.mark.slow

LAYERS = (-1, 0, 1, 17, 29)


def prompts(vocabulary: int) -> list[tuple[str, list[int]]]:
    random = np.random.Generator(np.random.Philox(3))
    return [(f"p{n}", [int(i) for i in random.integers(3, vocabulary, size=n)]) for n in (2, 9, 48)]


def flagged(trace: Trace, path: Path, floors: Floors, layers: tuple[int, ...] | None = None) -> list[str]:
    replayer = Replayer(trace, open_artifact(path), components=("engine",))
    rows = replayer.rows(layers)
    assert rows
    return [str(flag) for flag in flags(rows, floors, arithmetic=replayer.arithmetic)]


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [(name, "eager") for name in ARCHITECTURES]
    # Torch's fused attention cannot cap, and transformers refuses it.
    + [(name, "sdpa") for name in ARCHITECTURES if name != "gemma2"],
)
def test_transformers_is_clean(
    tmp_path: Path, floors: Floors, architecture: str, dtype: str, attention: str
) -> None:
    save_tiny_model(tmp_path / "model", architecture, seed=5)
    options = transformers.TransformersOptions(dtype=dtype, attention=attention)
    trace = transformers.trace(tmp_path / "model", prompts(96), tmp_path / "trace", options)
    assert flagged(trace, tmp_path / "model", floors) == []


@pytest.mark.model
@pytest.mark.parametrize(
    "options",
    [
        llama_cpp.LlamaCppOptions(),
        llama_cpp.LlamaCppOptions(flash_attention=True),
        llama_cpp.LlamaCppOptions(kv_type="f32", repack=False),
    ],
    ids=["default", "flash", "plain"],
)
def test_llama_cpp_is_clean(
    tmp_path: Path, floors: Floors, default_gguf: Path, options: llama_cpp.LlamaCppOptions
) -> None:
    trace = llama_cpp.trace(
        default_gguf,
        prompts(40000),
        tmp_path / "trace",
        options,
        taps=lambda layer, tap: layer in LAYERS or tap == "post_ffn_residual",
    )
    assert flagged(trace, default_gguf, floors, LAYERS) == []
