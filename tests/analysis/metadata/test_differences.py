"""Hyperparameters, tokens and templates that differ, and whether an answer changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.analysis.planted import copied, judge, random_model

from driftscope.analysis.metadata.differences import metadata_differences
from driftscope.artifacts.model import Artifact

MODEL = replace(random_model(), container="gguf")
TOKENS = [f"token-{i}" for i in range(100)]


def told(**metadata: Any) -> Artifact:
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    return replace(MODEL, metadata={**keys, **{f"tokenizer.{key}": value for key, value in metadata.items()}})


def found(b: Artifact, a: Artifact | None = None) -> dict[str, tuple[Any, Any, str, bool]]:
    differences = metadata_differences(a or told(), b)
    return {item["key"]: (item["a"], item["b"], item["changes"], item["matters"]) for item in differences}


def test_the_same_metadata_differ_in_nothing() -> None:
    assert found(told()) == {}


@pytest.mark.parametrize(
    ("changes", "key", "kind", "matters"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps", "forward-pass", True),
        ({"rope_theta": 1e6}, "rope_theta", "forward-pass", True),
        ({"num_kv_heads": 8}, "num_kv_heads", "forward-pass", True),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling", "forward-pass", True),
        ({"attention_softcap": 50.0}, "attention_softcap", "forward-pass", True),
        ({"context_length": 64}, "context_length", "limit", False),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", "storage", False),
    ],
)
def test_a_hyperparameter_says_what_it_changes(
    changes: dict[str, Any], key: str, kind: str, matters: bool
) -> None:
    other = told()
    other = replace(other, config=replace(other.config, **changes))
    assert {name: item[2:] for name, item in found(other).items()} == {key: (kind, matters)}


def test_llama_and_mistral_are_one_pass_but_for_a_window_that_is_shorter_than_the_context() -> None:
    a, b = told(), told()
    a = replace(a, config=replace(a.config, architecture="mistral", sliding_window=a.config.context_length))
    assert {name: item[2] for name, item in found(b, a).items()} == {
        "architecture": "nothing",
        "sliding_window": "nothing",
    }
    a = replace(a, config=replace(a.config, sliding_window=a.config.context_length - 1))
    assert found(b, a)["sliding_window"][2] == "forward-pass"


def test_tokens_are_compared_by_content_and_not_repeated() -> None:
    swapped = [*TOKENS[:40], "other", *TOKENS[41:]]
    assert found(told(**{"ggml.tokens": swapped})) == {
        "tokens": ("100 tokens; 40 is 'token-40'", "100 tokens; 40 is 'other'", "tokens", True)
    }
    (item,) = metadata_differences(told(), told(**{"ggml.tokens": [*TOKENS[:40], *TOKENS[41:]]}))
    assert (item["first"], item["differing"]) == (40, 60)


def test_tokens_that_pad_a_vocabulary_are_none() -> None:
    padded = [*TOKENS, "[PAD100]", "[PAD101]"]
    assert found(told(**{"ggml.tokens": padded})) == {
        "tokens": ("100 tokens", "102 tokens", "nothing", False)
    }
    longer = [*TOKENS, "new"]
    assert found(told(**{"ggml.tokens": longer}))["tokens"][2:] == ("tokens", True)


@pytest.mark.parametrize(
    ("metadata", "key", "kind"),
    [
        ({"ggml.bos_token_id": 7}, "bos_token_id", "tokens"),
        ({"ggml.add_bos_token": True}, "add_bos_token", "tokens"),
        ({"ggml.pre": "llama-bpe"}, "pre_tokenizer", "tokens"),
        ({"chat_template": "{{ messages[1].content }}"}, "chat_template", "prompt"),
        ({"chat_template": None}, "chat_template", "prompt"),
        ({"ggml.padding_token_id": 3}, "pad_token_id", "nothing"),
    ],
)
def test_tokenizer_and_template_say_what_they_change(metadata: dict[str, Any], key: str, kind: str) -> None:
    differences = found(told(**metadata))
    assert {name: item[2] for name, item in differences.items()} == {key: kind}
    if key == "chat_template":
        assert "sha256" in differences[key][0]


def test_a_side_without_a_tokenizer_is_told_once() -> None:
    assert list(found(replace(MODEL, metadata={}))) == ["tokenizer"]


def test_the_summary_names_what_matters() -> None:
    b = replace(copied(MODEL), config=replace(MODEL.config, rms_norm_eps=1e-6, context_length=64))
    assert judge(MODEL, b)["metadata_matters"] == ["rms_norm_eps"]
