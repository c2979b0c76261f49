"""Each switch of the list of ops alone, on a llama, against transformers' llama with the same done to it.

The models of the other architectures turn several switches at once; here one is on and all others are off.
What is turned of a head, and by which frequencies, llama cannot be made to do otherwise: for that there are
models of their own (``phi3-partial``) and `tests.forward.test_rotary`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.forward.models import write_model
from tests.forward.test_against_transformers import nmse, random_batch
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.engines import transformers as engine
from driftscope.forward.architecture import taps
from driftscope.forward.evaluate import DeclaredOps
from driftscope.forward.exact import ExactOps
from driftscope.forward.generate import CachedPass
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL, Policy
from driftscope.forward.taps import Collector

EPS, WINDOW = 1e-5, 9
LENGTHS = (1, 60, 24)
BATCH = random_batch(LENGTHS, 320, seed=3)

Change = Callable[[Any], None]
"""What is done to transformers' model."""


def gelu(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN["gelu_pytorch_tanh"]


def offset(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += 1.0


def post_norms(model: Any) -> None:
    """The norms behind the blocks; their weights are those of `with_post_norms`."""
    layers = model.model.layers
    for index, layer in enumerate(layers):
        other = layers[(index + 1) % len(layers)]
        behind, last = other.input_layernorm.weight, other.post_attention_layernorm.weight

        def attended(_: Any, __: Any, out: Any, weight: Any = behind) -> Any:
            return functional.rms_norm(out[0], weight.shape, weight, EPS), *out[1:]

        def moved(_: Any, __: Any, out: Any, weight: Any = last) -> Any:
            return functional.rms_norm(out, weight.shape, weight, EPS)

        layer.self_attn.register_forward_hook(attended)
        layer.mlp.register_forward_hook(moved)


def with_post_norms(artifact: Artifact) -> Artifact:
    tensors = dict(artifact.tensors)
    for layer in range(artifact.config.num_layers):
        here = f"model.layers.{layer}."
        other = f"model.layers.{(layer + 1) % artifact.config.num_layers}."
        of = artifact.tensors
        tensors[f"{here}pre_feedforward_layernorm.weight"] = of[f"{here}post_attention_layernorm.weight"]
        tensors[f"{here}post_attention_layernorm.weight"] = of[f"{other}input_layernorm.weight"]
        tensors[f"{here}post_feedforward_layernorm.weight"] = of[f"{other}post_attention_layernorm.weight"]
    return dataclasses.replace(artifact, tensors=tensors)


def embedding_scale(model: Any) -> None:
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: out * 3.25)


def attention_scale(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.4


def attention_softcap(model: Any) -> None:
    def capped(*args: Any, **options: Any) -> Any:
        return modeling_gemma2.eager_attention_forward(*args, **{**options, "softcap": 1.5})

    ALL_ATTENTION_FUNCTIONS.register("driftscope_test_capped", capped)
    model.config._attn_implementation = "driftscope_test_capped"
    _with_mask(model, None)


def logit_softcap(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _, __, out: 2.5 * torch.tanh(out / 2.5))


def _with_mask(model: Any, window: int | None, layers: tuple[int, ...] = (0, 1, 2)) -> None:
    """Give layers a causal mask of ours."""

    def masked(_: Any, args: Any, options: dict[str, Any]) -> Any:
        distance = torch.arange(args[0].shape[1])[:, None] - torch.arange(args[0].shape[1])[None, :]
        seen = (distance >= 0) & (distance < (window or 10**6))
        options["attention_mask"] = torch.where(seen, 0.0, -torch.inf)[None, None]
        return args, options

    for layer in layers:
        model.model.layers[layer].register_forward_pre_hook(masked, with_kwargs=True)


def window(model: Any) -> None:
    _with_mask(model, WINDOW)


def window_in_some_layers(model: Any) -> None:
    _with_mask(model, WINDOW, (0, 2))


def local_theta(model: Any) -> None:
    """A window and a theta of its own in layers 0 and 2."""
    _with_mask(model, WINDOW, (0, 2))
    frequencies = 1.0 / 50.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)

    def turned(_: Any, args: Any, options: dict[str, Any]) -> Any:
        angles = torch.arange(args[0].shape[1], dtype=torch.float32)[:, None] * frequencies.repeat(2)
        options["position_embeddings"] = (angles.cos()[None], angles.sin()[None])
        return args, options

    for layer in (0, 2):
        model.model.layers[layer].register_forward_pre_hook(turned, with_kwargs=True)


SWITCHES: dict[str, tuple[dict[str, Any], Change]] = {
    "activation": ({"activation": "gelu_tanh"}, gelu),
    "norm_offset": ({"norm_offset": 1.0}, offset),
    "post_norms": ({"post_norms": True}, post_norms),
    "embedding_scale": ({"embedding_scale": 3.25}, embedding_scale),
    "attention_scale": ({"attention_scale": 0.4}, attention_scale),
    "attention_softcap": ({"attention_softcap": 1.5}, attention_softcap),
    "logit_softcap": ({"logit_softcap": 2.5}, logit_softcap),
    "sliding_window": ({"sliding_window": WINDOW}, window),
    "sliding_layers": ({"sliding_window": WINDOW, "sliding_layers": (0, 2)}, window_in_some_layers),
    "local_rope_theta": (
        {"sliding_window": WINDOW, "sliding_layers": (0, 2), "local_rope_theta": 50.0},
        local_theta,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama") / "model", "llama", tie_word_embeddings=False)


def switched(folder: Path, changes: dict[str, Any]) -> Artifact:
    artifact = open_artifact(folder)
    if "post_norms" in changes:
        artifact = with_post_norms(artifact)
    return dataclasses.replace(artifact, config=dataclasses.replace(artifact.config, **changes))


def logits_of(artifact: Artifact, collector: Collector | None = None) -> np.ndarray:
    return ForwardPass({"model": artifact}, Policy.uniform("model")).run(BATCH, collector)


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_one_switch_is_transformers(name: str, folder: Path) -> None:
    changes, change = SWITCHES[name]
    found, plain = logits_of(switched(folder, changes)), logits_of(open_artifact(folder))
    model = engine.load(folder)
    change(model)
    for index, tokens in enumerate(BATCH.slices):
        ids = torch.tensor(BATCH.ids[tokens].astype(np.int64))[None]
        with torch.inference_mode():
            expected = model(ids, use_cache=False).logits[0].numpy()
        assert nmse(found[tokens], expected, axis=1).max() <= 1e-9
        assert np.array_equal(found[tokens].argmax(axis=1), expected.argmax(axis=1))
        if index:
            # Without the switch it would have been seen.
            assert nmse(plain[tokens], expected, axis=1).max() > 1e-3


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_one_switch_op_by_op(name: str, folder: Path) -> None:
    """Each op from what the pass recorded: the same bits in float32, and near them in float64."""
    artifact = switched(folder, SWITCHES[name][0])
    collector = Collector()
    logits_of(artifact, collector)
    declared = DeclaredOps(ForwardPass({"model": artifact}, Policy.uniform("model")))
    exact = ExactOps(artifact)
    stream = ""

    def recorded(layer: int, tap: str) -> Any:
        where = stream if tap == "layer_input" else tap if layer == WHOLE_MODEL else f"layers.{layer}.{tap}"
        if where in collector.arrays:
            return collector.arrays[where]
        return [collector.arrays[f"{where}[{i}]"] for i in range(len(LENGTHS))]

    for tap in taps(artifact.config):
        inputs = {name: recorded(tap.layer, name) for name in tap.op.inputs}
        kept = recorded(tap.layer, tap.op.tap)
        sides = [side.evaluate(tap.layer, tap.op.tap, inputs, BATCH) for side in (declared, exact)]
        triples = zip(kept, *sides, strict=True) if isinstance(kept, list) else [(kept, *sides)]
        for array, same, near in triples:
            assert np.array_equal(array, same), tap.name
            assert near.dtype == np.float64
            assert nmse(array, near) <= 1e-12, tap.name
        if tap.op.tap in ("embedding", "post_ffn_residual"):
            stream = tap.name


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_one_switch_with_a_cache(name: str, folder: Path) -> None:
    artifact = switched(folder, SWITCHES[name][0])
    expected = logits_of(artifact)
    model = CachedPass({"model": artifact}, Policy.uniform("model"), sequences=1, capacity=60)
    ids = BATCH.ids[BATCH.slices[1]].tolist()
    for begin, end in ((0, 5), (5, 6), (6, 40), (40, 60)):
        assert np.array_equal(model.feed({0: ids[begin:end]})[0], expected[1:61][end - 1])
