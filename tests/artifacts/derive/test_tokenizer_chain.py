"""A SentencePiece tokenizer through the copies of a model: folder, GGUF, folder; the ids stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest
import transformers
from tests.helpers.texts import varied_texts
from tests.helpers.tiny_models import save_tiny_model
from tests.helpers.tiny_sentencepiece import CONTROL_TOKENS, SIZE, spm_vocabulary, trained

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.prompts import encode_prompts
from driftscope.artifacts.tokenizers.stop_tokens import stop_tokens
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer, tokenizer_from_vocabulary
from driftscope.artifacts.tokenizers.vocabulary import strip_right_of_phi3

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}"
)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_every_copy_has_the_same_ids(architecture: str, tmp_path: Path) -> None:
    prefix = architecture == "llama"
    folder = tmp_path / "model"
    # Ids without a token behind the vocabulary, as most models have them.
    save_tiny_model(folder, architecture, vocab_size=SIZE + 32)
    (folder / "tokenizer.model").write_bytes(trained(dummy_prefix=prefix, symbols=True))
    config = {"add_bos_token": True, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    original = open_artifact(folder)
    write_candidate(original, tmp_path / "model.gguf", scheme="Q8_0")
    candidate = open_artifact(tmp_path / "model.gguf")
    write_teacher(candidate, tmp_path / "teacher")
    teacher = open_artifact(tmp_path / "teacher")
    first, second, third = (load_tokenizer(model) for model in (original, candidate, teacher))
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    hugging_face = transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher")
    for text in varied_texts(200, seed=2, control=("<s>", *CONTROL_TOKENS, "<tool>")):
        ids = first.encode(text, add_special=True)
        assert ids == second.encode(text, add_special=True), text
        assert ids == third.encode(text, add_special=True), text
        assert ids == llama.tokenize(text.encode(), add_bos=True, special=True), text
        assert ids == hugging_face.encode(text), text
    assert first.chat_template == second.chat_template == third.chat_template == TEMPLATE
    assert hugging_face.chat_template == TEMPLATE

    # The end of a turn is known by its text in GGUF, and listed in the folder that is made of it.
    turn = third.encode("<end_of_turn>")
    assert stop_tokens(candidate, second) == stop_tokens(teacher, third) == {2, *turn}
    chat = {"id": "p", "chat": [{"role": "user", "content": "Hi"}]}
    (prompt,) = encode_prompts([chat], candidate)
    expected = hugging_face.apply_chat_template(chat["chat"], tokenize=True, return_dict=False)
    assert list(prompt.token_ids) == expected


def test_special_tokens_that_swallow_spaces_keep_to_it(tmp_path: Path) -> None:
    """As those of phi-3 do; the folder says so of each token, and llama.cpp goes by the name of the model."""
    folder = tmp_path / "model"
    save_tiny_model(folder, "phi3", vocab_size=SIZE + 32)
    vocabulary = spm_vocabulary(trained(dummy_prefix=True, symbols=True), symbols=True)
    kept, stripping = "<|endoftext|>", CONTROL_TOKENS[0]
    tokens = tuple(kept if token == CONTROL_TOKENS[1] else token for token in vocabulary.tokens)
    strip = strip_right_of_phi3(tokens, vocabulary.types)
    vocabulary = replace(vocabulary, tokens=tokens, strip_right=strip)
    (folder / "tokenizer.json").write_text(tokenizer_from_vocabulary(vocabulary, "here").to_json())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    original = open_artifact(folder)
    write_candidate(original, tmp_path / "model.gguf", scheme="Q8_0")
    candidate = open_artifact(tmp_path / "model.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    first, second = load_tokenizer(original), load_tokenizer(candidate)
    for token in (kept, stripping):
        text = f"one{token}\n two{token} three"
        ids = first.encode(text)
        assert ids == second.encode(text) == llama.tokenize(text.encode(), add_bos=False, special=True), text
        assert (ids == first.encode(f"one{token}two{token}three")) == (token == stripping)
