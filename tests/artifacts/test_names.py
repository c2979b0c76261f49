"""Tensor names, against the gguf package's tables."""

from __future__ import annotations

import gguf
import pytest

from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.model import ModelConfig
from driftscope.artifacts.names import (
    GGUF_ARCHITECTURES,
    ROPE_FREQS,
    canonical_order,
    from_gguf,
    is_canonical,
    layer_of,
    to_gguf,
)

NUMBERS = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}


def config_of(architecture: str) -> ModelConfig:
    return ModelConfig(
        architecture=architecture,
        hidden_size=64,
        num_layers=12,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=50,
        context_length=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
    )


@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(architecture: str) -> None:
    config = config_of(architecture)
    table = gguf.get_tensor_name_map(NUMBERS[GGUF_ARCHITECTURES[architecture]], config.num_layers)
    for name in expected_shapes(config):
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert to_gguf(name) == stored
        assert from_gguf(str(stored)) == name
        assert is_canonical(name)


@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_expected_tensors_are_in_canonical_order(architecture: str) -> None:
    names = list(expected_shapes(config_of(architecture)))
    assert sorted(names, key=canonical_order) == names
    assert max(layer for name in names if (layer := layer_of(name)) is not None) == 11


def test_rope_factors_keep_their_name() -> None:
    assert from_gguf(ROPE_FREQS) == to_gguf(ROPE_FREQS) == ROPE_FREQS
    assert canonical_order(ROPE_FREQS) > canonical_order("lm_head.weight")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.layers.0",
        "model.layers.0.",
        "model.layers.00.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.1e1.mlp.up_proj.weight",
        "model.layers.٣.mlp.up_proj.weight",
        "model.layers.99999999999.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight\n",
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "blk.0.ffn_up.weight",
        "xmodel.norm.weight",
    ],
)
def test_names_that_are_not_canonical(name: str) -> None:
    assert not is_canonical(name)
    assert to_gguf(name) is None
    assert layer_of(name) is None or "model.layers.0." in name


@pytest.mark.parametrize(
    "name", ["", "blk.0", "blk.00.ffn_up.weight", "blk.0.ffn_up.bias", "model.norm.weight", "output.bias"]
)
def test_gguf_names_without_a_canonical_one(name: str) -> None:
    assert from_gguf(name) is None
