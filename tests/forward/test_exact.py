"""The float64 ops against transformers in float64, and near the float32 pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.forward.models import AS_GGUF, write_model

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.model import ModelConfig
from driftscope.artifacts.open import open_artifact
from driftscope.forward.architecture import taps
from driftscope.forward.batch import TokenBatch
from driftscope.forward.exact import ExactOps
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL, Policy
from driftscope.forward.rotary import exact_frequencies, is_long, rope_frequencies, rope_scale
from driftscope.forward.taps import Collector

BATCH = TokenBatch.of([[5, 9, 200, 7, 7, 41, 300, 2, 11, 90, 12, 8, 77], [3], [17, 4, 250]])
NAMES = [
    *("llama", "llama-3-scaling", "llama-yarn", "llama-linear-scaling", "mistral-window", "qwen2", "qwen3"),
    *("qwen3-windows", "gemma2", "gemma3", "gemma3-capped", "phi3", "phi3-partial"),
]


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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str = "") -> Any:
        local = layer_type == "sliding_attention" and self.config.local_rope_theta is not None
        long = is_long(self.config, int(position_ids.max()) + 1)
        frequencies = torch.tensor(exact_frequencies(self.config, local=local, long=long))
        angles = position_ids[..., None].double() * torch.cat([frequencies] * 2)
        scale = rope_scale(self.config, local=local)
        return angles.cos() * scale, angles.sin() * scale


@pytest.mark.parametrize("name", [*NAMES, "phi3-longrope"])
def test_logits_are_those_of_transformers_in_float64(name: str, tmp_path: Path) -> None:
    artifact = open_artifact(write_model(tmp_path, name))
    eager = artifact.config.attention_softcap is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager" if eager else "sdpa"
    ).eval()
    model.model.rotary_emb = _ExactAngles(artifact.config)
    long = [*range(3, 45)] if name == "phi3-longrope" else [3]
    batch = TokenBatch.of([BATCH.ids[:13].tolist(), long, [17, 4, 250]])
    found = chain(ExactOps(artifact), batch)[WHOLE_MODEL, "lm_head"]
    for tokens in batch.slices:
        with torch.inference_mode():
            ids = torch.tensor(batch.ids[tokens].astype(np.int64))[None]
            expected = model(ids, use_cache=False).logits[0].numpy()
        error = np.square(found[tokens] - expected).sum() / np.square(expected).sum()
        # transformers computes norms in float32 whatever the dtype, and eager attention its softmax.
        assert error < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_every_tap_is_near_the_float32_pass(name: str, tmp_path: Path) -> None:
    teacher = open_artifact(write_model(tmp_path / "a", name, **AS_GGUF.get(name, {})))
    write_candidate(teacher, tmp_path / "b.gguf", scheme="Q8_0")
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


@pytest.mark.parametrize("name", [*NAMES, "phi3-longrope"])
@pytest.mark.parametrize("which", [{}, {"local": True}, {"long": True}])
def test_frequencies_without_roundings(name: str, which: dict[str, bool], tmp_path: Path) -> None:
    config = open_artifact(write_model(tmp_path, name)).config
    if "local" in which and config.local_rope_theta is None:
        config = dataclasses.replace(config, local_rope_theta=77.0)
    exact, rounded = exact_frequencies(config, **which), rope_frequencies(config, **which)
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
