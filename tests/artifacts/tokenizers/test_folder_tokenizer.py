"""Tokenizers of model folders against transformers' and sentencepiece's, and back into GGUF."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import tokenizers
import transformers
from tests.helpers.texts import varied_texts
from tests.helpers.tiny_sentencepiece import (
    CONTROL_TOKENS,
    SIZE,
    SPACE,
    USER_TOKENS,
    processor,
    spm_vocabulary,
    trained,
)
from transformers.convert_slow_tokenizer import generate_merges

from driftscope.artifacts.derive.gguf_metadata import add_vocabulary
from driftscope.artifacts.tokenizers.folder_tokenizer import begin_and_end
from driftscope.artifacts.tokenizers.folder_vocabulary import vocabulary_from_folder
from driftscope.artifacts.tokenizers.spm_json import decoder, escaping_normalizer, metaspace
from driftscope.artifacts.tokenizers.tokenizer import tokenizer_from_folder, tokenizer_from_vocabulary
from driftscope.artifacts.tokenizers.vocabulary import SPM
from driftscope.errors import InputError

MARKS = ("<s>", "</s>", *CONTROL_TOKENS, "<tool>", "<|end|>", "<|user|>", "  ", "\n\n")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _added(index: int, content: str, *, special: bool, rstrip: bool = False) -> dict[str, Any]:
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": rstrip,
        "normalized": False,
        "special": special,
    }


def _json_of(model: bytes, *, prefix: bool, symbols: bool) -> dict[str, Any]:
    """A ``tokenizer.json`` with the merges that transformers makes of a model's scores."""
    source = processor(model)
    pieces = [source.id_to_piece(index) for index in range(source.get_piece_size())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    scores = {piece: source.get_score(index) for piece, index in ids.items()}
    special = ("<unk>", "<s>", "</s>", *(CONTROL_TOKENS if symbols else ()))
    users = USER_TOKENS if symbols else ()
    added = [_added(ids[text], text, special=text in special) for text in (*special, *users)]
    added += [
        _added(len(pieces), "<|end|>", special=True, rstrip=True),
        _added(len(pieces) + 1, "<|user|>", special=False),
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": escaping_normalizer(add_space_prefix=prefix),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": decoder(strip_prefix=prefix),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [list(pair) for pair in generate_merges(ids, scores)],
        },
    }


