"""Contract files: what is refused, and that the message says file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.contracts.examples import CONTRACT_YAML, coin_contract, write_contract

from driftscope.contracts.loading import load_contract, load_contracts
from driftscope.contracts.model import contract_json_schema
from driftscope.errors import InputError


def _line_of(text: str, fragment: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if fragment in line)


def test_a_valid_contract_loads(tmp_path: Path) -> None:
    contract = coin_contract(tmp_path)
    assert contract.id == "coin"
    assert contract.falsifier("loaded-coin").judgement.clauses[0].threshold == 0.6


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("      threshold: 0.6", "      treshold: 0.6", "did you mean `threshold`"),
        ("title: A coin", "titel: A coin", "did you mean `title`"),
        ("    seeds: [1, 2]", "    seed: [1, 2]", "did you mean `seeds`"),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_key(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    text = CONTRACT_YAML.replace(old, new)
    file = write_contract(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_contract(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:{_line_of(text, new.strip())}: unknown key ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("old", "new", "at", "said"),
    [
        ("      throws: 100", "      throws: 100\n      throws: 200", "throws: 200", "is there twice"),
        ("version: 1.2.0\ntitle", "version: '1.2'\ntitle", "version: '1.2'", "`version`"),
        ("  - {id: fair, kind: negative", "  - {id: fair, kind: positive", "- id: loaded", "no negative"),
        ("      right: {hand: right}\n", "", "measurement:", "at least two regimes"),
        ('comparator: ">"', 'comparator: "~"', 'comparator: "~"', "comparator"),
        ("      threshold: 0.6\n", "", "- id: share", "takes one of"),
        ("      threshold: 0.6", "      threshold: .nan", "threshold: .nan", "not a finite number"),
        ("      threshold: 0.6", "      threshold: high", "- id: share", "needs a number"),
        ("falsifiers: [loaded-coin]", "falsifiers: [lost-coin]", "id: coin", "`lost-coin`"),
        ("- {id: fair, kind", "- {id: two-headed, kind", "- id: loaded", "`two-headed` is used twice"),
        ("{version: 1.2.0, status", "{version: 1.1.0, status", "id: coin", "status_history ends"),
        ("status: active", "status: aktive", "status: aktive", "'active'"),
        ("{hand: left}", "&a {hand: left}\n      third: *a", "third: *a", "alias"),
        ("{hand: left}", "!!python/object:os.system {}", "!!python", "not allowed"),
        ("title: A coin that", "title: [A coin that", "equations", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, old: str, new: str, at: str, said: str) -> None:
    text = CONTRACT_YAML.replace(old, new)
    assert text != CONTRACT_YAML
    file = write_contract(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_contract(file)
    message = str(caught.value)
    assert said in message
    assert message.startswith(f"{file}:")
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"\xff\xfe", b"[" * 5000, b"a: &x [1]\nb: *x\n"])
def test_a_file_that_is_no_contract_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.yaml"):
        load_contract(file)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_contract(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="no contract found"):
        load_contracts([tmp_path])


def test_an_id_used_by_two_files_is_refused(tmp_path: Path) -> None:
    write_contract(tmp_path, name="a.yaml")
    write_contract(tmp_path, CONTRACT_YAML.replace("id: coin\n", "id: coin-two\n"), name="b.yaml")
    with pytest.raises(InputError, match=r"b\.yaml: falsifier id `loaded-coin` is already used in .*a\.yaml"):
        load_contracts([tmp_path])


def test_the_json_schema_refuses_what_the_model_refuses(tmp_path: Path) -> None:
    import jsonschema
    import yaml

    schema = contract_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    document = yaml.safe_load(CONTRACT_YAML)
    jsonschema.validate(document, schema)
    document["titel"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)
