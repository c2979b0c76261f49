"""Ids of SentencePiece vocabularies in GGUF against llama.cpp's and sentencepiece's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import tokenizers
import transformers
from tests.helpers.texts import varied_texts
from tests.helpers.tiny_sentencepiece import (
    CONTROL_TOKENS,
    SPACE,
    USER_TOKENS,
    processor,
    spm_vocabulary,
    trained,
)
from tests.helpers.tiny_vocabulary import write_vocabulary_gguf

from driftscope.artifacts.gguf import read_gguf
from driftscope.artifacts.tokenizers.token_types import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from driftscope.artifacts.tokenizers.tokenizer import tokenizer_from_vocabulary
from driftscope.artifacts.tokenizers.vocabulary import SPM, Vocabulary, vocabulary_from_gguf
from driftscope.errors import InputError

MARKS = ("<s>", "</s>", "<unk>", *CONTROL_TOKENS, "<tool>", "\n\n", "  ", "     ")


class _Llama:
    """llama.cpp's tokenizer of a file without tensors."""

    def __init__(self, path: Path) -> None:
        self.model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def encode(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
        ids: list[int] = self.model.tokenize(text.encode(), add_bos=add_bos, special=special)
        return ids


def _plain() -> Vocabulary:
    """Llama 2's kind: a space in front, bytes, no user-defined tokens."""
    return spm_vocabulary(trained())


def _gemma() -> Vocabulary:
    """Gemma's kind: no space in front, runs of spaces and newlines as user-defined tokens."""
    model = trained(dummy_prefix=False, symbols=True)
    return spm_vocabulary(model, symbols=True, add_space_prefix=False)


def _prefixed() -> Vocabulary:
    """User-defined tokens, after which a space is put in front again."""
    return spm_vocabulary(trained(symbols=True), symbols=True)


def _one_score() -> Vocabulary:
    """All scores equal, as some converters wrote them: the leftmost merges first."""
    vocabulary = _plain()
    return spm_vocabulary(trained(), scores=(-1000.0,) * len(vocabulary.tokens))


def _mistyped() -> Vocabulary:
    """Tokens that llama.cpp takes for control tokens whatever their type."""
    vocabulary = _prefixed()
    kinds = [
        NORMAL if text in CONTROL_TOKENS else kind
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    return spm_vocabulary(trained(symbols=True), symbols=True, types=tuple(kinds))


def _holes() -> Vocabulary:
    """Tokens of characters that are none, and of one character that has no score to speak of."""
    letters = "abcdefgh"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [
        *letters[:4],
        SPACE,
        "ab",
        "abc",
        "bc",
        "ef",
        "efgh",
        "gh",
        "ccc",
        "cc",
        "dd",
        "ddd",
        "öü",
        "<0x",
    ]
    tokens += [f"{SPACE}a", f"a{SPACE}", "bcd", "hg", "aba", "bab", "abab", "cdcd", "cd", "dc"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    kinds += [NORMAL] * (len(tokens) - len(kinds))
    random = np.random.Generator(np.random.Philox(4))
    scores = random.integers(-6, 7, size=len(tokens)).astype(np.float32)
    return Vocabulary(
        pre="default",
        kind=SPM,
        tokens=tuple(tokens),
        types=tuple(kinds),
        scores=tuple(scores.tolist()),
        special={"bos_token": 1, "eos_token": 2, "unk_token": 0},
        add_space_prefix=True,
    )


VOCABULARIES: dict[str, Callable[[], Vocabulary]] = {
    "plain": _plain,
    "gemma": _gemma,
    "prefixed": _prefixed,
    "one score": _one_score,
    "mistyped": _mistyped,
    "holes": _holes,
}


def _texts(name: str) -> list[str]:
    texts = varied_texts(350, seed=5, control=MARKS)
    if name == "holes":
        random = np.random.Generator(np.random.Philox(6))
        texts += ["".join(random.choice(list("abcdefghöü <"), size=12).tolist()) for _ in range(400)]
    runs = [f"{'x' * before}{run * count}y" for run in " \nc-" for count in range(1, 41) for before in (0, 1)]
    return texts + runs


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    vocabulary = VOCABULARIES[name]()
    file = write_vocabulary_gguf(tmp_path / "vocabulary.gguf", vocabulary)
    read = vocabulary_from_gguf(read_gguf(file).metadata, len(vocabulary.tokens), "here")
    assert (read.tokens, read.scores, read.kind) == (vocabulary.tokens, vocabulary.scores, SPM)
    tokenizer = tokenizer_from_vocabulary(read, "here")
    llama = _Llama(file)
    for text in _texts(name):
        for special in (True, False):
            expected = llama.encode(text, special=special)
            assert tokenizer.encode(text, parse_special=special) == expected, (text, special)


def test_special_tokens_of_phi_3_swallow_the_spaces_behind_them(tmp_path: Path) -> None:
    vocabulary = _prefixed()
    # llama.cpp loads no model of this name without the token, behind which spaces stay.
    tokens = tuple("<|endoftext|>" if text == "<tool>" else text for text in vocabulary.tokens)
    vocabulary = spm_vocabulary(trained(symbols=True), symbols=True, tokens=tokens)
    file = write_vocabulary_gguf(tmp_path / "vocabulary.gguf", vocabulary, name="Phi-3 mini")
    read = vocabulary_from_gguf(read_gguf(file).metadata, len(vocabulary.tokens), "here")
    assert read.strip_right
    tokenizer = tokenizer_from_vocabulary(read, "here")
    llama = _Llama(file)
    turn = vocabulary.tokens.index("<end_of_turn>")
    assert tokenizer.encode("<end_of_turn> \n\t a") == [turn, *tokenizer.encode("a")]
    for text in (*_texts("phi"), "<|endoftext|> a", "</s>  a", "<unk> b", "<s> c", "<end_of_turn>\u00a0 d"):
        assert tokenizer.encode(text) == llama.encode(text, special=True), text


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_sentencepiece(prefix: bool) -> None:
    """A text without special tokens, of which sentencepiece knows nothing."""
    model = trained(dummy_prefix=prefix)
    tokenizer = tokenizer_from_vocabulary(spm_vocabulary(model, add_space_prefix=prefix), "here")
    source = processor(model)
    for text in varied_texts(600, seed=8):
        ids = tokenizer.encode(text)
        assert ids == source.encode(text), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.n_tokens == source.get_piece_size()


def test_sequences_begin_and_end_as_the_vocabulary_wants(tmp_path: Path) -> None:
    vocabulary = spm_vocabulary(trained(), add_eos=True)
    file = write_vocabulary_gguf(tmp_path / "vocabulary.gguf", vocabulary)
    tokenizer = tokenizer_from_vocabulary(vocabulary, "here")
    for text in ("", "Hello world", "<s>twice"):
        ids = tokenizer.encode(text, add_special=True)
        assert ids == [1, *tokenizer.encode(text), 2]
        assert ids == _Llama(file).encode(text, special=True, add_bos=True)


@pytest.mark.parametrize("name", ["plain", "gemma", "prefixed"])
def test_the_json_gives_the_same_ids_to_transformers(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_from_vocabulary(VOCABULARIES[name](), "here")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    hugging_face = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path, **tokenizer.special)
    for text in _texts(name):
        ids = tokenizer.encode(text)
        assert ids == hugging_face.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids) == hugging_face.decode(ids), text


def test_equal_scores_are_more_than_merges_can_say() -> None:
    """Why ids of a GGUF file do not come from the merges."""
    tokenizer = tokenizer_from_vocabulary(_one_score(), "here")
    merged = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    texts = _texts("one score")
    assert any(tokenizer.encode(text) != merged.encode(text, add_special_tokens=False).ids for text in texts)


def test_a_long_text_takes_no_longer_a_character_than_a_short_one() -> None:
    tokenizer = tokenizer_from_vocabulary(_plain(), "here")
    words = " ".join(varied_texts(50, seed=1))
    once = tokenizer.encode(words)
    ids = tokenizer.encode(" ".join([words] * 100))
    assert len(ids) >= 99 * len(once)


def test_a_character_without_any_token() -> None:
    vocabulary = Vocabulary(
        pre="default",
        kind=SPM,
        tokens=("<unk>", "a", SPACE),
        types=(UNKNOWN, NORMAL, NORMAL),
        scores=(0.0,) * 3,
        special={"unk_token": 0},
    )
    assert tokenizer_from_vocabulary(vocabulary, "here").encode("aößa ñ") == [1, 0, 1, 2, 0]
    nameless = Vocabulary(pre="default", kind=SPM, tokens=("a",), types=(NORMAL,), scores=(0.0,))
    with pytest.raises(InputError, match="no token for 'ö'"):
        tokenizer_from_vocabulary(nameless, "here").encode("ö")


def _metadata(**changes: object) -> dict[str, object]:
    vocabulary = _plain()
    values: dict[str, object] = {
        "model": "llama",
        "tokens": vocabulary.tokens,
        "scores": vocabulary.scores,
        "token_type": vocabulary.types,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items() if value is not None}


def _replaced(values: tuple[object, ...], index: int, value: object) -> tuple[object, ...]:
    return (*values[:index], value, *values[index + 1 :])


BAD_METADATA: dict[str, tuple[Callable[[], dict[str, object]], str]] = {
    "score not a number": (
        lambda: _metadata(scores=_replaced(_plain().scores, 5, float("nan"))),
        "score of token 5 .* is nan",
    ),
    "score infinite": (lambda: _metadata(scores=_replaced(_plain().scores, 5, float("inf"))), "is inf"),
    "scores words": (lambda: _metadata(scores=("x",) * 800), "not a list of numbers"),
    "scores a number": (lambda: _metadata(scores=1.0), "not a list of numbers"),
    "too few scores": (lambda: _metadata(scores=_plain().scores[:-1]), "799 token scores for 800 tokens"),
    "byte token without a byte": (
        lambda: _metadata(token_type=_replaced(_plain().types, 700, BYTE)),
        "byte token 700 .* expected <0x00>",
    ),
    "long token": (lambda: _metadata(tokens=_replaced(_plain().tokens, 700, "x" * 5000)), "5000 characters"),
    "token twice": (lambda: _metadata(tokens=_replaced(_plain().tokens, 700, "a")), "is there twice"),
    "tokens too many": (lambda: _metadata(tokens=("a",) * 2**22), "4194304 tokens, but the model has 800"),
    "special id": (lambda: _metadata(eos_token_id=800), "eos_token is 800, outside"),
    "unknown model": (lambda: _metadata(model="gemma9"), "'gemma9' is not supported"),
}


@pytest.mark.parametrize("name", BAD_METADATA)
def test_bad_vocabularies_are_refused(name: str) -> None:
    metadata, message = BAD_METADATA[name]
    with pytest.raises(InputError, match=message) as caught:
        vocabulary_from_gguf(metadata(), 800, "bad.gguf")
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_file_leaves_out_is_llama_cpp_s_default(tmp_path: Path) -> None:
    read = vocabulary_from_gguf(_metadata(), 800, "here")
    assert (read.add_bos, read.add_eos, read.add_space_prefix) == (True, False, True)
    assert read.special == {"unk_token": 0, "bos_token": 1, "eos_token": 2}
    assert vocabulary_from_gguf(_metadata(scores=None), 800, "here").scores == (0.0,) * 800
    empty = vocabulary_from_gguf(_metadata(tokens=_replaced(_plain().tokens, 700, "")), 800, "here")
    assert empty.tokens[700] == "[EMPTY_700]"


def test_user_defined_tokens_are_those_of_the_fixture() -> None:
    assert {
        text for text, kind in zip(_gemma().tokens, _gemma().types, strict=True) if kind == USER_DEFINED
    } == {text.replace(SPACE, " ") for text in USER_TOKENS}
