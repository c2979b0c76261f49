"""Hyperparameters from GGUF metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.tiny_gguf import HEADS, KV_HEADS, LAYERS, add_hyperparameters, tiny_tensors, write_gguf

from driftscope.artifacts.complete import check_complete, expected_shapes
from driftscope.artifacts.gguf_config import config_from_gguf
from driftscope.artifacts.model import ModelConfig
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_hyperparameters(tmp_path: Path, architecture: str, tied: bool, fused: bool) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture, tiny_tensors(architecture, tied=tied, fused=fused))
    artifact = open_artifact(path)
    check_complete(artifact)
    config = artifact.config
    assert config.architecture == {"gemma3": "gemma3_text"}.get(architecture, architecture)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, 16)
    assert (config.num_layers, config.vocab_size, config.context_length) == (LAYERS, 50, 128)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_theta == 10000.0
    assert config.tie_word_embeddings is tied
    assert config.attention_bias is (architecture == "qwen2")
    assert config.qk_norm is (architecture in ("qwen3", "gemma3"))
    assert config.post_norms is architecture.startswith("gemma")
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


def config_with(path: Path, architecture: str, **changes: Any) -> ModelConfig:
    return open_artifact(model_with(path / "m.gguf", architecture, **changes)).config


def test_what_llama_cpp_takes_where_a_gemma2_file_is_silent(tmp_path: Path) -> None:
    config = config_with(tmp_path, "gemma2")
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert (config.sliding_window, config.sliding_layers) == (4096, (0,))
    assert config.local_rope_theta is None
    assert config.attention_scale is None
    assert (config.norm_offset, config.embedding_scale, config.activation) == (1.0, 8.0, "gelu_tanh")
    changes = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    config = config_with(tmp_path, "gemma2", **changes, attention__sliding_window=7)
    assert (config.attention_softcap, config.logit_softcap) == (20.0, 10.0)
    assert (config.sliding_window, config.sliding_layers) == (7, (0,))


def test_gemma3_has_a_window_only_if_its_file_says_so(tmp_path: Path) -> None:
    config = config_with(tmp_path, "gemma3")
    assert (config.sliding_window, config.local_rope_theta, config.logit_softcap) == (None, None, None)
    config = config_with(tmp_path, "gemma3", attention__sliding_window=7, final_logit_softcapping=10.0)
    assert (config.sliding_window, config.sliding_layers) == (7, None)
    assert (config.local_rope_theta, config.logit_softcap, config.attention_softcap) == (1e4, 10.0, None)
    config = config_with(tmp_path, "gemma3", attention__sliding_window=7, rope__freq_base_swa=5e4)
    assert config.local_rope_theta == 5e4


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (0, None),
        (1, ()),
        (2, (0,)),
        ([True, False], (0,)),
        ([False, True], (1,)),
        ([False, False], ()),
        ([True, True, True], None),
    ],
)
def test_layers_with_a_window(tmp_path: Path, pattern: Any, expected: tuple[int, ...] | None) -> None:
    changes = {"attention__sliding_window": 7, "attention__sliding_window_pattern": pattern}
    for architecture in ("gemma2", "gemma3", "qwen2"):
        config = config_with(tmp_path, architecture, **changes)
        assert config.sliding_window == (None if expected == () else 7)
        assert config.sliding_layers == (None if expected == () else expected)


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_by_another_number(tmp_path: Path, architecture: str, layers: int) -> None:
    """llama.cpp knows them by their layers; of a head of 16 channels, 64 / 4 = 16 is the number too."""
    changes = {"attention__key_length": 8, "attention__value_length": 8, "rope__dimension_count": 8}
    path = model_with(tmp_path / "m.gguf", architecture, block_count=layers, **changes)
    assert open_artifact(path).config.attention_scale == 16**-0.5
    path = model_with(tmp_path / "m.gguf", architecture, block_count=layers + 1, **changes)
    assert open_artifact(path).config.attention_scale is None


def with_longrope(path: Path, lists: dict[str, list[float]], **keys: Any) -> Path:
    """A phi3 model with tensors of divisors."""

    def add(writer: gguf.GGUFWriter) -> None:
        add_hyperparameters(writer)
        for name, value in keys.items():
            key = f"phi3.{name.replace('__', '.')}"
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))

    tensors = {f"rope_factors_{name}.weight": np.array(x, np.float32) for name, x in lists.items()}
    return write_gguf(path, "phi3", tiny_tensors("phi3") | tensors, keys=add)


def test_longrope(tmp_path: Path) -> None:
    lists = {"long": [1.1, 2.2, 3.3, 4.4], "short": [1.0, 1.1, 1.2, 1.3]}
    keys = {
        "rope__dimension_count": 8,
        "rope__scaling__original_context_length": 32,
        "rope__scaling__attn_factor": 1.19,
    }
    config = open_artifact(with_longrope(tmp_path / "m.gguf", lists, **keys)).config
    assert config.rotary_dim == 8
    assert config.rope_scaling == {
        "rope_type": "longrope",
        "short_factor": lists["short"],
        "long_factor": lists["long"],
        "original_max_position_embeddings": 32,
        "attention_factor": 1.19,
    }


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"long": [1.0] * 8}, "rope_factors_long.weight alone; expected rope_factors_long.weight and rope_f"),
        ({"long": [1.0] * 8, "short": [1.0] * 4}, "rope_factors_short.weight is F32 4; expected F32 8"),
        ({"long": [0.0] * 8, "short": [1.0] * 8}, "rope_factors_long.weight holds values that are not posit"),
    ],
)
def test_longrope_that_makes_no_sense(tmp_path: Path, lists: dict[str, list[float]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_artifact(with_longrope(tmp_path / "m.gguf", lists))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gemma2", {"attn_logit_softcapping": -1.0}, "gemma2.attn_logit_softcapping is -1.0; expected more"),
        (
            "gemma3",
            {"attn_logit_softcapping": 50.0},
            "gemma3.attn_logit_softcapping is 50.0, which is not su",
        ),
        ("llama", {"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping is 30.0, which is not s"),
        ("gemma2", {"attention__sliding_window_pattern": [True]}, "pattern has 1 values; expected 2"),
        ("gemma2", {"attention__sliding_window_pattern": -1}, "pattern is -1; expected a whole number"),
        ("gemma2", {"rope__dimension_count": 8}, "gemma2.rope.dimension_count is 8; expected the head size"),
        (
            "gemma3",
            {"attention__key_length_swa": 8},
            "gemma3.attention.key_length_swa is 8; expected the head",
        ),
        (
            "gemma3",
            {"rope__dimension_count_swa": 8},
            "gemma3.rope.dimension_count_swa is 8; expected that of",
        ),
        ("phi3", {"rope__dimension_count": 7}, "RoPE turns 7 channels of a head; expected an even number"),
        ("phi3", {"rope__dimension_count": 32}, "RoPE turns 32 channels of a head; expected an even number"),
    ],
)
def test_switches_that_make_no_sense(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_artifact(model_with(tmp_path / "m.gguf", architecture, **changes))


def test_a_llama_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    assert config_with(tmp_path, "llama", attention__sliding_window=7).architecture == "mistral"
    assert config_with(tmp_path, "llama", attention__sliding_window=0).architecture == "llama"


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


ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31 - 1, 2**63, 0.0, -0.0, 0.5, 1e-320, 3e38, -3e38, 1e300),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "linear",
        "longrope",
        "yarn",
        (),
        (0,),
        (2, 2),
        (2, 3),
        ("x", "y"),
    ),
]
EVERY_KEY = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.sliding_window": 8,
    "attention.sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope.dimension_count": 16,
    "rope.freq_base": 1e4,
    "rope.freq_base_swa": 1e4,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "vocab_size": 50,
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]), st.data())
def test_odd_values_give_hyperparameters_or_one_line(architecture: str, data: st.DataObject) -> None:
    keys = dict(EVERY_KEY)
    if architecture != "gemma2":
        keys["attn_logit_softcapping"] = 0.0
    if architecture not in ("gemma2", "gemma3"):
        keys["final_logit_softcapping"] = 0.0
    for key in data.draw(st.lists(st.sampled_from(sorted(keys)), min_size=0, max_size=3)):
        keys[key] = data.draw(st.sampled_from(ODD))
    metadata = {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}
    config, message = None, ""
    try:
        config = config_from_gguf({"general.architecture": architecture, **metadata}, {}, "m.gguf")
    except InputError as error:
        message = str(error)
    if config is None:
        assert message.startswith("m.gguf: ")
        assert len(message) < 300
        assert "\n" not in message
    else:
        assert len(expected_shapes(config)) > config.num_layers
