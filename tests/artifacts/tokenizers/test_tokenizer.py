"""Token ids against llama.cpp's tokenizer and transformers', and vocabularies that must be refused."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import transformers
from tests.helpers.texts import varied_texts
from tests.helpers.tiny_vocabulary import (
    CONTROL_TOKENS,
    SIZE,
    USER_TOKENS,
    metadata_of,
    tiny_vocabulary,
    write_vocabulary_gguf,
)

from driftscope.artifacts.derive.teacher import write_teacher
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.folder_vocabulary import PRE_NAME_KEY, vocabulary_from_folder
from driftscope.artifacts.tokenizers.pretokenizers import PRE_TOKENIZERS, find_name
from driftscope.artifacts.tokenizers.tokenizer import (
    Tokenizer,
    load_tokenizer,
    tokenizer_from_folder,
    tokenizer_from_vocabulary,
)
from driftscope.artifacts.tokenizers.vocabulary import Vocabulary, vocabulary_from_gguf
from driftscope.errors import InputError

PRE_NAMES = [name for rule in PRE_TOKENIZERS for name in rule.names]
MARKS = (*CONTROL_TOKENS, *USER_TOKENS)


def _llama(path: Path) -> Callable[..., list[int]]:
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def encode(text: str, *, special: bool) -> list[int]:
        ids: list[int] = model.tokenize(text.encode(), add_bos=False, special=special)
        return ids

    return encode


def _write_folder(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """The two files of a tokenizer, as a model folder has them."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.model
def test_default_model_has_the_ids_of_llama_cpp_and_transformers(default_gguf: Path, tmp_path: Path) -> None:
    source = open_artifact(default_gguf)
    write_teacher(source, tmp_path / "teacher")
    tokenizer = load_tokenizer(source)
    copy = load_tokenizer(open_artifact(tmp_path / "teacher"))
    llama = _llama(default_gguf)
    hugging_face = transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher")
    texts = varied_texts(1200, control=CONTROL_TOKENS)
    assert len(set(texts)) == 1200
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == llama(text, special=True), text
        assert ids == hugging_face.encode(text, add_special_tokens=False), text
        assert ids == copy.encode(text), text
        assert tokenizer.encode(text, parse_special=False) == llama(text, special=False), text
    assert tokenizer.to_json() == copy.to_json()
    assert tokenizer.chat_template == copy.chat_template == hugging_face.chat_template
    assert tokenizer.special == copy.special


@pytest.mark.model
def test_bytes_without_a_token_are_dropped_before_merging_as_in_transformers(
    default_gguf: Path, tmp_path: Path
) -> None:
    """The one difference from llama.cpp, which lets no pair merge over such a byte.

    SmolLM2 has no token for the byte 0xF1, which begins U+40000 to U+7FFFF; no character is assigned there.
    """
    tokenizer = load_tokenizer(open_artifact(default_gguf))
    hugging_face = transformers.PreTrainedTokenizerFast.from_pretrained(
        _write_folder(tmp_path / "tokenizer", tokenizer)
    )
    text = "\U000389c8\U00052d99"
    assert tokenizer.encode(text) == hugging_face.encode(text) == [187, 133, 117, 10644, 131, 243]
    assert _llama(default_gguf)(text, special=True) == [187, 133, 117, 226, 236, 131, 243]
    missing = [c for c in map(chr, range(0x40000, 0x80000)) if unicodedata.category(c) not in ("Cn", "Co")]
    assert missing == []


@pytest.mark.parametrize("pre", PRE_NAMES)
def test_every_pre_tokenizer_cuts_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary(pre)
    tokenizer = tokenizer_from_vocabulary(vocabulary, "here")
    llama = _llama(write_vocabulary_gguf(tmp_path / "vocabulary.gguf", vocabulary))
    compared = 0
    for text in varied_texts(500, seed=5, control=MARKS):
        if _differs_on_purpose(pre, text):
            continue
        compared += 1
        assert tokenizer.encode(text) == llama(text, special=True), text
        assert tokenizer.encode(text, parse_special=False) == llama(text, special=False), text
    assert compared > 200


def _differs_on_purpose(pre: str, text: str) -> bool:
    """Where the table follows the original tokenizer and not llama.cpp; see `pretokenizers`."""
    if pre in ("qwen2", "qwen35"):
        return not unicodedata.is_normalized("NFC", text)
    if pre in ("tekken", "gpt-4o", "llama4", "kanana2"):
        return any(unicodedata.category(character).startswith("M") for character in text)
    return False


