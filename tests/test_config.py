"""Configurations: what is filled in, what is refused and how it is said."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from driftscope.config import config_json_schema, load_config, parse_config
from driftscope.errors import InputError

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "name": "small",
    "models": {
        "source": {"source": "file:model.gguf"},
        "teacher": {"derive": "teacher", "from": "source"},
    },
    "pair": {"teacher": "teacher", "candidate": "source"},
    "trace": {"prompts": [{"id": "p", "text": "Hello"}]},
    "decomposition": {"texts": [{"id": "t", "file": "text.txt"}]},
}


def with_value(place: str, value: Any) -> dict[str, Any]:
    """The small configuration with one value set, e.g. at ``trace.prompts.0.text``."""
    document = deepcopy(SMALL)
    where: Any = document
    *parts, last = place.split(".")
    for part in parts:
        where = where[int(part)] if isinstance(where, list) else where.setdefault(part, {})
    where[int(last) if isinstance(where, list) else last] = value
    return document


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configurations_of_the_project_are_valid(file: Path) -> None:
    if file.name.endswith(".lock.yaml"):
        with pytest.raises(InputError):
            load_config(file)
        return
    config = load_config(file)
    assert config.folder == file.parent
    jsonschema.validate(yaml.safe_load(file.read_text(encoding="utf-8")), config_json_schema())


def test_defaults_are_filled_in() -> None:
    config = parse_config(SMALL, "here")
    assert config.sweep.shards == 4
    assert config.trace.keep == ["*"]
    assert config.decomposition.minimum_positions == 192
    assert config.sources() == {"source": "file:model.gguf"}
    again = parse_config(config.canonical(), "there")
    assert again == config


def test_the_place_on_disk_is_no_part_of_the_configuration() -> None:
    here = parse_config({**SMALL, "origin": "a/config.yaml"}, "a/config.yaml")
    there = parse_config({**SMALL, "origin": "b/config.yaml"}, "b/config.yaml")
    assert here.canonical() == there.canonical()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("trace.chunk", 3, ["unknown key `trace.chunk`", "did you mean `chunks`?"]),
        ("modells", {}, ["unknown key `modells`", "did you mean `models`?"]),
        ("models.teacher.sheme", "Q8_0", ["sheme", "did you mean `scheme`?"]),
        ("trace.prompts.0.txt", "Hello", ["txt", "did you mean `text`?"]),
        ("zzzzzzzz", 1, ["unknown key `zzzzzzzz`"]),
        ("name", "../outside", ["name"]),
        ("name", "", ["name"]),
        ("name", "a\n", ["name"]),
        ("sweep.shards", 0, ["sweep.shards", "1"]),
        ("sweep.shards", "many", ["sweep.shards", "integer"]),
        ("decomposition.confidence", 1.0, ["decomposition.confidence"]),
        ("decomposition.minimum_positions", -1, ["decomposition.minimum_positions"]),
        ("trace.prompts", [], ["trace.prompts"]),
        ("trace.prompts.0", {"id": "p"}, ["exactly one of text, chat, ids, file"]),
        ("trace.prompts.0.ids", [1], ["exactly one of text, chat, ids, file"]),
        ("trace.prompts", [{"id": "p", "text": "a"}] * 2, ["two prompts of the same id"]),
        ("pair.candidate", "nobody", ["pair.candidate", "nobody"]),
        ("models.teacher.from", "nobody", ["models.teacher.from", "nobody"]),
        ("models.teacher.from", "teacher", ["derived from itself"]),
        ("models.teacher.source", "file:x", ["either `source` or `derive`"]),
        ("models.source.from", "teacher", ["`derive` and `from` go together"]),
        ("models.teacher.scheme", "Q2_K", ["models.teacher.scheme", "Q4_K_M"]),
    ],
)
def test_a_mistake_is_named_in_one_line(place: str, value: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(with_value(place, value), "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_circle_of_derivations_is_found() -> None:
    document = with_value("models.other", {"derive": "candidate", "from": "teacher"})
    document["models"]["teacher"]["from"] = "other"
    with pytest.raises(InputError, match="derived from itself"):
        parse_config(document, "here")


def test_several_mistakes_are_counted() -> None:
    document = with_value("sweep.shards", 0) | {"title": 5}
    with pytest.raises(InputError, match=r"\(and 1 more\)"):
        parse_config(document, "here")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"name: [", "YAML"),
        (b"- a\n- b\n", "mapping"),
        (b"", "mapping"),
        (b"name: \xff", "cannot be read"),
        (b"!!python/object/apply:os.system ['true']", "YAML"),
    ],
)
def test_what_is_not_a_configuration_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(InputError, match=word) as caught:
        load_config(tmp_path / "c.yaml")
    assert "c.yaml" in str(caught.value)


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
