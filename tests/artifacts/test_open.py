"""Opening models of every container."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from tests.helpers.tiny_gguf import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    tiny_tensors,
    write_gguf,
)
from tests.helpers.tiny_models import ARCHITECTURES, canonical_state, save_tiny_model

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.names import from_gguf
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.transforms import applied
from driftscope.errors import InputError


@pytest.mark.model
def test_default_model(default_gguf: Path) -> None:
    artifact = open_artifact(default_gguf)
    check_complete(artifact)
    assert artifact.container == "gguf"
    assert artifact.files == (default_gguf,)
    assert artifact.config.architecture == "llama"
    assert artifact.config.tie_word_embeddings
    assert artifact.config.rms_norm_eps == 1e-5
    assert len(artifact.tensors) == 272
    assert artifact.unmapped == ()
    assert {t.rope_heads for n, t in artifact.tensors.items() if ".q_proj." in n} == {9}
    assert {t.rope_heads for n, t in artifact.tensors.items() if ".k_proj." in n} == {3}


def test_names_without_a_canonical_one_are_kept(tmp_path: Path) -> None:
    extra = {"blk.2.attn_norm.weight": np.ones(64, np.float32), "blk.0.other": np.ones(4, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny_tensors("llama") | extra)
    artifact = open_artifact(path)
    assert artifact.unmapped == ("blk.0.other", "blk.2.attn_norm.weight")
    check_complete(artifact)


def test_tensors_are_in_canonical_order(tmp_path: Path) -> None:
    tensors = dict(reversed(tiny_tensors("qwen2").items()))
    names = list(open_artifact(write_gguf(tmp_path / "m.gguf", "qwen2", tensors)).tensors)
    assert names[:3] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert sorted(names) == sorted(str(from_gguf(name, "qwen2")) for name in tensors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folder_of_transformers(tmp_path: Path, architecture: str) -> None:
    model = save_tiny_model(tmp_path, architecture)
    artifact = open_artifact(tmp_path)
    check_complete(artifact)
    assert artifact.container == "safetensors"
    assert artifact.path == tmp_path
    assert artifact.unmapped == ()
    assert list(artifact.files) == sorted(
        [*tmp_path.glob("*.safetensors"), tmp_path / "config.json", tmp_path / "model.safetensors.index.json"]
    )
    assert len(artifact.files) > 4
    expected = canonical_state(model)
    assert artifact.tensors.keys() == expected.keys()
    for name, tensor in artifact.tensors.items():
        assert applied(tensor) == (() if tensor.stored_name == name else ("split",))
        values = tensor.raw().view(np.float32).reshape(tensor.shape)
        assert np.array_equal(values, expected[name].numpy())


def test_one_file_with_its_configuration_beside_it(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", max_shard_size="1GB")
    alone = open_artifact(tmp_path / "model.safetensors")
    folder = open_artifact(tmp_path)
    assert alone.tensors == folder.tensors
    assert alone.config == folder.config
    assert alone.files == folder.files
    assert alone.path != folder.path


def test_folder_with_one_file_of_another_name(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", max_shard_size="1GB")
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    check_complete(open_artifact(tmp_path))
    shutil.copy(tmp_path / "weights.safetensors", tmp_path / "more.safetensors")
    with pytest.raises(InputError, match="2 safetensors files and no"):
        open_artifact(tmp_path)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no safetensors file; expected a model folder"):
        open_artifact(tmp_path)
    save_tiny_model(tmp_path, "llama")
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: cannot be opened"):
        open_artifact(tmp_path)


def test_dtype_that_is_not_a_float(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", max_shard_size="1GB")
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    with pytest.raises(InputError, match="is stored as I32; expected one of F64, F32, F16, BF16"):
        open_artifact(path)


def test_layer_that_the_configuration_does_not_have(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    artifact = open_artifact(tmp_path)
    assert len(artifact.unmapped) == 9
    assert all(name.startswith("model.layers.1.") for name in artifact.unmapped)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"model\.layers\.2\.input_layernorm\.weight is missing, and 8 more"):
        check_complete(open_artifact(tmp_path))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_parts_of_fused_tensors_are_their_rows(tmp_path: Path, architecture: str) -> None:
    tensors = tiny_tensors(architecture, fused=True)
    artifact = open_artifact(write_gguf(tmp_path / "m.gguf", architecture, tensors))
    check_complete(artifact)
    fused = tensors["blk.1.attn_qkv.weight"]
    ends = np.cumsum([0, HIDDEN, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM])
    for site, first, end in zip("qkv", ends[:-1], ends[1:], strict=True):
        tensor = artifact.tensors[f"model.layers.1.self_attn.{site}_proj.weight"]
        assert tensor.stored_name == "blk.1.attn_qkv.weight"
        assert tensor.stored_rows == (first, end)
        assert np.array_equal(tensor.raw().view("<f4"), fused[first:end])
        heads = {"q": HEADS, "k": KV_HEADS}.get(site, 0) if architecture == "llama" else 0
        assert tensor.rope_heads == heads
    if architecture == "qwen2":
        bias = artifact.tensors["model.layers.0.self_attn.k_proj.bias"]
        found = bias.raw().view("<f4").reshape(-1)
        assert np.array_equal(found, tensors["blk.0.attn_qkv.bias"][ends[1] : ends[2]])
    if architecture == "phi3":
        up = artifact.tensors["model.layers.0.mlp.up_proj.weight"]
        assert np.array_equal(up.raw().view("<f4"), tensors["blk.0.ffn_up.weight"][INNER:])


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "phi3"])
def test_a_folder_of_any_architecture_may_have_fused_matrices(tmp_path: Path, architecture: str) -> None:
    model = save_tiny_model(tmp_path / "apart", architecture)
    state = canonical_state(model)
    for layer in range(model.config.num_hidden_layers):
        for whole, sites in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            module = whole.split(".")[0]
            for kind in ("weight", "bias"):
                names = [f"model.layers.{layer}.{module}.{site}_proj.{kind}" for site in sites]
                if names[0] in state:
                    fused = torch.cat([state.pop(name) for name in names])
                    state[f"model.layers.{layer}.{whole}_proj.{kind}"] = fused
    (tmp_path / "fused").mkdir()
    shutil.copy(tmp_path / "apart" / "config.json", tmp_path / "fused")
    safetensors.torch.save_file(state, tmp_path / "fused" / "model.safetensors")
    apart, fused = open_artifact(tmp_path / "apart"), open_artifact(tmp_path / "fused")
    check_complete(fused)
    assert list(fused.tensors) == list(apart.tensors)
    for name, tensor in fused.tensors.items():
        assert np.array_equal(tensor.raw(), apart.tensors[name].raw()), name
        assert applied(tensor) == (() if tensor.stored_name == name else ("split",))


def test_parts_of_a_fused_tensor_of_blocks(tmp_path: Path) -> None:
    tensors = tiny_tensors("qwen3", fused=True)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "m.gguf", "qwen3", tensors, formats={"blk.0.attn_qkv.weight": kind})
    value = open_artifact(path).tensors["model.layers.0.self_attn.v_proj.weight"]
    whole = gguf.quants.quantize(tensors["blk.0.attn_qkv.weight"], kind)
    assert np.array_equal(value.raw(), whole[HIDDEN + KV_HEADS * HEAD_DIM :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"blk.0.attn_qkv.weight": np.ones((100, HIDDEN), np.float32)},
            r"attn_qkv\.weight has 100 rows; expected 128 \(64 \+ 32 \+ 32\)",
        ),
        (
            {"blk.0.attn_qkv.weight": np.ones(128, np.float32)},
            r"attn_qkv\.weight is F32 128, which cannot be cut into 64 \+ 32 \+ 32",
        ),
        (
            {"blk.0.attn_q.weight": np.ones((HIDDEN, HIDDEN), np.float32)},
            r"both blk\.0\.attn_qkv\.weight and blk\.0\.attn_q\.weight hold model\.layers\.0\.self_attn\.q",
        ),
    ],
)
def test_fused_tensors_that_are_not_their_parts(
    tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "qwen3", tiny_tensors("qwen3", fused=True) | changes)
    with pytest.raises(InputError, match=message):
        open_artifact(path)


def test_a_fused_bias_that_the_architecture_does_not_have(tmp_path: Path) -> None:
    bias = {"blk.0.attn_qkv.bias": np.ones(128, np.float32)}
    artifact = open_artifact(write_gguf(tmp_path / "m.gguf", "phi3", tiny_tensors("phi3") | bias))
    assert artifact.unmapped == ("blk.0.attn_qkv.bias",)
    with pytest.raises(InputError, match=r"attn_qkv\.bias is a bias that phi3 does not have"):
        check_complete(artifact)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_one_that_sees_images(tmp_path: Path, prefix: str) -> None:
    model = save_tiny_model(tmp_path / "text", "gemma3_text")
    document = json.loads((tmp_path / "text" / "config.json").read_text())
    folder = tmp_path / "both"
    folder.mkdir()
    state = {name.replace("model.", prefix, 1): x for name, x in canonical_state(model).items()}
    vision = {"vision_tower.encoder.layers.0.mlp.fc1.bias": torch.ones(3)}
    safetensors.torch.save_file(state | vision, folder / "model.safetensors")
    outer = {"model_type": "gemma3", "text_config": document, "vision_config": {"hidden_size": 3}}
    (folder / "config.json").write_text(json.dumps(outer))
    artifact, text = open_artifact(folder), open_artifact(tmp_path / "text")
    check_complete(artifact)
    assert artifact.config == text.config
    assert artifact.tensors.keys() == text.tensors.keys()
    assert artifact.unmapped == tuple(vision)
    assert all(name.startswith(prefix) for name in (ref.stored_name for ref in artifact.tensors.values()))
