"""The float64 ops against transformers in float64, and near the float32 pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.forward.models import write_model

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.open import open_artifact
from driftscope.forward.architecture import taps
from driftscope.forward.batch import TokenBatch
from driftscope.forward.exact import ExactOps
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL, Policy
from driftscope.forward.rotary import exact_frequencies, rope_frequencies, rope_scale
from driftscope.forward.taps import Collector

BATCH = TokenBatch.of([[5, 9, 200, 7, 7, 41, 300, 2, 11, 90, 12, 8, 77], [3], [17, 4, 250]])
NAMES = ["llama", "llama-3-scaling", "llama-yarn", "llama-linear-scaling", "mistral-window", "qwen2", "qwen3"]


def chain(ops: ExactOps, batch: TokenBatch) -> dict[tuple[int, str], Any]:
    """Every tap of a model, each op fed by the ones before."""
    found: dict[tuple[int, str], Any] = {}
    stream: Any = None
    for tap in taps(ops.config):
        inputs = {name: stream if name == "layer_input" else found[tap.layer, name] for name in tap.op.inputs}
        found[tap.layer, tap.op.tap] = ops.evaluate(tap.layer, tap.op.tap, inputs, batch)
        if tap.op.tap in ("embedding", "post_ffn_residual"):
            stream = found[tap.layer, tap.op.tap]
    return found


class _ExactAngles(torch.nn.Module):
    """Rotary angles in float64, which transformers forms in float32 whatever the model's dtype."""

    def __init__(self, frequencies: np.ndarray, scale: float) -> None:
        super().__init__()
        self.frequencies, self.scale = torch.tensor(frequencies), scale

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        angles = position_ids[..., None].double() * torch.cat([self.frequencies] * 2)
        return angles.cos() * self.scale, angles.sin() * self.scale


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_in_float64(name: str, tmp_path: Path) -> None:
    artifact = open_artifact(write_model(tmp_path, name))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="sdpa"
    ).eval()
    frequencies = exact_frequencies(artifact.config)
    model.model.rotary_emb = _ExactAngles(frequencies, rope_scale(artifact.config))
    found = chain(ExactOps(artifact), BATCH)[WHOLE_MODEL, "lm_head"]
    for tokens in BATCH.slices:
        with torch.inference_mode():
            ids = torch.tensor(BATCH.ids[tokens].astype(np.int64))[None]
            expected = model(ids, use_cache=False).logits[0].numpy()
        error = np.square(found[tokens] - expected).sum() / np.square(expected).sum()
        # transformers computes norms in float32 whatever the dtype.
        assert error < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_every_tap_is_near_the_float32_pass(name: str, tmp_path: Path) -> None:
    write_candidate(open_artifact(write_model(tmp_path / "a", name)), tmp_path / "b.gguf", scheme="Q8_0")
    artifact = open_artifact(tmp_path / "b.gguf")
    collector = Collector()
    ForwardPass({"model": artifact}, Policy.uniform("model")).run(BATCH, collector)
    found = chain(ExactOps(artifact, threads=2), BATCH)
    for tap in taps(artifact.config):
        value = found[tap.layer, tap.op.tap]
        parts = value if isinstance(value, list) else [value]
        names = [f"{tap.name}[{i}]" for i in range(3)] if isinstance(value, list) else [tap.name]
        for part, key in zip(parts, names, strict=True):
            assert part.dtype == np.float64
            assert np.allclose(part, collector.arrays[key], rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("name", NAMES)
def test_frequencies_without_roundings(name: str, tmp_path: Path) -> None:
    config = open_artifact(write_model(tmp_path, name)).config
    exact, rounded = exact_frequencies(config), rope_frequencies(config)
    assert exact.dtype == np.float64
    assert np.allclose(exact, rounded, rtol=1e-6, atol=0)
    assert not np.array_equal(exact, rounded)


def test_attention_from_its_weights_or_from_queries_and_keys(tmp_path: Path) -> None:
    ops = ExactOps(open_artifact(write_model(tmp_path, "mistral-window")))
    found = chain(ops, BATCH)
    names = ("q_post_rope", "k_post_rope", "qkv_bias")
    whole = ops.evaluate(1, "attention", {name: found[1, name] for name in names}, BATCH)
    assert np.array_equal(np.asarray(whole), found[1, "attention"])


def test_an_op_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'ffn'"):
        ExactOps(open_artifact(write_model(tmp_path, "qwen2"))).evaluate(0, "ffn", {}, BATCH)
