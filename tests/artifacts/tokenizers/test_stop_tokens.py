"""Where an answer ends."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import llama_cpp
import pytest
from tests.helpers.tiny_gguf import CONTEXT, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, write_gguf

from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.stop_tokens import stop_tokens
from driftscope.artifacts.tokenizers.token_types import BYTE, CONTROL, NORMAL, UNKNOWN
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer
from driftscope.errors import InputError


@pytest.mark.model
def test_the_default_model_ends_at_im_end_in_either_container(default_gguf: Path, tmp_path: Path) -> None:
    source = open_artifact(default_gguf)
    assert stop_tokens(source, load_tokenizer(source)) == {2}
    write_teacher(source, tmp_path / "teacher")
    teacher = open_artifact(tmp_path / "teacher")
    tokenizer = load_tokenizer(teacher)
    assert tokenizer.decode([2]) == "<|im_end|>"
    assert stop_tokens(teacher, tokenizer) == {2}

    listed = tmp_path / "teacher" / "generation_config.json"
    listed.write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert stop_tokens(teacher, tokenizer) == {0, 2}
    for wrong, message in (("two", "expected a token id"), (49152, "outside of the vocabulary")):
        listed.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(InputError, match=message):
            stop_tokens(teacher, tokenizer)


def _spm_model(path: Path, tokens: dict[int, str], **ids: int) -> Artifact:
    """A model with a SentencePiece vocabulary of 300 tokens and no tensors."""
    texts = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(f"w{i}" for i in range(41)),
    ]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 41]
    for index, text in tokens.items():
        texts[index], kinds[index] = text, CONTROL

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(LAYERS)
        writer.add_context_length(CONTEXT)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(300)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        writer.add_token_scores([0.0] * 300)
        for name, index in ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)

    return open_artifact(write_gguf(path, "llama", {}, keys=keys))


@pytest.mark.parametrize(
    ("tokens", "ids", "expected"),
    [
        ({}, {}, {2}),
        ({270: "<eos>", 280: "<end_of_turn>"}, {"eos": 270}, {270, 280}),
        ({270: "<|endoftext|>", 281: "<|end|>", 282: "<|user|>"}, {"eos": 270}, {270, 281}),
        ({271: "<|eot_id|>", 272: "<|eom_id|>"}, {"eos": 271, "eot": 271, "eom": 272}, {271, 272}),
        ({}, {"eos": 2, "eot": 290}, {2, 290}),
    ],
    ids=["silent", "gemma", "phi-3", "llama-3", "named"],
)
def test_a_gguf_file_ends_where_llama_cpp_stops(
    tokens: dict[int, str], ids: dict[str, int], expected: set[int], tmp_path: Path
) -> None:
    artifact = _spm_model(tmp_path / "model.gguf", tokens, **ids)
    assert stop_tokens(artifact, load_tokenizer(artifact)) == expected
    vocabulary = llama_cpp.Llama(str(artifact.path), vocab_only=True, verbose=False)
    handle = llama_cpp.llama_model_get_vocab(vocabulary.model)
    found = {index for index in range(300) if llama_cpp.llama_vocab_is_eog(handle, index)}
    # llama.cpp stops at any </s> and at any <|endoftext|> as well.
    assert found - expected <= {2}


def test_an_end_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    artifact = _spm_model(tmp_path / "model.gguf", {}, eot=300)
    with pytest.raises(InputError, match="300 is outside of the vocabulary of 300 tokens"):
        stop_tokens(artifact, load_tokenizer(artifact))
