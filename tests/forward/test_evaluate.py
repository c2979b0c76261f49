"""Each op alone, from the inputs that a pass recorded, gives the bits that the pass recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.forward.models import AS_GGUF, write_model

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.open import open_artifact
from driftscope.forward.architecture import taps
from driftscope.forward.batch import TokenBatch
from driftscope.forward.evaluate import DeclaredOps, Value, evaluate
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL, Choice, Policy
from driftscope.forward.taps import Collector

BATCH = TokenBatch.of([[5, 9, 200, 7, 7, 41, 300, 2, 11, 90], [3], [17, 4, 250], [*range(100, 136)]])


def recorded(collector: Collector, layer: int, tap: str) -> Value:
    prefix = tap if layer == WHOLE_MODEL else f"layers.{layer}.{tap}"
    if tap in ("attn_scores", "attn_softmax"):
        return [collector.arrays[f"{prefix}[{i}]"] for i in range(BATCH.n_sequences)]
    return collector.arrays[prefix]


@pytest.mark.parametrize("path", ["f32", "int8-dot"])
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "qwen2", "qwen3", "mistral-window", "llama-yarn"),
        *("gemma2", "gemma3", "gemma3-capped", "phi3", "phi3-longrope"),
    ],
)
def test_every_op_gives_the_bits_of_the_pass(name: str, kv_type: str, path: str, tmp_path: Path) -> None:
    teacher = open_artifact(write_model(tmp_path / "teacher", name, **AS_GGUF.get(name, {})))
    write_candidate(teacher, tmp_path / "model.gguf", scheme="Q8_0")
    model = ForwardPass(
        {"model": open_artifact(tmp_path / "model.gguf")}, Policy(Choice("model", path), kv_type=kv_type)
    )
    collector = Collector()
    model.run(BATCH, collector)
    evaluator = DeclaredOps(model)
    last = model.config.num_layers - 1
    for tap in taps(model.config):
        inputs = {
            name: recorded(collector, tap.layer, name)
            for name in tap.op.inputs
            if name != "layer_input" and not (tap.layer == WHOLE_MODEL and name == "layer_input")
        }
        if tap.layer == 0 and "layer_input" in tap.op.inputs:
            inputs["layer_input"] = collector.arrays["embedding"]
        elif "layer_input" in tap.op.inputs:
            before = last if tap.layer == WHOLE_MODEL else tap.layer - 1
            inputs["layer_input"] = collector.arrays[f"layers.{before}.post_ffn_residual"]
        found = evaluator.evaluate(tap.layer, tap.op.tap, inputs, BATCH)
        expected = recorded(collector, tap.layer, tap.op.tap)
        if isinstance(expected, list):
            assert isinstance(found, list)
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), tap.name
        else:
            assert np.array_equal(found, expected), tap.name


def test_attention_without_its_softmax(tmp_path: Path) -> None:
    artifact = open_artifact(write_model(tmp_path, "qwen2"))
    model = ForwardPass({"model": artifact}, Policy.uniform("model"))
    collector = Collector()
    model.run(BATCH, collector)
    names = ("q_post_rope", "k_post_rope", "qkv_bias")
    inputs: dict[str, Value] = {name: collector.arrays[f"layers.1.{name}"] for name in names}
    found = evaluate(model, 1, "attention", inputs, BATCH)
    assert np.array_equal(found, collector.arrays["layers.1.attention"])


def test_an_op_that_is_none(tmp_path: Path) -> None:
    model = ForwardPass({"model": open_artifact(write_model(tmp_path, "qwen2"))}, Policy.uniform("model"))
    with pytest.raises(ValueError, match="'ffn'"):
        evaluate(model, 0, "ffn", {}, BATCH)
