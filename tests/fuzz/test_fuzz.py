"""A short run of the fuzzer over each format, the good models that it starts from, and what it has found."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from driftscope.artifacts.tokenizers.bounds import check_growth
from driftscope.errors import InputError
from tests.fuzz.apr_structure import with_checksums
from tests.fuzz.gguf_structure import structure_of
from tests.fuzz.run import run
from tests.fuzz.subjects import SUBJECTS, Case, Special, apr_file, gguf_files, hf_files, place
from tests.fuzz.worker import read_all

COUNT = 250


@pytest.mark.parametrize("format_", sorted(SUBJECTS))
def test_changed_files_open_or_are_refused_in_one_line(format_: str, tmp_path: Path) -> None:
    totals, problems = run(format_, COUNT, 1, tmp_path)
    assert not problems, {key: line["finding"] for key, line in problems.items()}
    assert totals["done"] == totals["opened"] + totals["refused"] == COUNT
    # Both ways out occur, and some inputs have led to lines that the good ones do not reach.
    assert totals["opened"] > 5
    assert totals["refused"] > 50
    assert totals["corpus"] > 5


@pytest.mark.parametrize("format_", sorted(SUBJECTS))
def test_the_good_models_open(format_: str, tmp_path: Path) -> None:
    subject = SUBJECTS[format_]
    for number, case in enumerate(subject.seeds()):
        folder = tmp_path / str(number)
        folder.mkdir()
        place(case, folder)
        assert read_all(folder / subject.main(case)) == ("opened", [])


def test_the_parts_of_a_gguf_file_make_the_same_file() -> None:
    data = gguf_files()["m.gguf"]
    parts = structure_of(data)
    assert parts is not None
    assert parts.packed() == data


def test_checksums_of_an_apr_file_are_made_right() -> None:
    data = apr_file()
    assert with_checksums(data) == data
    assert with_checksums(data[:40] + bytes(4) + data[44:-4] + bytes(4)) == data


# --- What was found, each made again from a good model.


def named_templates(name: object) -> Callable[[], Case]:
    def case() -> Case:
        templates = {"chat_template": [{"name": name, "template": "x"}, {"name": "default", "template": "y"}]}
        return {**hf_files(), "tokenizer_config.json": json.dumps(templates).encode()}

    return case


def infinite_token_type() -> Case:
    """A list of whole numbers in which one is infinite."""
    parts = structure_of(gguf_files()["m.gguf"])
    assert parts is not None
    for key in parts.keys:
        if key.name.text == b"tokenizer.ggml.token_type":
            key.element, key.items = 6, [struct.pack("<f", float("inf"))] * len(key.items)
    return {"m.gguf": parts.packed()}


def infinite_token_type_in_json() -> Case:
    data = apr_file()
    at = data.index(b'"tokenizer.token_type": [3, 3,')
    return {"m.apr": with_checksums(data[:at] + b'"tokenizer.token_type":[1e9999,' + data[at + 31 :])}


def long_link() -> Case:
    return {**hf_files(), "tokenizer_config.json": Special("link", "a" * 300)}


def with_normalizer(normalizer: object) -> Callable[[], Case]:
    def case() -> Case:
        files = hf_files()
        document = json.loads(files["tokenizer.json"]) | {"normalizer": normalizer}
        return {**files, "tokenizer.json": json.dumps(document).encode()}

    return case


# Of one character, a thousand times a thousand times a thousand.
GROWING = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 3,
}


def deep_configuration() -> Case:
    """Deep enough for Python to read it and not to write it again, where the stack is a little higher."""
    files = hf_files()
    text = files["config.json"].decode()
    return {**files, "config.json": (text[:-1] + ',"deep":' + "[" * 900 + "]" * 900 + "}").encode()}


FOUND: dict[str, tuple[Callable[[], Case], str]] = {
    "a template's name is a list": (named_templates([]), "."),
    "a template's name is an object": (named_templates({}), "."),
    "an infinite token type": (infinite_token_type, "m.gguf"),
    "an infinite token type in JSON": (infinite_token_type_in_json, "m.apr"),
    "a link to a name that is too long": (long_link, "."),
    "a normalizer that makes gigabytes of a word": (with_normalizer(GROWING), "."),
    "JSON that is deep": (deep_configuration, "."),
}


def test_steps_of_published_tokenizers_are_few() -> None:
    """SentencePiece's, Gemma's and Llama 3's: what they replace, put in front and take off."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    steps = [
        back,
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    document = {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(?i:'s|'t)|\\p{L}+" * 40},
            "behavior": "Isolated",
        },
        "decoder": {"type": "Sequence", "decoders": steps},
    }
    check_growth(document, "tokenizer.json")
    with pytest.raises(
        InputError, match=r"tokenizer\.json: the steps of normalizer are more than 64, or could"
    ):
        check_growth(document | {"normalizer": GROWING}, "tokenizer.json")
    with pytest.raises(InputError, match="the steps of decoder"):
        check_growth(
            document | {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 65}},
            "tokenizer.json",
        )


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_found(name: str, tmp_path: Path) -> None:
    case, main = FOUND[name]
    place(case(), tmp_path)
    outcome, refusals = read_all(tmp_path / main)
    assert outcome in ("opened", "refused")
    assert all("\n" not in line and len(line) < 500 for line in refusals)
