"""Hyperparameters from GGUF metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.helpers.tiny_gguf import HEADS, KV_HEADS, LAYERS, add_hyperparameters, tiny_tensors, write_gguf

from driftscope.artifacts.complete import check_complete
from driftscope.artifacts.gguf_config import config_from_gguf
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError

EPSILON = "llama.attention.layer_norm_rms_epsilon"


def model_with(path: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A model whose architecture's keys are changed (``__`` stands for a dot); None removes one."""

    def keys(writer: gguf.GGUFWriter) -> None:
        add_hyperparameters(writer)
        data = writer.kv_data[0]
        for name, value in changes.items():
            key = f"{architecture}.{name.replace('__', '.')}"
            data.pop(key, None)
            if value is not None:
                writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))

    return write_gguf(path, architecture, tiny_tensors(architecture), keys=keys)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_hyperparameters(tmp_path: Path, architecture: str, tied: bool) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture, tiny_tensors(architecture, tied=tied))
    artifact = open_artifact(path)
    check_complete(artifact)
    config = artifact.config
    assert config.architecture == architecture
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, 16)
    assert (config.num_layers, config.vocab_size, config.context_length) == (LAYERS, 50, 128)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_theta == 10000.0
    assert config.tie_word_embeddings is tied
    assert config.attention_bias is (architecture == "qwen2")
    assert config.qk_norm is (architecture == "qwen3")
    assert artifact.unmapped == ()
    rotated = {t.name.split(".")[-2]: t.rope_heads for t in artifact.tensors.values() if t.rope_heads}
    assert rotated == ({"q_proj": HEADS, "k_proj": KV_HEADS} if architecture == "llama" else {})


def test_optional_hyperparameters(tmp_path: Path) -> None:
    changes = {
        "attention__head_count_kv": [KV_HEADS] * LAYERS,
        "attention__sliding_window": 32,
        "rope__freq_base": None,
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 64,
        "vocab_size": 50,
    }
    config = open_artifact(model_with(tmp_path / "m.gguf", **changes)).config
    assert config.num_kv_heads == KV_HEADS
    assert config.sliding_window == 32
    assert config.rope_theta == 10000.0
    assert config.rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def test_factor_without_a_type_is_linear_as_in_llama_cpp(tmp_path: Path) -> None:
    config = open_artifact(model_with(tmp_path / "m.gguf", rope__scaling__factor=2.0)).config
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention__head_count": 0}, "llama.attention.head_count is 0"),
        ({"attention__head_count": None}, "llama.attention.head_count is missing"),
        ({"attention__head_count": 5}, "is not a multiple of llama.attention.head_count 5"),
        ({"attention__head_count": "4"}, "llama.attention.head_count is '4'"),
        ({"attention__head_count": [4, 2]}, "llama.attention.head_count differs between layers"),
        ({"attention__head_count_kv": 3}, "do not share 3 key/value heads"),
        ({"attention__head_count_kv": -1}, "llama.attention.head_count_kv is -1"),
        (
            {"attention__key_length": 7, "attention__value_length": 7, "attention__head_count_kv": 4},
            "head_dim is 7",
        ),
        ({"attention__value_length": 8}, "llama.attention.value_length is 8"),
        ({"rope__dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"block_count": True}, "llama.block_count is True"),
        ({"block_count": 100000}, "100000 layers"),
        ({"embedding_length": None}, "llama.embedding_length is missing"),
        ({"feed_forward_length": 0}, "llama.feed_forward_length is 0"),
        ({"context_length": None}, "llama.context_length is missing"),
        ({"attention__layer_norm_rms_epsilon": None}, f"{EPSILON} is missing"),
        ({"attention__layer_norm_rms_epsilon": -1e-5}, f"{EPSILON} is -9.99"),
        (
            {"attention__layer_norm_rms_epsilon": float("nan")},
            f"{EPSILON} is nan",
        ),
        ({"rope__freq_base": float("inf")}, "llama.rope.freq_base is inf"),
        ({"rope__freq_base": 0.0}, "llama.rope.freq_base is 0.0"),
        ({"rope__scaling__type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ({"expert_count": 8}, "llama.expert_count is 8"),
        ({"attention__scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"vocab_size": -5}, "llama.vocab_size is -5"),
    ],
)
def test_hyperparameters_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = model_with(tmp_path / "m.gguf", **changes)
    with pytest.raises(InputError) as caught:
        open_artifact(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "gptneox", tiny_tensors("llama"))
    with pytest.raises(InputError, match="'gptneox' is not supported; expected one of llama, mistral, qwen2"):
        open_artifact(path)


def test_no_architecture() -> None:
    with pytest.raises(InputError, match=r"m\.gguf: general\.architecture is missing"):
        config_from_gguf({}, {}, "m.gguf")


def test_part_of_a_split_model() -> None:
    with pytest.raises(InputError, match="one of 3 parts"):
        config_from_gguf({"general.architecture": "llama", "split.count": 3}, {}, "m.gguf")
