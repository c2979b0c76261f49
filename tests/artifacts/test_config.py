"""Hyperparameters from config.json, against transformers' own configuration classes."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.tiny_models import save_tiny_model
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from driftscope.artifacts.complete import expected_shapes
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


GEMMA = {"model_type": "gemma3_text", "head_dim": 16}
LONGROPE: dict[str, Any] = {
    "model_type": "phi3",
    "original_max_position_embeddings": 32,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
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


def test_windows_of_some_layers() -> None:
    some = read(**WINDOW, max_window_layers=1)
    assert (some.sliding_window, some.sliding_layers) == (8, (1,))
    assert [some.window_of(layer) for layer in range(2)] == [None, 8]
    none = read(**WINDOW, layer_types=["full_attention"] * 2)
    assert (none.sliding_window, none.sliding_layers) == (None, None)
    assert read(model_type="phi3", sliding_window=8).sliding_window == 8
    assert read(model_type="phi3", sliding_window=None).sliding_window is None


@pytest.mark.parametrize("layers", [1, 2, 5, 6, 7, 13])
@pytest.mark.parametrize(
    ("configuration", "options"),
    [
        (Gemma2Config, {}),
        (Gemma3TextConfig, {}),
        (Gemma3TextConfig, {"sliding_window_pattern": 2}),
        (Gemma3TextConfig, {"sliding_window_pattern": 1}),
    ],
)
def test_windows_of_gemma(configuration: Any, options: dict[str, int], layers: int) -> None:
    """The pattern that transformers lays out by layer where a file only implies it."""
    theirs = configuration(num_hidden_layers=layers, **options).layer_types
    ours = read(model_type=configuration.model_type, num_hidden_layers=layers, sliding_window=9, **options)
    windows = [ours.window_of(layer) for layer in range(layers)]
    assert windows == [9 if kind == "sliding_attention" else None for kind in theirs]
    named = read(
        model_type=configuration.model_type, num_hidden_layers=layers, sliding_window=9, layer_types=theirs
    )
    assert replace(named, local_rope_theta=ours.local_rope_theta) == ours


@pytest.mark.parametrize("configuration", [Gemma2Config, Gemma3TextConfig, Phi3Config])
def test_switches_of_the_configurations_of_transformers(tmp_path: Path, configuration: Any) -> None:
    """What a file says, and what it leaves to transformers' own values."""
    sizes = {key: value for key, value in MINIMAL.items() if key != "model_type"}
    for case, options in enumerate(({}, {"head_dim": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-4})):
        configuration(**(sizes | options)).save_pretrained(tmp_path / str(case))
        full = json.loads((tmp_path / str(case) / "config.json").read_text())
        for document in (full, {**sizes, **options, "model_type": configuration.model_type}):
            (tmp_path / "config.json").write_text(json.dumps(document))
            theirs = AutoConfig.from_pretrained(tmp_path)
            ours = config_from_hf(document, "config.json")
            head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
            assert (ours.head_dim, ours.num_kv_heads) == (head_dim, theirs.num_key_value_heads)
            assert (ours.rms_norm_eps, ours.tie_word_embeddings) == (
                theirs.rms_norm_eps,
                theirs.tie_word_embeddings,
            )
            assert ours.sliding_window == theirs.sliding_window
            if configuration is Phi3Config:
                assert (ours.activation, ours.norm_offset, ours.post_norms) == ("silu", 0.0, False)
                assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
                continue
            assert (ours.activation, ours.norm_offset, ours.post_norms) == ("gelu_tanh", 1.0, True)
            assert ours.embedding_scale == theirs.hidden_size**0.5
            assert (ours.attention_scale or ours.head_dim**-0.5) == theirs.query_pre_attn_scalar**-0.5
            assert ours.attention_softcap == theirs.attn_logit_softcapping
            assert ours.logit_softcap == theirs.final_logit_softcapping
            rope = theirs.rope_parameters
            assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
            if configuration is Gemma3TextConfig:
                assert ours.local_rope_theta == rope["sliding_attention"]["rope_theta"]
            assert ours.qk_norm is (configuration is Gemma3TextConfig)


