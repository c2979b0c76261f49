"""Hyperparameters from config.json, against transformers' own configuration classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.tiny_models import save_tiny_model
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from driftscope.artifacts.config import config_from_hf
from driftscope.artifacts.model import ModelConfig
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.rope_config import checked_rope_scaling
from driftscope.errors import InputError

MINIMAL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "num_key_value_heads": 4,
}
WINDOW = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(**changes: Any) -> ModelConfig:
    return config_from_hf({**MINIMAL, **changes}, "config.json")


@pytest.mark.parametrize("configuration", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_same_as_transformers(tmp_path: Path, configuration: Any) -> None:
    """What transformers writes, and what it takes where a minimal file is silent."""
    sizes = {key: value for key, value in MINIMAL.items() if key not in ("model_type", "num_key_value_heads")}
    cases: tuple[dict[str, Any], ...] = (
        {"num_attention_heads": 32},
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-4, "head_dim": 20},
    )
    for case, options in enumerate(cases):
        written = configuration(**(sizes | options))
        folder = tmp_path / str(case)
        written.save_pretrained(folder)
        model_type = configuration.model_type
        minimal = {**sizes, **options, "model_type": model_type}
        for document in (json.loads((folder / "config.json").read_text()), minimal):
            (tmp_path / "config.json").write_text(json.dumps(document))
            theirs = AutoConfig.from_pretrained(tmp_path)
            ours = config_from_hf(document, "config.json")
            assert ours.architecture == theirs.model_type
            assert ours.hidden_size == theirs.hidden_size
            assert ours.num_heads == theirs.num_attention_heads
            assert ours.num_kv_heads == theirs.num_key_value_heads
            assert ours.head_dim == (getattr(theirs, "head_dim", None) or ours.hidden_size // ours.num_heads)
            assert ours.rms_norm_eps == theirs.rms_norm_eps
            assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
            assert ours.rope_scaling is None
            assert ours.tie_word_embeddings == theirs.tie_word_embeddings
            assert ours.sliding_window == (theirs.sliding_window if model_type == "mistral" else None)


def test_old_and_new_rope_keys_are_one() -> None:
    assert read(rope_theta=5e5) == read(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    old = read(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = read(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert old == new
    assert old.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert read(rope_scaling=None).rope_scaling is None
    assert read(rope_parameters={**LLAMA3, "rope_theta": 5e5}).rope_scaling == LLAMA3


def test_hidden_size_and_head_size_may_differ() -> None:
    assert read(model_type="qwen3").head_dim == 128
    assert read(model_type="qwen3", head_dim=32).head_dim == 32
    assert read(head_dim=None).head_dim == 16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": 32}, None),
        ({"sliding_window": 32, "use_sliding_window": False}, None),
        ({"sliding_window": 32, "use_sliding_window": True}, None),
        ({"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}, 32),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, None),
        ({"sliding_window": 32, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 32),
    ],
)
def test_sliding_window_of_qwen2(changes: dict[str, Any], expected: int | None) -> None:
    assert read(model_type="qwen2", **changes).sliding_window == expected
    layer_types = Qwen2Config(**{**MINIMAL, "num_hidden_layers": 2, **changes}).layer_types
    assert ("sliding_attention" in layer_types) == (expected is not None)


def test_sliding_window_of_mistral() -> None:
    assert read(model_type="mistral").sliding_window == 4096
    assert read(model_type="mistral", sliding_window=None).sliding_window is None
    assert read(model_type="mistral", sliding_window=8).sliding_window == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not supported; expected one of llama, mistral"),
        ({"model_type": None}, "model_type is missing; expected one of llama"),
        ({"model_type": ["llama"]}, "architecture ['llama'] is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0; expected a positive whole number"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "4 attention heads do not share 3"),
        ({"num_hidden_layers": 10**6}, "1000000 layers; expected at most"),
        ({"num_hidden_layers": 10**40}, "num_hidden_layers is 1000"),
        ({"head_dim": 5}, "head_dim is 5; RoPE needs an even number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"rope_theta": 0}, "rope_theta is 0.0"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0"),
        ({"rope_scaling": "linear"}, "the RoPE scaling is 'linear'; expected an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "RoPE scaling 'linear' lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor of the RoPE scaling is 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'; expected a finite number"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "is not below high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_bias": True}, "attention_bias is true; expected false for llama"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config has the quant_method 'None'; expected one of fp8",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "has the quant_method 'gptq'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({**WINDOW, "max_window_layers": -1}, "max_window_layers is -1"),
        ({**WINDOW, "layer_types": []}, "layer_types is not a list of 2 names"),
    ],
)
def test_values_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert len(str(caught.value)) < 250


def test_rope_type_wins_over_the_old_key() -> None:
    assert checked_rope_scaling({"type": "yarn", "rope_type": "linear", "factor": 3}, "c") == {
        "rope_type": "linear",
        "factor": 3,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
    ],
)
def test_unusable_file(tmp_path: Path, text: str, message: str) -> None:
    save_tiny_model(tmp_path, "llama")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        open_artifact(tmp_path)