def _folder(
    folder: Path, document: dict[str, Any] | None, config: dict[str, Any], model_type: str = "llama"
) -> Path:
    folder.mkdir(exist_ok=True)
    if document is not None:
        (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return folder


def _texts(count: int = 300) -> list[str]:
    runs = [f"x{run * count}y{run * count}" for run in " \n-" for count in (1, 2, 3, 5, 8, 13, 40)]
    return [*varied_texts(count, seed=12, control=MARKS), *runs, "", " ", "<s> a", "<|end|>  a", "<|user|> a"]


CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama": ("llama", True, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "llama, legacy": ("llama", True, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    "llama, silent": ("llama", True, {"tokenizer_class": "LlamaTokenizer"}),
    "llama, no space": (
        "llama",
        True,
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "add_bos_token": True},
    ),
    "llama, no class": ("llama", True, {}),
    "llama, any class": (
        "llama",
        True,
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_eos_token": True},
    ),
    "mistral": (
        "mistral",
        True,
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True},
    ),
    "phi3": ("phi3", True, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "gemma2": ("gemma2", False, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}),
    "gemma3": ("gemma3_text", False, {"add_bos_token": True, "add_eos_token": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model_type, prefix, config = CASES[name]
    document = _json_of(trained(dummy_prefix=prefix, symbols=True), prefix=prefix, symbols=True)
    if config.get("add_bos_token"):
        # The flag alone does nothing.
        document["post_processor"] = begin_and_end(("<s>", 1), (None, None))
    folder = _folder(tmp_path, document, SPECIAL | config, model_type)
    tokenizer = tokenizer_from_folder(folder, SIZE + 2, model_type)
    hugging_face = transformers.AutoTokenizer.from_pretrained(folder)
    for text in _texts():
        ids = tokenizer.encode(text)
        assert ids == hugging_face.encode(text, add_special_tokens=False), text
        assert tokenizer.encode(text, add_special=True) == hugging_face.encode(text), text
        assert tokenizer.decode(ids) == hugging_face.decode(ids), text


def test_special_tokens_come_as_strings_objects_and_maps(tmp_path: Path) -> None:
    document = _json_of(trained(), prefix=True, symbols=False)
    begin = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False, "normalized": False}
    config = {"bos_token": begin, "eos_token": "</s>", "pad_token": None}
    folder = _folder(tmp_path, document, config)
    (folder / "special_tokens_map.json").write_text('{"unk_token": {"content": "<unk>"}, "eos_token": "<s>"}')
    expected = SPECIAL | {"eos_token": "<s>"}
    assert tokenizer_from_folder(folder, SIZE + 2).special == expected
    hugging_face = transformers.AutoTokenizer.from_pretrained(folder)
    assert {name: getattr(hugging_face, name) for name in expected} == expected
    _folder(tmp_path, document, config | {"added_tokens_decoder": {}})
    assert tokenizer_from_folder(folder, SIZE + 2).special == {"bos_token": "<s>", "eos_token": "</s>"}


def test_added_tokens_of_the_configuration_are_transformers(tmp_path: Path) -> None:
    """Flags of ``added_tokens_decoder`` go before those of ``tokenizer.json``; it may name more tokens."""
    document = _json_of(trained(), prefix=True, symbols=False)
    stated = {str(token["id"]): dict(token) for token in document["added_tokens"]}
    stated[str(SIZE)] |= {"rstrip": False}
    stated[str(SIZE + 1)] |= {"special": True, "lstrip": True}
    document["added_tokens"] = document["added_tokens"][:-1]
    for token in stated.values():
        del token["id"]
    folder = _folder(tmp_path, document, SPECIAL | {"added_tokens_decoder": stated}, "mistral")
    tokenizer = tokenizer_from_folder(folder, SIZE + 2)
    hugging_face = transformers.AutoTokenizer.from_pretrained(folder)
    for text in _texts(150):
        assert tokenizer.encode(text) == hugging_face.encode(text, add_special_tokens=False), text


def test_added_tokens_file(tmp_path: Path) -> None:
    document = _json_of(trained(), prefix=True, symbols=False)
    folder = _folder(tmp_path, document, SPECIAL)
    (folder / "added_tokens.json").write_text(json.dumps({"<|more|>": SIZE + 2, "<|end|>": 7}))
    tokenizer = tokenizer_from_folder(folder, SIZE + 3)
    assert tokenizer.encode("<|more|>") == [SIZE + 2]
    assert tokenizer.encode("<|end|>") == [SIZE]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_sentencepiece_file_alone_gives_its_own_ids(
    model_type: str, extra: bool, prefix: bool, tmp_path: Path
) -> None:
    model = trained(
        model_type,
        dummy_prefix=prefix,
        remove_extra_whitespaces=extra,
        normalization="nmt_nfkc" if extra else "identity",
        byte_fallback=prefix,
    )
    (tmp_path / "tokenizer.model").write_bytes(model)
    source = processor(model)
    tokenizer = tokenizer_from_folder(tmp_path, source.get_piece_size())
    assert tokenizer.special == SPECIAL
    for text in varied_texts(250, seed=3):
        if extra and any(unicodedata.category(character)[0] == "M" for character in text):
            # The two apply the table of characters to other stretches where marks combine.
            continue
        assert tokenizer.encode(text) == source.encode(text), text


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_file_of_a_llama_gives_transformers_ids(legacy: bool, tmp_path: Path) -> None:
    model = trained(symbols=True)
    config = SPECIAL | {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    folder = _folder(tmp_path, None, config)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = tokenizer_from_folder(folder, SIZE, "llama")
    source = processor(model)
    ids = {source.id_to_piece(index): index for index in range(source.get_piece_size())}
    hugging_face = transformers.LlamaTokenizer(
        vocab=ids,
        merges=generate_merges(ids, None),
        legacy=legacy,
        add_bos_token=True,
        additional_special_tokens=[
            tokenizers.AddedToken(text, normalized=False, special=text in CONTROL_TOKENS)
            for text in (*CONTROL_TOKENS, *USER_TOKENS)
        ],
    )
    for text in _texts():
        assert tokenizer.encode(text, add_special=True) == hugging_face.encode(text), text


def _through_gguf(folder: Path, file: Path) -> llama_cpp.Llama:
    """llama.cpp's tokenizer of what a folder's vocabulary is written as."""
    vocabulary = vocabulary_from_folder(folder, SIZE + 4)
    assert vocabulary.kind == SPM
    writer = gguf.GGUFWriter(file, "llama")
    add_vocabulary(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return llama_cpp.Llama(str(file), vocab_only=True, verbose=False)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_folder_s_vocabulary_in_gguf_has_transformers_ids_in_llama_cpp(
    prefix: bool, tmp_path: Path
) -> None:
    document = _json_of(trained(dummy_prefix=prefix, symbols=True), prefix=prefix, symbols=True)
    document["added_tokens"] = [token | {"rstrip": False} for token in document["added_tokens"]]
    document["post_processor"] = begin_and_end(("<s>", 1), (None, None))
    folder = _folder(tmp_path / "model", document, SPECIAL, "mistral")
    hugging_face = transformers.AutoTokenizer.from_pretrained(folder)
    llama = _through_gguf(folder, tmp_path / "v.gguf")
    back = tokenizer_from_vocabulary(vocabulary_from_folder(folder, SIZE + 4), "here")
    for text in _texts():
        ids = hugging_face.encode(text)
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids, text
        assert back.encode(text, add_special=True) == ids, text


def test_a_space_in_front_of_the_text_only_is_more_than_gguf_can_say(tmp_path: Path) -> None:
    """The two engines differ where a text begins with a space, and behind a special token."""
    document = _json_of(trained(), prefix=True, symbols=False)
    document |= {"normalizer": None, "pre_tokenizer": metaspace("first")}
    folder = _folder(tmp_path / "model", document, SPECIAL)
    tokenizer = tokenizer_from_folder(folder, SIZE + 4)
    llama = _through_gguf(folder, tmp_path / "v.gguf")
    for text in _texts():
        ids = llama.tokenize(text.encode(), add_bos=False, special=True)
        if not text.startswith((" ", SPACE)) and not any(
            mark in text for mark in (*MARKS[:2], "<|", "<unk>")
        ):
            assert tokenizer.encode(text) == ids, text
    for text in (" a", "</s>a"):
        ids = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.encode(text) != ids


def test_gguf_to_folder_and_back_keeps_the_ids(tmp_path: Path) -> None:
    first = spm_vocabulary(trained(symbols=True), symbols=True)
    tokenizer = tokenizer_from_vocabulary(first, "here")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer.special))
    again = vocabulary_from_folder(tmp_path, SIZE)
    assert (again.tokens, again.types, again.special) == (first.tokens, first.types, first.special)
    assert (again.add_space_prefix, again.add_bos) == (first.add_space_prefix, first.add_bos)
    second = tokenizer_from_vocabulary(again, "here")
    for text in _texts():
        assert second.encode(text) == tokenizer.encode(text), text


def _changed(**model: Any) -> dict[str, Any]:
    document = _json_of(trained(), prefix=True, symbols=False)
    document["model"] |= model
    return document


def test_merges_that_scores_cannot_say_are_refused(tmp_path: Path) -> None:
    merges = _changed()["model"]["merges"]
    several = next(i for i, (a, b) in enumerate(merges) if [a + b] == ["".join(merges[i + 1])])
    for changed in (
        [*merges[:several], *merges[several + 1 :]],
        [merges[several], *merges[:several], *merges[several + 1 :]],
    ):
        folder = _folder(tmp_path, _changed(merges=changed), SPECIAL)
        with pytest.raises(InputError, match="cannot be said with one score"):
            vocabulary_from_folder(folder, SIZE + 2)
        assert tokenizer_from_folder(folder, SIZE + 2).encode("a")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (lambda: _changed() | {"normalizer": {"type": "Lowercase"}}, "no step 'Lowercase'"),
        (lambda: _changed() | {"pre_tokenizer": metaspace("first") | {"split": True}}, "no step 'Metaspace'"),
        (lambda: _changed(type="Unigram"), "tokenizer model 'Unigram' cannot be written to GGUF"),
        (lambda: _changed(vocab=[["a", 1.0]]), "expected model.vocab"),
        (lambda: _changed(merges=[["a", "b", "c"]]), "expected two tokens"),
        (lambda: _changed() | {"added_tokens": {"a": 1}}, "added_tokens is not a list"),
        (lambda: _changed() | {"added_tokens": [_added(3, "x", special=True)] * 2}, "two have the same"),
        (lambda: _changed() | {"added_tokens": [{"content": "x"}]}, "no id"),
        (
            lambda: _changed() | {"added_tokens": [_added(2**40, "x", special=True)]},
            "has the id 1099511627776",
        ),
    ],
)
def test_documents_that_gguf_cannot_hold_are_refused(document: Any, message: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, document(), SPECIAL)
    with pytest.raises(InputError, match=message) as caught:
        vocabulary_from_folder(folder, SIZE + 2)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda d: d["model"].update(vocab="x" * 5000), "cannot be used as a tokenizer"),
        (lambda d: d.update(added_tokens=[{"id": "5", "content": "x"}]), "an added token has no id"),
        (lambda d: d["added_tokens"][0].pop("content"), "an added token has no content"),
    ],
)
def test_documents_that_cannot_be_used_are_refused_in_a_short_line(
    change: Any, message: str, tmp_path: Path
) -> None:
    document = _changed()
    change(document)
    stated = {"5": {"content": "x"}}
    folder = _folder(tmp_path, document, SPECIAL | {"added_tokens_decoder": stated})
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_from_folder(folder, SIZE + 2)
    assert len(str(caught.value)) < 500
    with pytest.raises(InputError):
        vocabulary_from_folder(folder, SIZE + 2)