def test_rope_of_gemma3_by_old_and_new_keys() -> None:
    old = read(
        **GEMMA,
        sliding_window_pattern=2,
        rope_theta=3e6,
        rope_local_base_freq=2e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e6}
    sliding = {"rope_type": "default", "rope_theta": 2e4}
    kinds = {"full_attention": full, "sliding_attention": sliding}
    assert old == read(**GEMMA, sliding_window_pattern=2, rope_parameters=kinds)
    assert (old.rope_theta, old.local_rope_theta) == (3e6, 2e4)
    assert old.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    assert read(**GEMMA, layer_types=["full_attention"] * 2).local_rope_theta is None
    assert read(**GEMMA, query_pre_attn_scalar=16).attention_scale is None


def test_longrope_as_transformers_reads_it(tmp_path: Path) -> None:
    ours = read(**LONGROPE)
    assert ours == read(**{**LONGROPE, "rope_scaling": {**LONGROPE["rope_scaling"], "type": "su"}})
    (tmp_path / "config.json").write_text(json.dumps({**MINIMAL, **LONGROPE, "pad_token_id": 0}))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_type"] == "longrope"
    frequencies, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu")
    assert ours.rope_scaling is not None
    assert ours.rope_scaling["attention_factor"] == pytest.approx(factor, rel=1e-7)
    assert ours.rope_scaling["original_max_position_embeddings"] == 32
    assert len(frequencies) == len(ours.rope_scaling["short_factor"])
    assert ours.rotary_dim is None
    part = {**LONGROPE["rope_scaling"], "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    assert read(**{**LONGROPE, "rope_scaling": part}, partial_rotary_factor=0.75).rotary_dim == 12
    given = {**LONGROPE["rope_scaling"], "attention_factor": 1.5}
    scaling = read(**{**LONGROPE, "rope_scaling": given}).rope_scaling
    assert scaling is not None
    assert scaling["attention_factor"] == 1.5


def test_the_text_part_of_a_model_that_sees_images() -> None:
    """The published files leave most of it to transformers."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    document = {"model_type": "gemma3", "text_config": {**text, **scaling, "model_type": "gemma3_text"}}
    ours = config_from_hf(document, "config.json")
    theirs = Gemma3TextConfig(**text, **scaling)
    assert ours.architecture == "gemma3_text"
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (ours.vocab_size, ours.head_dim) == (theirs.vocab_size, theirs.head_dim)
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.tie_word_embeddings


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
        ({**WINDOW, "layer_types": ["chunked_attention"] * 2}, "layer_types has 'chunked_attention', which"),
        ({**GEMMA, "sliding_window": None}, "sliding_window is missing"),
        ({**GEMMA, "hidden_activation": "gelu"}, "hidden_activation is 'gelu', which is not supported"),
        ({**GEMMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, which is not supported"),
        ({**GEMMA, "final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0; expected a positive"),
        ({**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({**GEMMA, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0.0"),
        ({**GEMMA, "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({**GEMMA, "rope_parameters": {"rope_theta": 1.0}}, "expected one object for full_attention and one"),
        (
            {**GEMMA, "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "a RoPE scaling of the layers with a sliding window is not supported",
        ),
        ({"model_type": "gemma3"}, "text_config is None; expected an object in gemma3"),
        ({**LONGROPE, "partial_rotary_factor": 0.5}, "short_factor of the RoPE scaling has 8 numbers; expec"),
        ({**LONGROPE, "partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; expected at most 1"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "original_max_position_embeddings is 1; expec"),
        (
            {**LONGROPE, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8}},
            "RoPE scaling 'longrope' lacks long_factor",
        ),
        (
            {**LONGROPE, "rope_scaling": {**LONGROPE["rope_scaling"], "long_factor": [0.0] * 8}},
            "long_factor[0] is 0.0; expected a positive number",
        ),
        (
            {**LONGROPE, "rope_scaling": {**LONGROPE["rope_scaling"], "long_factor": 3.0}},
            "long_factor of the RoPE scaling is 3.0; expected a list of numbers",
        ),
        (
            {**LONGROPE, "rope_scaling": {**LONGROPE["rope_scaling"], "long_factor": [1e300] * 8}},
            "long_factor[0] is 1e+300; expected a positive number that f32 can hold",
        ),
        ({**GEMMA, "num_hidden_layers": 2**31 - 1}, "2147483647 layers; expected at most 4096"),
        ({**WINDOW, "num_hidden_layers": 2**31 - 1}, "2147483647 layers; expected at most 4096"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "RoPE scaling 'linear' is not supported in phi3; expected longrope",
        ),
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


def divisors(count: int) -> dict[str, list[float]]:
    """Lists as published files print them: doubles of f32 numbers."""
    return {
        name: [float(np.float32(1.01 + i / 7)) for i in range(count)]
        for name in ("short_factor", "long_factor")
    }


# What the published files say beside names and token numbers; lists stand for those in the files.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma-2-27b": (
        {
            "model_type": "gemma2",
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 128,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "max_position_embeddings": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 46,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
            "vocab_size": 256000,
        },
        {"attention_scale": 1 / 12, "sliding_layers": tuple(range(0, 46, 2)), "tie_word_embeddings": True},
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        {"attention_scale": None, "rope_theta": 1e6, "local_rope_theta": 1e4, "sliding_window": 512},
    ),
    "phi-3-mini-4k": (
        {
            "model_type": "phi3",
            "attention_bias": False,
            "embd_pdrop": 0.0,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
        {"head_dim": 96, "rope_scaling": None, "sliding_window": 2047, "sliding_layers": None},
    ),
    "phi-4-mini": (
        {
            "model_type": "phi3",
            "attention_bias": False,
            "full_attn_mod": 1,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {**divisors(48), "type": "longrope"},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
        {"head_dim": 128, "rotary_dim": 96, "num_kv_heads": 8, "tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_files_as_they_are_published(model: str) -> None:
    document, expected = PUBLISHED[model]
    ours = config_from_hf(document, "config.json")
    for field, value in expected.items():
        assert getattr(ours, field) == value, field


def test_longrope_of_phi_4_mini() -> None:
    scaling = config_from_hf(PUBLISHED["phi-4-mini"][0], "config.json").rope_scaling
    assert scaling is not None
    # sqrt(1 + ln(32) / ln(4096)), as the paper has it.
    assert scaling["attention_factor"] == pytest.approx(1.1902380714238083, rel=1e-7)
    assert scaling["long_factor"][0] == 1.01
    assert np.float32(scaling["long_factor"]).tolist() == divisors(48)["long_factor"]


# What no file should say, and what a careless program may have written all the same.
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31 - 1, 2**63, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e300, -1e300),
    *(float("nan"), float("inf"), "", "x", "linear", "longrope", "gelu", [], [0], [[]], ["x"], [1.0] * 8),
    *({}, {"rope_type": []}, {"type": "longrope"}, {"full_attention": 3}, {"sliding_attention": {"type": 1}}),
]
WHOLE: list[dict[str, Any]] = [
    MINIMAL,
    {**MINIMAL, **LONGROPE, "partial_rotary_factor": 1.0, "sliding_window": 8},
    {**MINIMAL, "rope_scaling": LLAMA3},
    {**MINIMAL, **WINDOW, "layer_types": ["sliding_attention"] * 2, "max_window_layers": 1},
    *(document for document, _ in PUBLISHED.values()),
    {"model_type": "gemma3", "text_config": PUBLISHED["gemma-3-1b"][0]},
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(WHOLE), st.data())
def test_odd_values_give_hyperparameters_or_one_line(document: dict[str, Any], data: st.DataObject) -> None:
    changed = json.loads(json.dumps(document))
    for _ in range(data.draw(st.integers(1, 3))):
        place = changed
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        place[key] = deepcopy(data.draw(st.sampled_from(ODD)))
    config, message = None, ""
    try:
        config = config_from_hf(changed, "config.json")
    except InputError as error:
        message = str(error)
    if config is None:
        assert message.startswith("config.json: ")
        assert len(message) < 300
        assert "\n" not in message
    else:
        assert len(expected_shapes(config)) > config.num_layers
