"""Opening models of every container."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.tiny_gguf import tiny_tensors, write_gguf
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
