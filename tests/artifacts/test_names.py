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
    gguf_layout,
    gguf_parts,
    hf_layout,
    hf_parts,
    is_canonical,
    is_of_images,
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
        qk_norm=architecture in ("qwen3", "gemma3_text"),
        post_norms=architecture.startswith("gemma"),
    )


def stored_names(architecture: str, n_layers: int) -> set[str]:
    """Every name that the gguf package lists for an architecture, with the endings that models have."""
    number = NUMBERS[architecture]
    names = set()
    for tensor in gguf.MODEL_TENSORS[number]:
        for layer in range(n_layers):
            stem = gguf.TENSOR_NAMES[tensor].format(bid=layer)
            names |= {f"{stem}.weight", f"{stem}.bias"}
    return names


@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(architecture: str) -> None:
    """Each tensor of a model, by the name that it has in Hugging Face's file."""
    config = config_of(architecture)
    in_gguf = GGUF_ARCHITECTURES[architecture]
    table = gguf.get_tensor_name_map(NUMBERS[in_gguf], config.num_layers)
    fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"} if architecture == "phi3" else {}
    seen = []
    for name in expected_shapes(config):
        assert is_canonical(name)
        key = next((key for key in fused if f".{key}." in name), None)
        file_name = name if key is None else name.replace(key, fused[key])
        stored = table.get_name(file_name, try_suffixes=(".weight", ".bias"))
        if architecture == "phi3" and any(f".{part}_proj." in name for part in ("k", "v", "up")):
            assert name in seen
            continue
        if (architecture, name) == ("gemma2", "lm_head.weight"):
            # llama.cpp ties it always; a file that has one is read all the same.
            stored = "output.weight"
        parts = gguf_parts(str(stored), in_gguf)
        assert parts[0] == name
        assert hf_parts(file_name) == parts
        assert (from_gguf(str(stored), in_gguf) == name) is (key is None)
        assert to_gguf(name, in_gguf) == stored or key is not None
        seen.extend(parts)
    assert sorted(seen) == sorted(expected_shapes(config))


# What the gguf package lists too: mixtures of experts, and biases and precomputed tables of other models.
NOT_HERE = ("_exps.", "ffn_gate_inp.", "attn_rot_embd.", ".bias")


@pytest.mark.parametrize("architecture", sorted(set(GGUF_ARCHITECTURES.values())))
def test_no_name_of_the_gguf_package_is_left_out(architecture: str) -> None:
    for stored in stored_names(architecture, 2):
        if not any(part in stored for part in NOT_HERE):
            assert gguf_parts(stored, architecture), stored


@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_expected_tensors_are_in_canonical_order(architecture: str) -> None:
    names = list(expected_shapes(config_of(architecture)))
    assert sorted(names, key=canonical_order) == names
    assert max(layer for name in names if (layer := layer_of(name)) is not None) == 11


def test_rope_factors_keep_their_name() -> None:
    assert from_gguf(ROPE_FREQS, "llama") == to_gguf(ROPE_FREQS, "llama") == ROPE_FREQS
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
    assert to_gguf(name, "llama") is None
    assert layer_of(name) is None or "model.layers.0." in name


@pytest.mark.parametrize(
    "name", ["", "blk.0", "blk.00.ffn_up.weight", "blk.0.ffn_up.bias", "model.norm.weight", "output.bias"]
)
def test_gguf_names_without_a_canonical_one(name: str) -> None:
    assert from_gguf(name, "llama") is None


def test_tensors_of_phi3_are_written_as_its_own_files_hold_them() -> None:
    names = list(expected_shapes(config_of("phi3")))
    in_gguf, in_hf = gguf_layout(names, "phi3"), hf_layout(names, "phi3")
    qkv = tuple(f"model.layers.3.self_attn.{site}_proj.weight" for site in "qkv")
    gate_up = ("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight")
    assert in_gguf["blk.3.attn_qkv.weight"] == in_hf["model.layers.3.self_attn.qkv_proj.weight"] == qkv
    assert in_gguf["blk.3.ffn_up.weight"] == in_hf["model.layers.3.mlp.gate_up_proj.weight"] == gate_up
    assert [name for parts in in_gguf.values() for name in parts] == names
    assert [name for parts in in_hf.values() for name in parts] == names


@pytest.mark.parametrize("architecture", [a for a in GGUF_ARCHITECTURES if a != "phi3"])
def test_tensors_of_the_others_stand_alone(architecture: str) -> None:
    names = list(expected_shapes(config_of(architecture)))
    stored = GGUF_ARCHITECTURES[architecture]
    assert gguf_layout(names, stored) == {to_gguf(name, stored): (name,) for name in names}
    assert hf_layout(names, architecture) == {name: (name,) for name in names}


def test_a_tensor_that_gguf_has_no_name_for_is_named() -> None:
    with pytest.raises(KeyError, match=r"pre_feedforward_layernorm"):
        gguf_layout(["model.layers.0.pre_feedforward_layernorm.weight"], "llama")


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.encoder.layers.0.mlp.fc1.bias",
        "model.multi_modal_projector.mm_input_projection_weight",
        "model.vision_tower.post_layernorm.weight",
    ],
)
def test_names_of_the_part_that_sees_images(name: str) -> None:
    assert is_of_images(name)
    assert hf_parts(name) == ()
    assert not is_of_images("model.norm.weight")
