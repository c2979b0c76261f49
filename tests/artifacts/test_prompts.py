"""Prompts of every kind, and those that must be refused."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.helpers.tiny_gguf import CONTEXT, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, write_gguf
from tests.helpers.tiny_vocabulary import SIZE, add_tokenizer, tiny_vocabulary

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.prompts import Prompt, encode_prompts
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer
from driftscope.errors import InputError

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def _artifact(path: Path, **changes: object) -> Artifact:
    """A model with a tokenizer and no tensors; prompts need no more."""

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(LAYERS)
        writer.add_context_length(CONTEXT)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(SIZE)
        add_tokenizer(writer, tiny_vocabulary("gpt-2", **changes))

    return open_artifact(write_gguf(path, "llama", {}, keys=keys))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return _artifact(tmp_path_factory.mktemp("model") / "model.gguf", add_bos=True, chat_template=TEMPLATE)


def _one(artifact: Artifact, folder: Path = Path(), **spec: Any) -> Prompt:
    (prompt,) = encode_prompts([{"id": "p", **spec}], artifact, folder=folder)
    return prompt


def test_text_begins_with_the_token_that_the_model_wants(artifact: Artifact) -> None:
    prompt = _one(artifact, text="What is 2+2?")
    assert (prompt.id, prompt.kind, prompt.text) == ("p", "text", "What is 2+2?")
    assert prompt.token_ids == (1, *load_tokenizer(artifact).encode("What is 2+2?"))


def test_chat_is_what_the_template_renders_and_nothing_else(artifact: Artifact) -> None:
    prompt = _one(artifact, chat=[{"role": "user", "content": "Hi"}])
    assert prompt.text == "<|im_start|>user\nHi<|im_end|>\n"
    assert prompt.token_ids == tuple(load_tokenizer(artifact).encode(prompt.text))
    assert prompt.token_ids.count(1) == 1


def test_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    artifact = _artifact(tmp_path / "model.gguf")
    prompt = _one(artifact, ids=[0, SIZE - 1, 5, 5])
    assert (prompt.kind, prompt.text, prompt.token_ids) == ("ids", None, (0, SIZE - 1, 5, 5))


def test_file_is_read_from_the_folder_byte_for_byte(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("é\r\nline\rend\n".encode())
    prompt = _one(artifact, tmp_path, file="prompt.txt")
    assert prompt.text == "é\r\nline\rend\n"
    assert prompt.token_ids == _one(artifact, text=prompt.text).token_ids
    assert _one(artifact, file=str(tmp_path / "prompt.txt")).token_ids == prompt.token_ids


def test_max_tokens_keeps_the_first(artifact: Artifact) -> None:
    whole = _one(artifact, text="a long enough text")
    assert _one(artifact, text="a long enough text", max_tokens=3).token_ids == whole.token_ids[:3]
    assert _one(artifact, text="a long enough text", max_tokens=999).token_ids == whole.token_ids
    # What is cut off does not count against the context.
    assert len(_one(artifact, ids=[7] * (CONTEXT + 1), max_tokens=CONTEXT).token_ids) == CONTEXT


def test_digest_is_of_little_endian_int32(artifact: Artifact) -> None:
    prompt = _one(artifact, ids=[1, 258, 3])
    assert prompt.sha256 == hashlib.sha256(struct.pack("<3i", 1, 258, 3)).hexdigest()
    assert prompt.sha256 == hashlib.sha256(bytes.fromhex("010000000201000003000000")).hexdigest()


def test_order_is_kept(artifact: Artifact) -> None:
    specs = [{"id": name, "text": name} for name in ("b", "a", "c")]
    assert [prompt.id for prompt in encode_prompts(specs, artifact)] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "has none of text, chat, ids, file"),
        ({"text": ""}, "`p` is empty"),
        ({"ids": []}, "`p` is empty"),
        ({"text": "x", "max_tokens": 0}, "`p` is empty"),
        (
            {"ids": [7] * (CONTEXT + 1)},
            f"has {CONTEXT + 1} tokens, but the context of .* is {CONTEXT}",
        ),
        ({"text": "word " * 1000}, f"but the context of .* is {CONTEXT} tokens"),
        ({"ids": [0, SIZE]}, f"token id {SIZE}, but the vocabulary of .* has {SIZE} tokens"),
        ({"ids": [-1]}, "token id -1"),
        ({"ids": [2**40]}, f"token id {2**40}"),
        ({"text": "\udcff"}, "lone surrogate"),
        ({"chat": []}, "no messages"),
        ({"chat": [{"role": "user"}]}, "has no content"),
        ({"file": "missing.txt"}, "missing.txt: cannot be opened"),
        ({"file": "."}, "a folder; expected a regular file"),
        ({"file": "latin.txt"}, "latin.txt: is not readable UTF-8"),
        ({"file": "empty.txt"}, "`p` is empty"),
    ],
)
def test_bad_prompt_is_refused(
    artifact: Artifact, tmp_path: Path, spec: dict[str, Any], message: str
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(InputError, match=message):
        _one(artifact, tmp_path, **spec)


def test_large_file_is_refused_without_being_read(artifact: Artifact, tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(InputError, match="expected a prompt of at most"):
        _one(artifact, tmp_path, file="large.txt")


def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    artifact = _artifact(tmp_path / "model.gguf")
    with pytest.raises(InputError, match=r"`p` is a chat, but .* has no chat template"):
        _one(artifact, chat=[{"role": "user", "content": "Hi"}])


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    artifact = _artifact(tmp_path / "model.gguf", chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match="prompt `p`: chat template: TemplateError: no system role"):
        _one(artifact, chat=[{"role": "system", "content": "Be brief."}])
