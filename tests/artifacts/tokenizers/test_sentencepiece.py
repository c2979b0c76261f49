"""The parsed ``tokenizer.model`` against the sentencepiece package, and files that must be refused."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.tiny_sentencepiece import SIZE, processor, spm_vocabulary, trained

from driftscope.artifacts.tokenizers.folder_vocabulary import vocabulary_from_folder
from driftscope.artifacts.tokenizers.sentencepiece import BPE_MODEL, UNIGRAM_MODEL, read_sentencepiece
from driftscope.artifacts.tokenizers.spm_json import merges_of_scores, scores_of_merges
from driftscope.artifacts.tokenizers.token_types import CONTROL, NORMAL, USER_DEFINED
from driftscope.artifacts.tokenizers.tokenizer import tokenizer_from_folder
from driftscope.errors import InputError


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "tokenizer.model"
    path.write_bytes(data)
    return path


def test_pieces_are_those_of_sentencepiece(tmp_path: Path) -> None:
    data = trained(symbols=True)
    model = read_sentencepiece(_file(tmp_path, data))
    expected = spm_vocabulary(data)
    assert (model.pieces, model.scores) == (expected.tokens, expected.scores)
    # The package does not tell user-defined pieces from ordinary ones.
    ordinary = tuple(NORMAL if kind == USER_DEFINED else kind for kind in model.types)
    assert ordinary == expected.types
    assert model.types.count(USER_DEFINED) == 7
    assert model.types.count(CONTROL) == 4
    source = processor(data)
    assert (model.unknown, model.begin, model.end) == (source.unk_id(), source.bos_id(), source.eos_id())
    assert (model.model_type, model.byte_fallback) == (BPE_MODEL, True)
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces, model.charsmap) == (True, False, b"")


def test_settings_of_a_unigram_model(tmp_path: Path) -> None:
    data = trained(
        "unigram",
        byte_fallback=False,
        dummy_prefix=False,
        remove_extra_whitespaces=True,
        normalization="nmt_nfkc",
    )
    model = read_sentencepiece(_file(tmp_path, data))
    assert (model.model_type, model.byte_fallback) == (UNIGRAM_MODEL, False)
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces) == (False, True)
    assert len(model.charsmap) > 1000


def _field(number: int, wire: int, value: bytes) -> bytes:
    return bytes([number << 3 | wire]) + value


def _message(number: int, value: bytes) -> bytes:
    assert len(value) < 128
    return _field(number, 2, bytes([len(value)]) + value)


PIECE = _message(1, _message(1, b"a"))
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no pieces"),
    "text": (b"IQ== 0\nIg== 1\n", "not a SentencePiece model"),
    "cut": (trained()[:-5], "truncated"),
    "long length": (_field(1, 2, b"\xff\xff\xff\xff\x7f"), "truncated"),
    "endless number": (b"\xff" * 20, "more than 64 bits"),
    "group": (b"\x0b", "wire type 3"),
    "field 0": (b"\x00\x00", "field 0"),
    "piece a number": (_field(1, 0, b"\x05"), "a number where text"),
    "text not UTF-8": (_message(1, _message(1, b"\xff\xfe")), "utf-8"),
    "score a number": (_message(1, _message(1, b"a") + _field(2, 0, b"\x05")), "no float"),
    "type unknown": (_message(1, _message(1, b"a") + _field(3, 0, b"\x09")), "unknown type"),
    "type text": (_message(1, _message(1, b"a") + _message(3, b"x")), "text where a number"),
    "normalization cut": (PIECE * 3 + _message(3, _message(2, b"\x09\x00\x00")), "a trie of 9"),
    "normalization too long": (PIECE * 3 + _message(3, _message(2, b"\x08\x00\x00\x00abcd")), "trie of 8"),
    "normalization not UTF-8": (PIECE * 3 + _message(3, _message(2, bytes(4) + b"\xff")), "utf-8"),
    "special id": (PIECE + _message(2, _field(3, 0, b"\x02")), "special id 1 of 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        read_sentencepiece(_file(tmp_path, data))
    assert len(str(caught.value).splitlines()) == 1
    assert "tokenizer.model" in str(caught.value)


def _pieces(*pieces: bytes, model_type: int = 2) -> bytes:
    body = b"".join(_message(1, _message(1, piece) + _field(3, 0, b"\x01")) for piece in pieces)
    return body + _message(2, _field(3, 0, bytes([model_type])))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_pieces(b"a", b"b", b"a"), "a piece is there twice"),
        (_pieces(*(bytes([65 + i]) for i in range(9))), "9 tokens, but the model has 8"),
        (_pieces(b"a", b"b", b"c", model_type=3), "a word model is not supported"),
        (_pieces(b"a", b"b", b"c", model_type=9), "a 9 model is not supported"),
        (
            _pieces(b"a", b"b", b"c") + _message(1, _message(1, b"d") + _field(2, 5, b"\x00\x00\xc0\x7f")),
            "not a finite number",
        ),
    ],
)
def test_models_that_cannot_be_used_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    _file(tmp_path, data)
    for read in (tokenizer_from_folder, vocabulary_from_folder):
        with pytest.raises(InputError, match=message):
            read(tmp_path, 8)


def test_mutated_files_are_read_or_refused_soon(tmp_path: Path) -> None:
    random = np.random.Generator(np.random.Philox(17))
    whole = np.frombuffer(trained(symbols=True), dtype=np.uint8)
    refusals = []
    started = time.monotonic()
    for number in range(400):
        data = whole.copy()
        places = random.integers(0, len(data), size=1 + number % 5)
        data[places] = random.integers(0, 256, size=len(places))
        path = _file(tmp_path, data[: None if number % 3 else random.integers(len(data))].tobytes())
        try:
            read_sentencepiece(path)
            if number % 10 == 0:
                tokenizer_from_folder(tmp_path, SIZE).encode("Hello  world\n")
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert all(len(text.splitlines()) == 1 for text in refusals)
    assert time.monotonic() - started < 60


def test_scores_and_merges_say_the_same() -> None:
    vocabulary = spm_vocabulary(trained())
    ids = {text: index for index, text in enumerate(vocabulary.tokens)}
    merges = merges_of_scores(vocabulary.tokens, vocabulary.scores)
    scores = scores_of_merges(ids, merges, (), "here")
    order = sorted(scores, key=lambda text: -vocabulary.scores[ids[text]])
    assert order == sorted(scores, key=lambda text: -scores[text])
    assert all(left + right in ids for left, right in merges)
