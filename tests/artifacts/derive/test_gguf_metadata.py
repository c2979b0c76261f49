"""RoPE scalings, windows and tokenizers that must survive the way into a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from tests.helpers.texts import varied_texts
from tests.helpers.tiny_models import save_tiny_model
from tests.helpers.tiny_vocabulary import SIZE, tiny_vocabulary

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.folder_vocabulary import PRE_NAME_KEY
from driftscope.artifacts.tokenizers.pretokenizers import PRE_TOKENIZERS
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer, tokenizer_from_vocabulary
from driftscope.artifacts.tokenizers.vocabulary import SPECIAL_KEYS
from driftscope.errors import InputError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with a factor of its own": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
    },
}


def _save(folder: Path, architecture: str, scaling: dict[str, Any] | None, **options: Any) -> Any:
    # Llama 3's theta: the few frequencies of a small head fall on both sides of the bounds of its scaling.
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": 500000.0}
    return save_tiny_model(folder, architecture, rope_parameters=rope, **options)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_rope_scaling_comes_back(tmp_path: Path, name: str, architecture: str) -> None:
    _save(tmp_path / "source", architecture, SCALINGS[name])
    source = open_artifact(tmp_path / "source")
    assert source.config.rope_scaling == SCALINGS[name]
    write_candidate(source, tmp_path / "a.gguf", scheme="F32")
    assert open_artifact(tmp_path / "a.gguf").config.rope_scaling == SCALINGS[name]


@pytest.mark.parametrize("name", SCALINGS)
def test_llama_cpp_rotates_as_transformers_does(tmp_path: Path, name: str) -> None:
    model = _save(tmp_path / "source", "llama", SCALINGS[name], hidden_size=128, head_dim=32)
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "a.gguf", scheme="F32")
    ids = np.random.Generator(np.random.Philox(4)).integers(0, 96, 200).tolist()
    engine = llama_cpp.Llama(str(tmp_path / "a.gguf"), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    engine.eval(ids)
    found = np.array(engine.scores[: len(ids)], dtype=np.float64)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].double().numpy()
    assert np.sum((found - expected) ** 2) / np.sum(expected**2) < 1e-5
    if name != "none":
        plain = _save(tmp_path / "plain", "llama", None, hidden_size=128, head_dim=32)
        with torch.no_grad():
            other = plain(torch.tensor([ids])).logits[0].double().numpy()
        # The scaling matters to these logits, so that losing it would be seen.
        assert np.sum((found - other) ** 2) / np.sum(expected**2) > 1e-4


def test_sliding_window_comes_back(tmp_path: Path) -> None:
    save_tiny_model(
        tmp_path / "source", "qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=0
    )
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "a.gguf", scheme="F32")
    assert open_artifact(tmp_path / "a.gguf").config.sliding_window == 7


def _add_tokenizer(folder: Path, pre: str) -> None:
    vocabulary = tiny_vocabulary(pre, add_bos=True, chat_template="{{ messages[0].content }}")
    tokenizer = tokenizer_from_vocabulary(vocabulary, "here")
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    config = {**tokenizer.special, PRE_NAME_KEY: pre, "chat_template": vocabulary.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("pre", [rule.names[0] for rule in PRE_TOKENIZERS])
def test_tokenizer_reaches_llama_cpp(tmp_path: Path, pre: str) -> None:
    save_tiny_model(tmp_path / "source", "llama", vocab_size=SIZE + 3)
    _add_tokenizer(tmp_path / "source", pre)
    teacher = open_artifact(tmp_path / "source")
    write_candidate(teacher, tmp_path / "a.gguf", scheme="Q8_0")
    candidate = open_artifact(tmp_path / "a.gguf")
    expected = tiny_vocabulary(pre)
    assert candidate.metadata["tokenizer.ggml.pre"] == pre
    assert tuple(candidate.metadata["tokenizer.ggml.tokens"])[:SIZE] == expected.tokens
    assert tuple(candidate.metadata["tokenizer.ggml.token_type"]) == (*expected.types, 5, 5, 5)
    for name, index in expected.special.items():
        assert candidate.metadata[SPECIAL_KEYS[name]] == index
    before, after = load_tokenizer(teacher), load_tokenizer(candidate)
    assert after.chat_template == before.chat_template
    assert after.special == before.special
    engine = llama_cpp.Llama(str(tmp_path / "a.gguf"), vocab_only=True, verbose=False)
    for text in varied_texts(100, seed=8)[15:]:
        ids = before.encode(text, add_special=True)
        assert after.encode(text, add_special=True) == ids
        if text.isascii():
            assert engine.tokenize(text.encode(), add_bos=True, special=True) == ids


def test_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", "llama")
    write_candidate(open_artifact(tmp_path / "source"), tmp_path / "a.gguf", scheme="F32")
    candidate = open_artifact(tmp_path / "a.gguf")
    assert candidate.metadata["tokenizer.ggml.model"] == "none"
    with pytest.raises(InputError, match="'none' is not supported"):
        load_tokenizer(candidate)