def test_a_step_of_a_post_processor_that_is_no_object(tmp_path: Path) -> None:
    for single in ([None], ["A", 3], {}):
        document = _changed() | {"post_processor": {"type": "TemplateProcessing", "single": single}}
        vocabulary = vocabulary_from_folder(_folder(tmp_path, document, SPECIAL), SIZE + 2)
        assert (vocabulary.add_bos, vocabulary.add_eos) == (False, False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "the id 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {}}}, "token 7 has no content"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "a"}}}, "the id -1"),
        ("tokenizer_config.json", {"chat_template": 7}, "chat_template is not a string"),
        ("added_tokens.json", {"a": None}, "the id 'None'"),
        ("added_tokens.json", {"<|far|>": 10**6}, "largest token id is 802"),
    ],
)
def test_bad_companions_are_refused(name: str, content: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, _changed(), SPECIAL)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        tokenizer_from_folder(folder, SIZE + 2)


def test_runs_of_spaces_are_the_same_tokens_everywhere(tmp_path: Path) -> None:
    """Gemma's runs: found whole by sentencepiece and in llama.cpp's files, merged by transformers."""
    model = trained(dummy_prefix=False, symbols=True)
    document = _json_of(model, prefix=False, symbols=True)
    folder = _folder(tmp_path, document, SPECIAL | {"tokenizer_class": "GemmaTokenizer"}, "gemma2")
    hugging_face = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokenizer_from_folder(folder, SIZE + 2, "gemma2")
    # As llama.cpp's converter writes it.
    converted = tokenizer_from_vocabulary(spm_vocabulary(model, symbols=True, add_space_prefix=False), "here")
    source = processor(model)
    for count in range(2, 41):
        text = f"a{' ' * count}b"
        expected = source.encode(text)
        assert ours.encode(text) == hugging_face.encode(text, add_special_tokens=False) == expected
        assert converted.encode(text) == expected


def test_a_huge_template_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, _changed(), SPECIAL)
    with (folder / "chat_template.jinja").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"chat_template\.jinja: 1099511627776 bytes; expected at most"):
        tokenizer_from_folder(folder, SIZE + 2)