def test_qwen2_composes_accents_as_its_original_does() -> None:
    tokenizer = tokenizer_from_vocabulary(tiny_vocabulary("qwen2"), "here")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    without = tokenizer_from_vocabulary(tiny_vocabulary("stablelm2"), "here")
    assert without.encode("e\u0301") != without.encode("\u00e9")


@pytest.mark.parametrize("pre", [rule.names[-1] for rule in PRE_TOKENIZERS])
def test_a_folder_keeps_the_vocabulary(pre: str, tmp_path: Path) -> None:
    """From GGUF's form to Hugging Face's and back, and transformers reads the same ids from it."""
    vocabulary = tiny_vocabulary(pre, add_bos=True, add_eos=True, chat_template="{{ messages }}")
    tokenizer = tokenizer_from_vocabulary(vocabulary, "here")
    config: dict[str, Any] = {PRE_NAME_KEY: pre, "chat_template": vocabulary.chat_template}
    folder = _write_folder(tmp_path / "tokenizer", tokenizer, **config)
    assert vocabulary_from_folder(folder, SIZE) == vocabulary
    again = tokenizer_from_folder(folder, SIZE)
    hugging_face = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in varied_texts(200, seed=7, control=MARKS):
        ids = tokenizer.encode(text, add_special=True)
        assert ids == [1, *tokenizer.encode(text), 2]
        assert ids == again.encode(text, add_special=True) == hugging_face.encode(text), text
    assert again.to_json() == tokenizer.to_json()


def test_ids_decode_to_their_text() -> None:
    tokenizer = tokenizer_from_vocabulary(tiny_vocabulary("gpt-2"), "here")
    for text in varied_texts(300, seed=3, control=MARKS):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_text_where_they_are_not_parsed() -> None:
    tokenizer = tokenizer_from_vocabulary(tiny_vocabulary("gpt-2"), "here")
    assert tokenizer.encode("<|im_end|>") == [2]
    assert 2 not in tokenizer.encode("<|im_end|>", parse_special=False)
    assert tokenizer.encode("<tool>", parse_special=False) == [SIZE - 2]
    # The switch does not outlive the call.
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.n_tokens == SIZE


def test_json_does_not_depend_on_what_was_encoded() -> None:
    tokenizer = tokenizer_from_vocabulary(tiny_vocabulary("llama-bpe"), "here")
    before = tokenizer.to_json()
    tokenizer.encode("x", parse_special=False)
    assert tokenizer.to_json() == before
    assert find_name(json.loads(before)) == "llama-bpe"


def test_lone_surrogate_is_refused() -> None:
    tokenizer = tokenizer_from_vocabulary(tiny_vocabulary("gpt-2"), "here")
    with pytest.raises(InputError, match="character 1 is a lone surrogate"):
        tokenizer.encode("a\ud800")


def _with(key: str, value: object) -> dict[str, object]:
    return metadata_of(tiny_vocabulary("gpt-2")) | {f"tokenizer.ggml.{key}": value}


def _without(key: str) -> dict[str, object]:
    metadata = metadata_of(tiny_vocabulary("gpt-2"))
    del metadata[f"tokenizer.ggml.{key}"]
    return metadata


def _tokens(**changes: str) -> tuple[str, ...]:
    tokens = list(tiny_vocabulary("gpt-2").tokens)
    for index, text in changes.items():
        tokens[int(index[1:])] = text
    return tuple(tokens)


BAD_METADATA: dict[str, tuple[dict[str, object], str]] = {
    "no model": (_without("model"), "no tokenizer"),
    "unigram": (_with("model", "t5"), "'t5' is not supported"),
    "model not a string": (_with("model", 3), "not supported"),
    "unknown pre": (_with("pre", "novel"), "'novel' is not supported"),
    "pre not a string": (_with("pre", 5), "not a string"),
    "no tokens": (_without("tokens"), "tokens is missing"),
    "tokens a string": (_with("tokens", "abc"), "not a list of strings"),
    "tokens numbers": (_with("tokens", (1, 2)), "not a list of strings"),
    "too few tokens": (_with("tokens", _tokens()[:-1]), f"{SIZE - 1} tokens, but the model has {SIZE}"),
    "token twice": (_with("tokens", _tokens(i9="!", i10="!")), "is there twice"),
    "no merges": (_without("merges"), "merges is missing"),
    "merge without a space": (_with("merges", ("ab",)), "expected two tokens"),
    "empty merge": (_with("merges", ("",)), "expected two tokens"),
    "merge of an unknown token": (_with("merges", ("nobody knows",)), "unknown token"),
    "too few types": (_with("token_type", (1, 1)), "2 token types"),
    "types not integers": (_with("token_type", ("x",) * SIZE), "not a list of integers"),
    "types a number": (_with("token_type", 1), "not a list of integers"),
    "special id too large": (_with("bos_token_id", SIZE), f"bos_token is {SIZE}, outside"),
    "special id negative": (_with("eos_token_id", -1), "eos_token is -1, outside"),
    "special id no number": (_with("bos_token_id", (1,)), "expected an integer"),
    "template not a string": (
        metadata_of(tiny_vocabulary("gpt-2")) | {"tokenizer.chat_template": 1},
        "chat_template is not a string",
    ),
}


@pytest.mark.parametrize("name", BAD_METADATA)
def test_bad_metadata_is_refused(name: str) -> None:
    metadata, message = BAD_METADATA[name]
    with pytest.raises(InputError, match=message):
        vocabulary_from_gguf(metadata, SIZE, "bad.gguf")


def test_metadata_gives_the_vocabulary() -> None:
    expected = tiny_vocabulary("gpt-2", special={"bos_token": 1, "eos_token": 2})
    assert vocabulary_from_gguf(metadata_of(expected), SIZE, "good.gguf") == expected


def test_a_wanted_token_that_is_not_named_is_refused() -> None:
    vocabulary = tiny_vocabulary("gpt-2", add_bos=True, special={})
    with pytest.raises(InputError, match="wants a bos_token"):
        tokenizer_from_vocabulary(vocabulary, "here")


def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(
        tokenizer_from_vocabulary(tiny_vocabulary("gpt-2"), "here").to_json()
    )
    return document


def _changed(change: Callable[[dict[str, Any]], object]) -> str:
    document = _document()
    change(document)
    return json.dumps(document)


BAD_JSON: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "not JSON": lambda: "{",
    "list": lambda: "[]",
    "deep": lambda: "[" * 100_000,
    "no model": lambda: _changed(lambda d: d.pop("model")),
    "model a string": lambda: _changed(lambda d: d.update(model="BPE")),
    "vocabulary a list": lambda: _changed(lambda d: d["model"].update(vocab=[1])),
    "id a string": lambda: _changed(lambda d: d["model"]["vocab"].update({"!": "x"})),
    "id negative": lambda: _changed(lambda d: d["model"]["vocab"].update({"!": -1})),
    "id too large": lambda: _changed(lambda d: d["model"]["vocab"].update({"!": SIZE})),
    "merge of an unknown token": lambda: _changed(lambda d: d["model"]["merges"].append(["nobody", "knows"])),
    "merge of three": lambda: _changed(lambda d: d["model"]["merges"].append(["a", "b", "c"])),
    "added token without content": lambda: _changed(lambda d: d["added_tokens"][0].pop("content")),
    "bad expression": lambda: _changed(
        lambda d: d.update(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        )
    ),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_tokenizer_json_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(BAD_JSON[name]())
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        tokenizer_from_folder(tmp_path, SIZE)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        vocabulary_from_folder(tmp_path, SIZE)


def test_missing_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be opened"):
        tokenizer_from_folder(tmp_path, SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].update(type="WordPiece"), "expected byte-level BPE"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "no name for this pre-tokenizer"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "no name for this pre-tokenizer"),
        (lambda d: d["model"]["vocab"].update({"!": 9, '"': 9}), "the same id"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_hold_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(_changed(change))
    with pytest.raises(InputError, match=message):
        vocabulary_from_folder(tmp_path, SIZE)


def test_ids_without_a_token_become_unused_padding(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(_document()))
    vocabulary = vocabulary_from_folder(tmp_path, SIZE + 2)
    assert vocabulary.tokens[-2:] == (f"[PAD{SIZE}]", f"[PAD{SIZE + 1}]")
    tokenizer = tokenizer_from_vocabulary(vocabulary, "here")
    assert SIZE not in tokenizer.encode(f"[PAD{SIZE}]")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"chat_template": "one"}, "one"),
        (
            {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]},
            "d",
        ),
        ({"chat_template": [{"name": "tool_use", "template": "t"}]}, None),
        ({}, None),
    ],
)
def test_chat_template_of_a_folder(config: dict[str, object], expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(_document()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_from_folder(tmp_path, SIZE).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("file\n")
    assert tokenizer_from_folder(tmp_path, SIZE).chat_template == "file\n"


def test_vocabulary_checks_itself() -> None:
    vocabulary = Vocabulary(pre="gpt-2", tokens=("a", "b"), types=(1, 1), merges=())
    assert vocabulary.check(2, "here") is vocabulary
    with pytest.raises(InputError, match="2 tokens, but the model has 1 embeddings"):
        vocabulary.check(1, "here")
